"""The patches that steps of a merge look at: the volumes as nnU-Net preprocesses them, with the right labels."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from expert_models import experts_of, open_model
from factory import base_network, small_plans, write_model, write_volumes

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import IGNORED, Patch, Volumes, open_patches, targets_of

LABELS = {"background": 0, "Liver": 1, "Spleen": 2, "left": 3, "right": 4}


@pytest.fixture
def raw(tmp_path: Path, nnunet_folders: None) -> Path:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS)
    return tmp_path / "raw"


def patches_of(model: Path, volumes: Volumes) -> list[Patch]:
    return open_patches(volumes, open_model(model))


@pytest.mark.parametrize("dim", [2, 3])
def test_patches_are_the_whole_volume(tmp_path: Path, raw: Path, dim: int) -> None:
    """With patches that divide the volume after padding, their voxels are its voxels, each once."""
    plans = small_plans(dim, patch=24)  # larger than the volume: one patch, padded with zeros in the middle
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1}, plans=plans)
    patches = patches_of(model, Volumes([501], 1))
    assert len(patches) == (1 if dim == 3 else 20)
    images = np.stack([patch.image.numpy() for patch in patches])
    values = np.stack([patch.values for patch in patches])
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
    patches = patches_of(model, Volumes([501], 1))
    assert len(patches) == 8  # 20 x 18 x 22 in patches of 16, as few as cover it
    voxels = sum((patch.values == 1).sum() for patch in patches)
    truth = read_labels(raw / "Dataset501_Boxes" / "labelsTr" / "case_0.nii.gz")
    assert voxels >= (truth == 1).sum()


def test_targets_are_the_datasets_labels_in_the_rows_of_the_heads(tmp_path: Path, raw: Path) -> None:
    base = base_network()
    kidneys = write_model(tmp_path / "kidneys", {"background": 0, "Kidney": 1}, base=base,
                          nnunet_transplant={"classes": {"Kidney": ["left", "right"]}})
    liver = write_model(tmp_path / "liver", {"background": 0, "Spleen": 1, "Liver": 2}, base=base, seed=1)
    experts = experts_of([kidneys, liver], Volumes(["Dataset501_Boxes"], 2))
    for patch in experts.patches:
        expected = np.zeros(patch.values.shape, int)
        for row, values in ((1, (3, 4)), (2, (2,)), (3, (1,))):
            for value in values:
                expected[patch.values == value] = row
        np.testing.assert_array_equal(experts.targets([patch])[0].numpy(), expected)
        own = experts.targets([patch], experts.models[1].dataset_json)[0].numpy()
        np.testing.assert_array_equal(own == 2, patch.values == 1)
        np.testing.assert_array_equal(own == 1, patch.values == 2)


def test_targets_of_regions_and_ignored_voxels(tmp_path: Path, raw: Path) -> None:
    write_volumes(raw, "Dataset502_Ignore", {"background": 0, "a": 1, "b": 2, "ignore": 3})
    model = write_model(tmp_path / "m", {"background": 0, "whole": [1, 2], "core": 2}, [1, 2],
                        nnunet_transplant={"classes": {"whole": ["a", "b"], "core": ["b"]}})
    experts = experts_of([model], Volumes([502], 1))
    for patch in experts.patches:
        target = experts.targets([patch])[0].numpy()
        alone = targets_of([patch], experts.plans, experts.dataset_json, experts.device)
        np.testing.assert_array_equal(alone[0].numpy(), target)
        ignored = patch.values == 3
        assert (target[:, ignored] == IGNORED).all()
        np.testing.assert_array_equal(target[0][~ignored], np.isin(patch.values, (1, 2))[~ignored])
        np.testing.assert_array_equal(target[1][~ignored], (patch.values == 2)[~ignored])


def test_cases_are_chosen_and_spread(tmp_path: Path, raw: Path) -> None:
    (tmp_path / "preprocessed" / "Dataset501_Boxes").mkdir(parents=True)
    (tmp_path / "preprocessed" / "Dataset501_Boxes" / "splits_final.json").write_text(
        json.dumps([{"train": ["case_2"], "val": ["case_0", "case_1"]}]))
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1})
    for cases, count, expected in ((None, 2, ["case_0", "case_1"]), ("train:0", 8, ["case_2"]),
                                   ("val:0", 8, ["case_0", "case_1"]), (None, 8, ["case_0", "case_1", "case_2"])):
        volumes = Volumes([501], count, cases)
        patches = patches_of(model, volumes)
        assert len(patches) == 8 * len(expected)  # 20 x 18 x 22 in patches of 16
        assert {tuple(patch.cases.files) for patch in patches} == {tuple(expected)}
        merged = Merger([[open_model(model)]], Recipe("fisher", volumes=volumes)).merge()
        assert merged.provenance["volumes"] == {"Dataset501_Boxes": expected}  # as merge.json says


@pytest.mark.parametrize(("volumes", "message"), [
    (Volumes([999]), "-d 999"), (Volumes([501], 0), "-n_cases"),
    (Volumes([501], 1, "train:3"), "has no splits_final.json"),
    (Volumes([501], 1, "nowhere.txt"), "no file nowhere.txt")])
def test_what_is_not_there_is_refused(tmp_path: Path, raw: Path, volumes: Volumes, message: str) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1})
    with pytest.raises(TransplantError, match=message):
        patches_of(model, volumes)


def test_a_missing_label_is_refused(tmp_path: Path, raw: Path) -> None:
    experts = experts_of([write_model(tmp_path / "m", {"background": 0, "Heart": 1})], Volumes([501], 1))
    with pytest.raises(TransplantError, match="has no label Heart"):
        experts.targets(experts.patches[:1])


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
