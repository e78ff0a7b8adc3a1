"""The patches that steps of a merge look at: the volumes as nnU-Net preprocesses them, with the right labels."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from expert_models import experts_of, open_model
from factory import base_network, small_plans, write_model, write_volumes
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import IGNORED, Patch, Volumes, cut, open_patches, targets_of

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


# ---------------------------------------------------------------------------------------------------------------------
# A budget of patches

def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)


@pytest.mark.parametrize("most", [1, 2, 5, 7])
@pytest.mark.parametrize("size", [(8, 8, 8), (8, 8)])
def test_a_volume_gives_so_many_patches_half_of_them_around_what_is_seen(most: int, size: tuple[int, ...]) -> None:
    data = numbered((20, 24, 16))
    there = np.zeros(data.shape[1:], bool)
    there[13, 4:6, 9] = True
    found = cut(data, data[0], size, most, lambda image: there, 0)
    assert len(found) == most
    around = 0
    for image, labels in found:
        assert image.shape == (1, *size)
        np.testing.assert_array_equal(image[0], labels)  # the same place
        start = [int(axis[0]) for axis in np.nonzero(data[0] == image.reshape(-1)[0])]
        full = (1, *size) if len(size) == 2 else size
        inside = data[0][tuple(slice(first, first + length) for first, length in zip(start, full, strict=True))]
        np.testing.assert_array_equal(inside.reshape(image.shape[1:]), image[0])  # in one piece
        around += bool(np.isin(image[0], data[0][there]).any())
    assert around >= most // 2
    for again in (0, 1):
        same = cut(data, data[0], size, most, lambda image: there, again)
        equal = all(np.array_equal(one[0], other[0]) for one, other in zip(found, same, strict=True))
        assert equal == (again == 0)


def test_where_nothing_is_seen_patches_are_those_that_cover_the_volume() -> None:
    data = numbered((20, 24, 16))
    cover = {float(image.reshape(-1)[0]) for image, _ in cut(data, None, (8, 8, 8), 1000, None, 0)}
    assert len(cover) == 3 * 3 * 2
    for look in (None, lambda image: np.zeros(image.shape[1:], bool)):
        some = [float(image.reshape(-1)[0]) for image, _ in cut(data, None, (8, 8, 8), 5, look, 0)]
        assert len(set(some)) == 5 and set(some) <= cover


@pytest.mark.parametrize("ratio", [(1, 1, 1), (2, 4, 1), (4, 8, 4)])
def test_what_is_seen_counts_from_the_volume_without_its_padding(ratio: tuple[int, ...]) -> None:
    """A mask may be coarser than the volume: the middle of its voxel is in the patch."""
    data = numbered((4, 40, 40)) + 1
    seen = np.array([2, 30, 7])
    there = np.zeros([length // factor for length, factor in zip(data.shape[1:], ratio, strict=True)], bool)
    there[tuple(seen // ratio)] = True
    middle = seen // ratio * ratio + np.array(ratio) // 2
    image, _ = cut(data, None, (8, 8, 8), 2, lambda image: there, 0)[0]
    assert float(data[0][tuple(middle)]) in image


def test_every_patch_around_something_has_a_look_of_its_own(tmp_path: Path, raw: Path) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1}, plans=small_plans(patch=8))
    numbers = []

    def look(number: int, image: np.ndarray) -> np.ndarray:
        numbers.append(number)
        return np.ones(image.shape[1:], bool)
    open_patches(Volumes([501], 3, None, 11), open_model(model), look)
    assert numbers == list(range(2 + 2 + 1))  # half of 4, 4 and 3


@pytest.mark.parametrize(("budget", "each"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 1, 1]), (11, [4, 4, 3]),
                                              (24, [8, 8, 8]), (1000, [8, 8, 8])])
def test_the_budget_is_spread_over_the_volumes(tmp_path: Path, raw: Path, budget: int, each: list[int]) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1}, plans=small_plans(patch=16))
    patches = patches_of(model, Volumes([501], 3, None, budget))
    assert len(patches) == sum(each)
    every = [patches_of(model, Volumes([501], 3, None, 1000))[8 * i:8 * i + 8] for i in range(3)]
    of_volume = [sum(any(torch.equal(patch.image, one.image) for one in volume) for patch in patches)
                 for volume in every]
    assert sorted((count for count in of_volume if count), reverse=True) == each


def test_volumes_that_give_no_patch_are_not_read(tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m", {"background": 0, "Liver": 1}, plans=small_plans(patch=16))
    read: list[str] = []
    of_nnunet = DefaultPreprocessor.run_case

    def run_case(self: DefaultPreprocessor, images: list[str], *more: object) -> object:
        read.append(Path(images[0]).name)
        return of_nnunet(self, images, *more)
    monkeypatch.setattr(DefaultPreprocessor, "run_case", run_case)
    assert len(patches_of(model, Volumes([501], 3, None, 2))) == 2 and len(read) == 2
    with pytest.raises(TransplantError, match="-n_patches must be at least 1, not 0"):
        patches_of(model, Volumes([501], 3, None, 0))


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
