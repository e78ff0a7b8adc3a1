"""Task datasets of real images, compared file by file with what nnU-Net's own preprocessing makes of them."""
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK
from batchgenerators.utilities.file_and_folder_operations import load_json, load_pickle, save_json
from commands import fork_command
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_transplant.cli.split_tasks import main
from nnunet_transplant.data import task_dataset
from nnunet_transplant.data.cases import new_splits
from nnunet_transplant.data.task_dataset import TaskSplit, split_tasks
from nnunet_transplant.errors import TransplantError

pytestmark = pytest.mark.slow

HIPPOCAMPUS = Path(__file__).parents[2].parent / "shared" / "data" / "Dataset004_Hippocampus"
PARENT, REGIONS, IGNORE = "Dataset004_Hippocampus", "Dataset005_Regions", "Dataset006_Ignore"
CONFIGURATIONS = ("2d", "3d_fullres")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's three folders with a plain parent that nnU-Net's command planned and preprocessed, and a region and an
    ignore-label parent with the same images."""
    if not HIPPOCAMPUS.is_dir():
        pytest.skip(f"the Hippocampus dataset is not at {HIPPOCAMPUS}")
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "2")
        write_parents(root / "raw")
        fork_command("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
        stock_preprocessing(root, PARENT, "nnUNetPlans", root / "preprocessed" / PARENT, ("2d",))
        for name, transpose in ((REGIONS, [2, 0, 1]), (IGNORE, [0, 1, 2])):
            folder = root / "preprocessed" / name
            folder.mkdir()
            shutil.copy(root / "preprocessed" / PARENT / "dataset_fingerprint.json", folder)
            shutil.copy(root / "raw" / name / "dataset.json", folder)
            plans = load_json(str(root / "preprocessed" / PARENT / "nnUNetPlans.json"))
            plans.update(dataset_name=name, transpose_forward=transpose,
                         transpose_backward=np.argsort(transpose).tolist())
            save_json(plans, str(folder / "nnUNetPlans.json"))
            stock_preprocessing(root, name, "nnUNetPlans", folder)
        yield root


def write_parents(raw: Path) -> None:
    """Seven cases each. One has another spacing and one has zeros around and in a corner of its image, so that
    resampling and cropping have something to do, also where labels lie outside the image's nonzero part."""
    labels = load_json(str(HIPPOCAMPUS / "dataset.json"))["labels"]
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (HIPPOCAMPUS / "labelsTr").glob("*.nii.gz"))[:7]
    settings = {PARENT: {"labels": labels},
                REGIONS: {"labels": {"background": 0, "hippocampus": [1, 2], "tail": [2]},
                          "regions_class_order": [1, 2]},
                IGNORE: {"labels": {**labels, "ignore": 3}}}
    for name, setting in settings.items():
        for folder in ("imagesTr", "labelsTr"):
            (raw / name / folder).mkdir(parents=True)
        save_json({"channel_names": {"0": "MRI"}, "numTraining": 7, "file_ending": ".nii.gz", "licence": "CC-BY-SA 4.0",
                   **setting}, str(raw / name / "dataset.json"), sort_keys=False)
        for i, case in enumerate(cases):
            image = SimpleITK.ReadImage(str(HIPPOCAMPUS / "imagesTr" / f"{case}_0000.nii.gz"))
            label = SimpleITK.ReadImage(str(HIPPOCAMPUS / "labelsTr" / f"{case}.nii.gz"))
            voxels, seg = SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(label)
            voxels += 1  # nonzero everywhere
            if i == 1:
                voxels[:3] = voxels[:, -4:] = 0
                voxels[:12, :20, :14] = 0
                voxels[20:24, 20:24, 20:24] = 0
                seg[:8, :10, 10:] = 1
            if name == IGNORE:
                seg[-8:] = 3
            new_image, new_label = SimpleITK.GetImageFromArray(voxels), SimpleITK.GetImageFromArray(seg)
            new_image.CopyInformation(image)
            new_label.CopyInformation(image)
            if i == 2:
                new_image.SetSpacing((1.25, 0.9, 1.1))
                new_label.SetSpacing((1.25, 0.9, 1.1))
            SimpleITK.WriteImage(new_image, str(raw / name / "imagesTr" / f"{case}_0000.nii.gz"))
            SimpleITK.WriteImage(new_label, str(raw / name / "labelsTr" / f"{case}.nii.gz"))


def stock_preprocessing(root: Path, dataset: str, plans_name: str, output: Path,
                        configurations: tuple[str, ...] = CONFIGURATIONS) -> None:
    """What nnUNetv2_preprocess runs for every case, without its pool of processes."""
    dataset_json = load_json(str(root / "raw" / dataset / "dataset.json"))
    plans = PlansManager(str(root / "preprocessed" / dataset / f"{plans_name}.json"))
    for name in configurations:
        configuration = plans.get_configuration(name)
        (output / configuration.data_identifier).mkdir(parents=True)
        files = get_filenames_of_train_images_and_targets(str(root / "raw" / dataset), dataset_json)
        for case, case_files in files.items():
            DefaultPreprocessor(verbose=False).run_case_save(
                str(output / configuration.data_identifier / case), case_files["images"], case_files["label"], plans,
                configuration, dataset_json)


def assert_same_cases(folder: Path, stock: Path) -> None:
    """Same files; images and label maps equal in every voxel, type, chunk and block; properties equal in every key."""
    assert sorted(os.listdir(folder)) == sorted(os.listdir(stock))
    assert len(os.listdir(stock)) >= 3
    assert infer_dataset_class(str(folder)) is nnUNetDatasetBlosc2
    for file in folder.iterdir():
        if file.suffix == ".pkl":
            assert_equal(load_pickle(str(file)), load_pickle(str(stock / file.name)))
            continue
        ours, theirs = (blosc2.open(str(path), mode="r") for path in (file, stock / file.name))
        assert (ours.dtype, ours.chunks, ours.blocks) == (theirs.dtype, theirs.chunks, theirs.blocks), file.name
        assert np.array_equal(ours[:], theirs[:]), file.name
        assert ours.schunk.cparams == theirs.schunk.cparams, file.name


def assert_equal(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_equal(ours[key], theirs[key])
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    else:
        assert ours == theirs


def voxels_of(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


@pytest.fixture
def scratch(folders: Path) -> Iterator[Path]:
    """The folders, from which what a test adds is removed again."""
    before = listing(folders)
    yield folders
    for name in ("raw", "preprocessed"):
        for folder in (folders / name).iterdir():
            if str(folder.relative_to(folders)) not in before:
                shutil.rmtree(folder)
    for name in listing(folders) - before:
        (folders / name).unlink()


def split(parent: str, tasks: list[str], ids: list[int], **kwargs) -> TaskSplit:
    return split_tasks(parent, tasks, ids, num_processes=1, **kwargs)


def assert_task_datasets(root: Path, made: TaskSplit, parent: str, tmp_path: Path, linked: bool = True) -> None:
    """Every configuration equals stock preprocessing of the raw task dataset, with the parent's images linked."""
    for task in made.tasks:
        raw_json = (task.raw_folder / "dataset.json").read_bytes()
        assert (task.preprocessed_folder / "dataset.json").read_bytes() == raw_json
        task_json = json.loads(raw_json)
        assert task_json["numTraining"] == len(task.cases) == len(task_json["dataset"])
        plans = load_json(str(task.preprocessed_folder / f"{made.plans_name}.json"))
        assert plans == {**load_json(str(root / "preprocessed" / parent / f"{made.plans_name}.json")),
                         "dataset_name": task.name}
        assert {path.name for path in task.preprocessed_folder.iterdir()} == {
            "dataset.json", "dataset_fingerprint.json", f"{made.plans_name}.json", "splits_final.json",
            "gt_segmentations", *(plans["configurations"][name]["data_identifier"] for name in made.configurations)}
        stock = tmp_path / task.name
        stock_preprocessing(root, task.name, made.plans_name, stock, tuple(made.configurations))
        for name in made.configurations:
            identifier = plans["configurations"][name]["data_identifier"]
            assert_same_cases(task.preprocessed_folder / identifier, stock / identifier)
            for case in task.cases:
                image, parent_image = (root / "preprocessed" / dataset / identifier / f"{case}.b2nd"
                                       for dataset in (task.name, parent))
                assert image.samefile(parent_image) == linked
        for case in task.cases:
            label = task.raw_folder / "labelsTr" / f"{case}.nii.gz"
            assert (task.preprocessed_folder / "gt_segmentations" / label.name).read_bytes() == label.read_bytes()
            ours, theirs = SimpleITK.ReadImage(str(label)), SimpleITK.ReadImage(
                str(root / "raw" / parent / "labelsTr" / label.name))
            assert ours.GetSpacing() == theirs.GetSpacing() and ours.GetOrigin() == theirs.GetOrigin()
            assert ours.GetDirection() == theirs.GetDirection() and ours.GetSize() == theirs.GetSize()


def test_plain_parent(scratch: Path, tmp_path: Path) -> None:
    made = split(PARENT, ["Tail=Posterior", "Hippocampus=1-2", "Both=Posterior+Anterior"], [901, 902, 903])
    assert [task.name for task in made.tasks] == ["Dataset901_Tail", "Dataset902_Hippocampus", "Dataset903_Both"]
    assert [task.labels for task in made.tasks] == [
        {"background": 0, "Tail": 1}, {"background": 0, "Hippocampus": 1},
        {"background": 0, "Posterior": 1, "Anterior": 2}]
    assert made.configurations == list(CONFIGURATIONS)
    assert_task_datasets(scratch, made, PARENT, tmp_path)

    task_json = load_json(str(made.tasks[1].raw_folder / "dataset.json"))
    assert task_json["nnunet_transplant"] == {
        "parent": PARENT, "parent_labels": {"background": 0, "Anterior": 1, "Posterior": 2},
        "parent_regions_class_order": None, "classes": {"Hippocampus": ["Anterior", "Posterior"]}}
    assert task_json["licence"] == "CC-BY-SA 4.0"
    parent_seg, seg = (voxels_of(folder / "labelsTr" / f"{made.tasks[2].cases[0]}.nii.gz")
                       for folder in (scratch / "raw" / PARENT, made.tasks[2].raw_folder))
    assert np.array_equal(seg == 1, parent_seg == 2) and np.array_equal(seg == 2, parent_seg == 1)


def test_region_parent_with_transposed_axes(scratch: Path, tmp_path: Path) -> None:
    made = split(REGIONS, ["Tail=tail", "Both=tail+hippocampus"], [901, 902])
    assert made.tasks[0].labels == {"background": 0, "Tail": [1, 2]}
    assert made.tasks[1].labels == {"background": 0, "hippocampus": [1, 2], "tail": [2]}
    assert_task_datasets(scratch, made, REGIONS, tmp_path)


def test_ignore_label_parent(scratch: Path, tmp_path: Path) -> None:
    made = split(IGNORE, ["Tail=Posterior", "Nested=Anterior,Posterior+Posterior"], [901, 902])
    assert made.tasks[0].labels == {"background": 0, "Tail": 1, "ignore": 2}
    assert made.tasks[1].labels == {"background": 0, "Anterior,Posterior": [1, 2], "Posterior": [2], "ignore": 3}
    assert_task_datasets(scratch, made, IGNORE, tmp_path)
    file = made.tasks[0].preprocessed_folder / "nnUNetPlans_3d_fullres" / f"{made.tasks[0].cases[0]}.pkl"
    assert list(load_pickle(str(file))["class_locations"]) == [1, (-1, 0, 1)]


def test_task_of_a_task(scratch: Path, tmp_path: Path) -> None:
    split(PARENT, ["Both=Posterior+Anterior"], [901])
    made = split("901", ["Head=Anterior"], [902])
    assert load_json(str(made.tasks[0].raw_folder / "dataset.json"))["nnunet_transplant"]["parent"] == "Dataset901_Both"
    assert_task_datasets(scratch, made, "Dataset901_Both", tmp_path)


def test_images_that_depend_on_the_labels_are_preprocessed_again(scratch: Path, tmp_path: Path) -> None:
    folder = scratch / "preprocessed" / PARENT
    plans = load_json(str(folder / "nnUNetPlans.json"))
    plans["plans_name"] = "Masked"
    plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    save_json(plans, str(folder / "Masked.json"))
    made = split(PARENT, ["Tail=Posterior"], [901], plans_name="Masked")
    assert any("3d_fullres" in note and "for each task" in note for note in made.notes)
    shutil.rmtree(made.tasks[0].preprocessed_folder / "nnUNetPlans_2d")  # linked, the other test looks at it
    made.configurations.remove("2d")
    assert_task_datasets(scratch, made, PARENT, tmp_path, linked=False)


def test_plans_of_another_dataset(scratch: Path, tmp_path: Path) -> None:
    made = split(PARENT, ["Tail=Posterior", "Head=Anterior"], [901, 902], plans_from=REGIONS)
    assert_task_datasets_under_plans(scratch, made, tmp_path)
    # plans without preprocessed data, and a parent that is not preprocessed
    moved = scratch / "preprocessed" / "moved"
    (scratch / "preprocessed" / PARENT).rename(moved)
    plans_only = scratch / "preprocessed" / "Dataset007_Plans"
    plans_only.mkdir()
    try:
        for name in ("nnUNetPlans.json", "dataset_fingerprint.json"):
            shutil.copy(scratch / "preprocessed" / REGIONS / name, plans_only)
        made = split("4", ["Tail=Posterior"], [903], plans_from="7")
        assert not (scratch / "preprocessed" / PARENT).exists()
    finally:
        moved.rename(scratch / "preprocessed" / PARENT)
    assert made.configurations == ["3d_fullres"]
    assert load_json(str(made.tasks[0].preprocessed_folder / "splits_final.json")) == new_splits(made.tasks[0].cases)
    assert_task_datasets_under_plans(scratch, made, tmp_path)


def assert_task_datasets_under_plans(root: Path, made: TaskSplit, tmp_path: Path) -> None:
    for task in made.tasks:
        stock_preprocessing(root, task.name, "nnUNetPlans", tmp_path / task.name, tuple(made.configurations))
        for folder in (tmp_path / task.name).iterdir():
            assert_same_cases(task.preprocessed_folder / folder.name, folder)
            for case in task.cases:
                image = f"{folder.name}/{case}.b2nd"
                assert (task.preprocessed_folder / image).samefile(made.tasks[0].preprocessed_folder / image)


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler")
def test_command_and_nnunet_on_its_result(scratch: Path, tmp_path: Path) -> None:
    splits_file = scratch / "preprocessed" / PARENT / "splits_final.json"
    assert not splits_file.exists()
    done = subprocess.run(
        [sys.executable, "-m", "nnunet_transplant.cli.split_tasks", "-d", "4", "-tasks", "Tail=Posterior", "Head=1",
         "-ids", "901", "902", "-np", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Dataset901_Tail: 7 cases, labels background=0, Tail=1" in done.stdout
    assert "nnUNetv2_train 902 3d_fullres 0 " in done.stdout
    assert f"wrote them to {splits_file}" in done.stdout

    folder = scratch / "preprocessed" / "Dataset901_Tail"
    splits = load_json(str(splits_file))
    assert load_json(str(folder / "splits_final.json")) == splits
    train, val = get_trainer_from_args("901", "3d_fullres", 0).do_split()
    assert (train, val) == (splits[0]["train"], splits[0]["val"]) and not set(train) & set(val)
    shutil.rmtree(scratch / "results" / "Dataset901_Tail")

    # nnU-Net's command makes the same again, and leaves the parent's images alone
    ours = tmp_path / "ours"
    shutil.copytree(folder / "nnUNetPlans_3d_fullres", ours)
    images = {file.name: file.read_bytes()
              for file in (scratch / "preprocessed" / PARENT / "nnUNetPlans_3d_fullres").iterdir()}
    fork_command("nnUNetv2_preprocess", "-d", 901, "-c", "3d_fullres", "-np", 1)
    assert_same_cases(ours, folder / "nnUNetPlans_3d_fullres")
    assert images == {file.name: file.read_bytes()
                      for file in (scratch / "preprocessed" / PARENT / "nnUNetPlans_3d_fullres").iterdir()}


def test_chosen_cases(scratch: Path, tmp_path: Path) -> None:
    all_cases = [file.name.removesuffix(".nii.gz") for file in (scratch / "raw" / PARENT / "labelsTr").iterdir()]
    fold = new_splits(all_cases)[0]
    made = split(PARENT, ["Tail=Posterior", "Head=Anterior"], [901, 902], cases="train:0")
    assert any("made a new split" in note for note in made.notes)
    assert_task_datasets(scratch, made, PARENT, tmp_path)
    for task in made.tasks:
        assert task.cases == sorted(fold["train"]) and not set(task.cases) & set(fold["val"])
        splits = load_json(str(task.preprocessed_folder / "splits_final.json"))
        assert splits == new_splits(task.cases)


def test_a_parent_of_somebody_else_is_only_read(scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written to its folders; that its folds are not offered to it is said and harms nothing."""
    splits_file = scratch / "preprocessed" / PARENT / "splits_final.json"

    def refuse(path: Path, replace: bool = False) -> Iterator[Path]:
        assert PARENT in str(path)
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(task_dataset, "atomic_path", refuse)
    made = split(PARENT, ["Tail=Posterior"], [901])
    assert_task_datasets(scratch, made, PARENT, tmp_path)
    assert made.notes == [f"{PARENT} had no splits_final.json: made nnU-Net's own five folds."]
    assert not splits_file.exists()


@pytest.mark.parametrize("content", ['{"train": [], "val": []}', "[]", '[{"train": ["a"]}]', "[", ""])
def test_folds_written_by_hand_are_checked_first(scratch: Path, content: str) -> None:
    splits_file = scratch / "preprocessed" / PARENT / "splits_final.json"
    splits_file.write_text(content)
    before = listing(scratch)
    with pytest.raises(TransplantError, match=str(splits_file)) as raised:
        split(PARENT, ["Tail=Posterior"], [901])
    assert "\n" not in str(raised.value) and listing(scratch) == before


def test_folds_with_unknown_cases(scratch: Path, tmp_path: Path) -> None:
    """A training of the task would not find them. Chosen cases are taken out of the folds by themselves."""
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (scratch / "raw" / PARENT / "labelsTr").iterdir())
    splits_file = scratch / "preprocessed" / PARENT / "splits_final.json"
    folds = [{"train": [*cases[:4], "gone"], "val": [*cases[4:], "gone_too"]}]
    splits_file.write_text(json.dumps(folds))
    with pytest.raises(TransplantError, match="has 2 cases that the dataset does not have: gone, gone_too"):
        split(PARENT, ["Tail=Posterior"], [901])
    made = split(PARENT, ["Tail=Posterior"], [901], cases=cases)
    assert load_json(str(made.tasks[0].preprocessed_folder / "splits_final.json")) == [
        {"train": cases[:4], "val": cases[4:]}]


REFUSED = {
    "taken by a preprocessed dataset": ({"ids": [5]}, "id 5 is taken by Dataset005_Regions"),
    "the parent's id": ({"ids": [4]}, f"id 4 is that of {PARENT} itself"),
    "id 0": ({"ids": [0]}, "not from 1 to 999"),
    "id 1000": ({"ids": [1000]}, "not from 1 to 999"),
    "number of ids": ({"ids": [901, 902]}, "1 tasks but 2 ids"),
    "ids twice": ({"tasks": ["A=1", "B=2"], "ids": [901, 901]}, "same id: 901"),
    "names twice": ({"tasks": ["A=1", "A=2"], "ids": [901, 902]}, "same name: A"),
    "unknown label": ({"tasks": ["A=liver"]}, "no label 'liver'"),
    "unknown dataset": ({"dataset": 77}, "-d 77: Could not find"),
    "unknown dataset name": ({"dataset": "Dataset077_None"}, "nnUNet_raw has no dataset Dataset077_None"),
    "not a dataset name": ({"dataset": "Hippocampus"}, "-d Hippocampus: "),
    "unknown plans": ({"plans_name": "Other"}, "nnUNetv2_plan_and_preprocess -d 4"),
    "unknown plans dataset": ({"plans_from": 77}, "-plans_from 77: Could not find"),
    "unknown case": ({"cases": ["nobody"]}, "not in the dataset: nobody"),
    "too few cases": ({"cases": "val:0"}, "cannot split fewer than 5 cases"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_nothing_written(scratch: Path, name: str) -> None:
    changes, message = REFUSED[name]
    arguments = {"dataset": 4, "tasks": ["Tail=2"], "ids": [901], **changes}
    before = listing(scratch)
    with pytest.raises(TransplantError, match=message):
        split_tasks(**arguments, num_processes=1)
    assert listing(scratch) == before


def test_an_id_with_results_only_is_taken(scratch: Path) -> None:
    (scratch / "results" / "Dataset901_Old").mkdir()
    try:
        with pytest.raises(TransplantError, match="taken by Dataset901_Old"):
            split(PARENT, ["Tail=2"], [901])
    finally:
        (scratch / "results" / "Dataset901_Old").rmdir()


def damaged_label(root: Path, case: str) -> tuple[Path, str]:
    file = root / "raw" / PARENT / "labelsTr" / f"{case}.nii.gz"
    label = SimpleITK.ReadImage(str(file))
    SimpleITK.WriteImage(label + 2, str(file))
    return file, r"labels.*values \[3.*\] are not among the labels"


def cropped_label(root: Path, case: str) -> tuple[Path, str]:
    file = root / "raw" / PARENT / "labelsTr" / f"{case}.nii.gz"
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(file))[1:], str(file))
    return file, f"case {case}: the images have the shape"


def broken_image(root: Path, case: str) -> tuple[Path, str]:
    file = root / "raw" / PARENT / "imagesTr" / f"{case}_0000.nii.gz"
    file.write_bytes(b"no image")
    return file, f"cannot read the images or the label map of case {case}"


def missing_preprocessed_case(root: Path, case: str) -> tuple[Path, str]:
    file = root / "preprocessed" / PARENT / "nnUNetPlans_3d_fullres" / f"{case}.b2nd"
    file.unlink()
    return file, f"1 cases are missing in .*nnUNetPlans_3d_fullres: {case}. Run nnUNetv2_preprocess"


def other_preprocessed_image(root: Path, case: str) -> tuple[Path, str]:
    file = root / "preprocessed" / PARENT / "nnUNetPlans_3d_fullres" / f"{case}.b2nd"
    file.unlink()
    blosc2.asarray(np.zeros((1, 3, 3, 3), np.float32), urlpath=str(file))
    return file, "preprocess its dataset again"


def missing_image(root: Path, case: str) -> tuple[Path, str]:
    file = root / "raw" / PARENT / "labelsTr" / f"{case}.nii.gz"
    file.unlink()
    return file, f"1 image or label files are missing: .*{case}"


@pytest.mark.parametrize("damage", [damaged_label, cropped_label, broken_image, missing_preprocessed_case,
                                    other_preprocessed_image, missing_image])
def test_damage_leaves_nothing_behind(scratch: Path, tmp_path: Path, damage) -> None:
    case = sorted(file.name.removesuffix(".nii.gz") for file in (scratch / "raw" / PARENT / "labelsTr").iterdir())[4]
    before = listing(scratch)
    shutil.copytree(scratch / "raw" / PARENT, tmp_path / "raw")
    shutil.copytree(scratch / "preprocessed" / PARENT, tmp_path / "preprocessed")
    try:
        file, message = damage(scratch, case)
        with pytest.raises(TransplantError, match=message):
            split(PARENT, ["Tail=Posterior"], [901])
    finally:
        kind = file.relative_to(scratch).parts[0]
        shutil.copy(tmp_path / kind / file.relative_to(scratch / kind / PARENT), file)
    assert listing(scratch) == before


def test_old_npz_data_are_refused(scratch: Path) -> None:
    (scratch / "preprocessed" / PARENT / "nnUNetPlans_3d_fullres" / "case.npz").touch()
    with pytest.raises(TransplantError, match=r"old npz format\. Run nnUNetv2_preprocess"):
        split(PARENT, ["Tail=Posterior"], [901])


def test_plans_for_other_channels_are_refused(scratch: Path) -> None:
    folder = scratch / "preprocessed" / PARENT
    plans = load_json(str(folder / "nnUNetPlans.json"))
    for configuration in plans["configurations"].values():
        if "normalization_schemes" in configuration:
            configuration["normalization_schemes"] *= 2
    save_json(plans, str(folder / "TwoChannels.json"))
    with pytest.raises(TransplantError, match="for 2 image channels, the dataset has 1"):
        split(REGIONS, ["Tail=tail"], [901], plans_name="TwoChannels", plans_from=PARENT)


def test_symbolic_links_where_hard_links_are_impossible(scratch: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    made = split(PARENT, ["Tail=Posterior"], [901])
    assert_task_datasets(scratch, made, PARENT, tmp_path)
    made = split(PARENT, ["Tail=Posterior", "Head=Anterior"], [902, 903], plans_from=REGIONS)
    assert_task_datasets_under_plans(scratch, made, tmp_path)


def test_command_prints_one_line_on_bad_input(scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["", "-d", "4", "-tasks", "Tail=3", "-ids", "901"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 1
    assert capsys.readouterr().err == ("nnunet_transplant_split_tasks: error: task 'Tail=3': the dataset has no label "
                                       "'3'. It has Anterior (1), Posterior (2)\n")
