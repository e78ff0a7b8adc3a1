"""The patches that data-driven methods look at: the volumes as nnU-Net preprocesses them, with the right labels."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from factory import base_network, small_plans, write_model, write_volumes

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import join, merged_dataset_json
from nnunet_transplant.merging import Recipe, merge_folders
from nnunet_transplant.merging.calibration import IGNORED, Calibration, Volumes, open_calibration
from nnunet_transplant.merging.merge import _merge_heads
from nnunet_transplant.model_folder import open_models

LABELS = {"background": 0, "Liver": 1, "Spleen": 2, "left": 3, "right": 4}


def opened(tmp_path: Path, models: list[Path], volumes: Volumes) -> Calibration:
    trained = [open_models(path)[0] for path in models]
    weights = [1 / len(models)] * len(models)
    joined = join(trained, weights)
    heads = _merge_heads(trained, [model.tensors() for model in trained], weights, joined)
    return open_calibration(volumes, trained, merged_dataset_json(trained[0], joined), heads, trained[0].trainer)


@pytest.fixture
def raw(tmp_path: Path, nnunet_folders: None) -> Path:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS)
    return tmp_path / "raw"


@pytest.mark.parametrize("dim", [2, 3])
def test_patches_are_the_whole_volume(tmp_path: Path, raw: Path, dim: int) -> None:
    """With patches that divide the volume after padding, their voxels are its voxels, each once."""
    plans = small_plans(dim, patch=24)  # larger than the volume: one patch, padded with zeros in the middle
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1}, plans=plans)
    calibration = opened(tmp_path, [model], Volumes([501], 1))
    assert len(calibration.patches) == (1 if dim == 3 else 20)
    images = np.stack([patch.image.numpy() for patch in calibration.patches])
    values = np.stack([patch.values for patch in calibration.patches])
    if dim == 3:
        images, values = images[0], values[0]
        assert images.shape == (1, 24, 24, 24)
        inside = (slice(2, 22), slice(3, 21), slice(1, 23))
        images = images[0]
    else:
        assert images.shape == (20, 1, 24, 24)
        inside = (slice(None), slice(3, 21), slice(1, 23))
        images = images[:, 0]
    outside = np.ones(images.shape, bool)
    outside[inside] = False
    assert not images[outside].any()
    assert abs(images[inside].mean()) < 1e-4 and abs(images[inside].std() - 1) < 1e-3  # z-scored, as the plans say
    np.testing.assert_array_equal(values[inside], read_labels(raw / "Dataset501_Boxes" / "labelsTr" / "case_0.nii.gz"))


def read_labels(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def test_small_patches_cover_everything(tmp_path: Path, raw: Path) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1}, plans=small_plans(patch=16))
    calibration = opened(tmp_path, [model], Volumes([501], 1))
    assert len(calibration.patches) == 8  # 20 x 18 x 22 in patches of 16, as few as cover it
    voxels = sum((patch.values == 1).sum() for patch in calibration.patches)
    truth = read_labels(raw / "Dataset501_Boxes" / "labelsTr" / "case_0.nii.gz")
    assert voxels >= (truth == 1).sum()


def test_targets_are_the_datasets_labels_in_the_rows_of_the_heads(tmp_path: Path, raw: Path) -> None:
    base = base_network()
    kidneys = write_model(tmp_path / "kidneys", {"background": 0, "Kidney": 1}, base=base,
                          nnunet_transplant={"classes": {"Kidney": ["left", "right"]}})
    liver = write_model(tmp_path / "liver", {"background": 0, "Spleen": 1, "Liver": 2}, base=base, seed=1)
    calibration = opened(tmp_path, [kidneys, liver], Volumes(["Dataset501_Boxes"], 2))
    for patch in calibration.patches:
        expected = np.zeros(patch.values.shape, int)
        for row, values in ((1, (3, 4)), (2, (2,)), (3, (1,))):
            for value in values:
                expected[patch.values == value] = row
        np.testing.assert_array_equal(calibration.targets([patch])[0].numpy(), expected)
        own = calibration.targets([patch], calibration.models[1].dataset_json)[0].numpy()
        np.testing.assert_array_equal(own == 2, patch.values == 1)
        np.testing.assert_array_equal(own == 1, patch.values == 2)


def test_targets_of_regions_and_ignored_voxels(tmp_path: Path, raw: Path) -> None:
    write_volumes(raw, "Dataset502_Ignore", {"background": 0, "a": 1, "b": 2, "ignore": 3})
    model = write_model(tmp_path / "m", {"background": 0, "whole": [1, 2], "core": 2}, [1, 2],
                        nnunet_transplant={"classes": {"whole": ["a", "b"], "core": ["b"]}})
    calibration = opened(tmp_path, [model], Volumes([502], 1))
    for patch in calibration.patches:
        target = calibration.targets([patch])[0].numpy()
        ignored = patch.values == 3
        assert (target[:, ignored] == IGNORED).all()
        np.testing.assert_array_equal(target[0][~ignored], np.isin(patch.values, (1, 2))[~ignored])
        np.testing.assert_array_equal(target[1][~ignored], (patch.values == 2)[~ignored])


def test_networks_are_the_models_own(tmp_path: Path, raw: Path) -> None:
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i)
              for i, name in enumerate(("Liver", "Spleen"))]
    calibration = opened(tmp_path, models, Volumes([501], 1))
    for index, path in enumerate(models):
        state = torch.load(path / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for name, tensor in calibration.network(index).state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert calibration.merged_network().decoder.seg_layers[-1].weight.shape[0] == 3


def test_cases_are_chosen_and_spread(tmp_path: Path, raw: Path) -> None:
    (tmp_path / "preprocessed" / "Dataset501_Boxes").mkdir(parents=True)
    (tmp_path / "preprocessed" / "Dataset501_Boxes" / "splits_final.json").write_text(
        json.dumps([{"train": ["case_2"], "val": ["case_0", "case_1"]}]))
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1})
    for cases, count, expected in ((None, 2, ["case_0", "case_1"]), ("train:0", 8, ["case_2"]),
                                   ("val:0", 8, ["case_0", "case_1"]), (None, 8, ["case_0", "case_1", "case_2"])):
        calibration = opened(tmp_path, [model], Volumes([501], count, cases))
        assert calibration.provenance()["datasets"] == {"Dataset501_Boxes": expected}


@pytest.mark.parametrize(("volumes", "message"), [
    (Volumes([999]), "-d 999"), (Volumes([501], 0), "-n_cases"),
    (Volumes([501], 1, "train:3"), "has no splits_final.json"),
    (Volumes([501], 1, "nowhere.txt"), "no file nowhere.txt")])
def test_what_is_not_there_is_refused(tmp_path: Path, raw: Path, volumes: Volumes, message: str) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1})
    with pytest.raises(TransplantError, match=message):
        opened(tmp_path, [model], volumes)


def test_a_missing_label_is_refused(tmp_path: Path, raw: Path) -> None:
    calibration = opened(tmp_path, [write_model(tmp_path / "m", {"background": 0, "Heart": 1})], Volumes([501], 1))
    with pytest.raises(TransplantError, match="has no label Heart"):
        calibration.targets(calibration.patches[:1])


def test_volumes_without_labels_serve_methods_that_need_none(tmp_path: Path, raw: Path) -> None:
    shutil.rmtree(raw / "Dataset501_Boxes" / "labelsTr")
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base_network(), seed=i)
              for i, name in enumerate(("Liver", "Spleen"))]
    for method in ("fisher", "regmean"):
        merge_folders(models, recipe=Recipe(method, volumes=Volumes([501], 1)))
    for recipe in (Recipe("learned", volumes=Volumes([501], 1)),
                   Recipe("fisher", parameters={"labels": "dataset"}, volumes=Volumes([501], 1))):
        with pytest.raises(TransplantError, match="has cases without labels"):
            merge_folders(models, recipe=recipe)


def test_methods_that_look_at_no_volumes_refuse_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1})
    with pytest.raises(TransplantError, match="karcher looks at no volumes: leave out -d"):
        merge_folders([model], recipe=Recipe("karcher", volumes=Volumes([501], 1)))
