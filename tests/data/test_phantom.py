"""The phantom: the same patient every time, a whole abdomen, and datasets that nnU-Net accepts."""
import json

import numpy as np
import pytest
import SimpleITK
from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import label

from nnunet_transplant.data.phantom import LABEL_KINDS, ORGANS, SHAPE, phantom_case, write_phantom_dataset
from nnunet_transplant.errors import TransplantError

CASES = [(seed, scanner) for scanner in "AB" for seed in range(4)]


@pytest.fixture(scope="module")
def cases():
    return {(seed, scanner): phantom_case(seed, scanner) for seed, scanner in CASES}


def label_manager(folder):
    dataset = json.loads((folder / "dataset.json").read_text())
    return LabelManager(dataset["labels"], dataset.get("regions_class_order"))


def read(path):
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))


def test_same_arguments_same_arrays_other_arguments_another_patient(cases):
    image, labels = cases[0, "A"]
    again = phantom_case(0, "A")
    assert image.tobytes() == again[0].tobytes() and labels.tobytes() == again[1].tobytes()
    for other in ((1, "A"), (0, "B")):
        assert not np.array_equal(labels, cases[other][1])


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_a_whole_abdomen(cases, case):
    image, labels = cases[case]
    assert image.shape == labels.shape == SHAPE and image.dtype == np.int16 and labels.dtype == np.uint8
    assert -1024 <= image.min() < -900 and 200 < image.max() <= 3071
    assert set(np.unique(labels)) == {0, *ORGANS.values()}
    size = {name: np.count_nonzero(labels == value) for name, value in ORGANS.items()}
    assert min(size.values()) >= 150 and size["Liver"] > 2 * size["Kidney"] and size["Liver"] > 3 * size["Spleen"]
    for name, value in ORGANS.items():
        parts = np.sort(np.bincount(label(labels == value)[0].ravel())[1:])[::-1]
        assert parts[:2 if name == "Kidney" else 1].sum() > 0.95 * size[name], f"{name} lies in pieces"
    assert not any((labels[:, edge] > 0).any() for edge in (0, -1)), "the body is cut at the front or back"
    assert (labels == ORGANS["Aorta"]).any((1, 2)).mean() > 0.7, "the aorta runs through nearly all slices"


@pytest.mark.parametrize("case", CASES)
def test_organs_have_sides_and_overlapping_intensities(cases, case):
    image, labels = cases[case]
    middle = {name: np.mean(np.nonzero(labels == value)[2]) for name, value in ORGANS.items()}
    assert middle["Liver"] < middle["Aorta"] < middle["Spleen"], "x runs from the patient's right to the left"
    kidneys, count = label(labels == ORGANS["Kidney"])
    assert count >= 2 and len(set(np.nonzero(kidneys == 1)[2]) & set(np.nonzero(kidneys == 2)[2])) == 0
    mean = {name: image[labels == value].mean() for name, value in ORGANS.items()}
    assert min(mean["Kidney"], mean["Aorta"]) > max(mean["Liver"], mean["Spleen"])
    for value in ORGANS.values():
        alike = (np.abs(image - np.median(image[labels == value])) < 30)
        assert (labels[alike] != value).mean() > 0.2, "a threshold finds the organ"


def test_scanners_differ(cases):
    def mean_hu(scanner, organ):
        return np.mean([image[labels == ORGANS[organ]].mean() for (_, s), (image, labels) in cases.items()
                        if s == scanner])

    assert mean_hu("A", "Liver") > mean_hu("B", "Liver") + 20
    assert mean_hu("B", "Aorta") - mean_hu("B", "Liver") > mean_hu("A", "Aorta") - mean_hu("A", "Liver") + 20


def test_another_shape_shows_all_organs():
    image, labels = phantom_case(0, "A", (24, 32, 40))
    assert image.shape == labels.shape == (24, 32, 40) and set(np.unique(labels)) == {0, *ORGANS.values()}


@pytest.mark.parametrize("kind", LABEL_KINDS)
def test_nnunet_accepts_the_dataset(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    folder = tmp_path / "Dataset801_PhantomA"
    write_phantom_dataset(folder, 2, "A", 3, labels=kind, shape=(24, 32, 40))
    names = sorted(p.name for p in (folder / "imagesTr").iterdir())
    assert names == ["phantomA_003_0000.nii.gz", "phantomA_004_0000.nii.gz"]
    verify_dataset_integrity(str(folder), num_processes=1)

    manager, segmentation = label_manager(folder), read(folder / "labelsTr" / "phantomA_003.nii.gz")
    image, labels = phantom_case(3, "A", (24, 32, 40))
    assert np.array_equal(read(folder / "imagesTr" / "phantomA_003_0000.nii.gz"), image)
    assert manager.has_regions == kind.startswith("regions") and manager.has_ignore_label == kind.endswith("ignore")
    unseen = segmentation == manager.ignore_label if manager.has_ignore_label else np.zeros(image.shape, bool)
    slices = 6 if manager.has_ignore_label else 0
    assert unseen.any((1, 2)).sum() == unseen.all((1, 2)).sum() == slices, "whole slices are not annotated"
    assert np.array_equal(segmentation[~unseen], labels[~unseen])


def test_regions_give_all_organs_back(cases):
    kind = LABEL_KINDS["regions"]
    manager, labels = LabelManager(kind["labels"], kind["regions_class_order"]), cases[0, "A"][1]
    regions = np.stack([np.isin(labels, region) for region in manager.foreground_regions]).astype(np.float32)
    assert np.array_equal(manager.convert_probabilities_to_segmentation(regions), labels)


def test_a_dataset_is_the_same_bytes_every_time_and_scanners_never_collide(tmp_path):
    for name, scanner in (("first", "A"), ("again", "A"), ("other", "B")):
        write_phantom_dataset(tmp_path / name, 1, scanner, 0, shape=(24, 32, 40))
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 3
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    assert [p.name for p in (tmp_path / "other" / "labelsTr").iterdir()] == ["phantomB_000.nii.gz"]


@pytest.mark.parametrize("arguments, words", [
    ((-1, "A"), "negative"), ((0, "C"), "scanner 'C'"), ((0, "A", (8, 48, 64)), "24 voxels"),
])
def test_bad_cases_are_refused(arguments, words):
    with pytest.raises(TransplantError, match=words):
        phantom_case(*arguments)


def test_bad_datasets_are_refused(tmp_path):
    with pytest.raises(TransplantError, match="labels 'boxes'"):
        write_phantom_dataset(tmp_path / "new", 1, "A", 0, labels="boxes")
    with pytest.raises(TransplantError, match="at least one case"):
        write_phantom_dataset(tmp_path / "new", 0, "A", 0)
    (tmp_path / "mine").touch()
    with pytest.raises(TransplantError, match="not empty"):
        write_phantom_dataset(tmp_path, 1, "A", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
