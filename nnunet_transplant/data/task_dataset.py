"""Task datasets: one labelled nnU-Net dataset split into several, each with a part of its labels and the same images.

A task dataset is an ordinary nnU-Net dataset, raw and preprocessed. Raw: remapped labels, and the parent's images by
nnU-Net's `dataset` entry. Preprocessed: the parent's image volumes as hard links, and what depends on the labels made
anew by nnU-Net's own preprocessor, so that it equals what `nnUNetv2_preprocess` makes of the raw folder.
"""
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import Labels, TaskLabels, foreground_values, task_labels
from nnunet_transplant.task_vector import RECORD

Splits = list[dict[str, list[str]]]

RESERVED = ("background", "ignore")  # label names with a meaning of their own in nnU-Net


# ---------------------------------------------------------------------------------------------------------------------
# What a task is: parsing and label logic. Nothing here touches a file.

class Task(NamedTuple):
    """A task's name, and for each of its classes the names of the parent's labels that it joins."""
    name: str
    classes: dict[str, list[str]]


def parse_task(text: str, parent_labels: Labels) -> Task:
    """Read `NAME=SPEC`: in SPEC a comma joins labels into one class and `+` separates classes. A label is a name, a
    value or a range of values such as `11-18`; a name that matches exactly wins.

    The class of a one-class task is named after the task. With several classes, a class of one label keeps the label's
    name and a joined class is named by its text.

    Raises TransplantError for text that is not of this form, unknown labels, a label twice in one class, and
    background or ignore.
    """
    name, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not spec or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise TransplantError(f"Cannot read the task '{text}'. A task is NAME=LABELS, for example Liver=liver or "
                              f"Kidney=left_kidney,right_kidney, and NAME has letters, digits, _ and - only.")
    values = foreground_values(parent_labels)
    parts = [spec] if spec in values else [part.strip() for part in spec.split("+")]
    classes: dict[str, list[str]] = {}
    for part in parts:
        labels = _labels_of_class(part, parent_labels, text)
        class_name = name if len(parts) == 1 else labels[0] if len(labels) == 1 else part
        if class_name in RESERVED:
            raise TransplantError(f"Task '{text}': nnU-Net keeps the name '{class_name}' for itself, choose another.")
        if class_name in classes:
            raise TransplantError(f"Task '{text}': the class '{class_name}' is there twice.")
        classes[class_name] = labels
    return Task(name, classes)


def _labels_of_class(text: str, parent_labels: Labels, task: str) -> list[str]:
    items = [text] if text in foreground_values(parent_labels) else [item.strip() for item in text.split(",")]
    labels = [label for item in items for label in _labels_of_item(item, parent_labels, task)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise TransplantError(f"Task '{task}': {_listed(twice)} more than once in one class.")
    return labels


def _labels_of_item(text: str, parent_labels: Labels, task: str) -> list[str]:
    values = foreground_values(parent_labels)
    if text in values:
        return [text]
    number_range = re.fullmatch(r"(\d+)\s*-\s*(\d+)", text)
    if number_range:
        first, last = int(number_range[1]), int(number_range[2])
        if first > last:
            raise TransplantError(f"Task '{task}': the range {text} is empty, write {last}-{first}.")
        return [label for value in range(first, last + 1)
                for label in _labels_of_item(str(value), parent_labels, task)]
    value = int(text) if re.fullmatch(r"\d+", text) else None
    if text == "background" or value == 0:
        raise TransplantError(f"Task '{task}': background cannot be a class of its own or part of one.")
    if text == "ignore" or (value is not None and value == parent_labels.get("ignore")):
        raise TransplantError(f"Task '{task}': the ignore label is carried over by itself, it cannot be selected.")
    named = [label for label, label_values in values.items() if label_values == (value,)]
    if not named:
        raise TransplantError(f"Task '{task}': the dataset has no label '{text}'. It has "
                              + ", ".join(f"{label} ({_shown(parent_labels[label])})" for label in values) + ".")
    return named[:1]


def remap_labels(seg: np.ndarray, value_map: Mapping[int, int]) -> np.ndarray:
    """Label map of any shape and number type -> int16 of the same shape, by value_map.

    Raises TransplantError for values that are not in value_map."""
    values = seg.astype(np.int32)
    table = np.full(max(value_map) + 1, -1, np.int16)
    table[list(value_map)] = list(value_map.values())
    known = (values == seg) & (values >= 0) & (values < len(table))
    remapped = table[np.where(known, values, 0)]
    known &= remapped >= 0
    if not known.all():
        raise TransplantError(f"values {np.unique(seg[~known]).tolist()} are not among the labels of its dataset.json")
    return remapped


# ---------------------------------------------------------------------------------------------------------------------
# Which cases

def choose_cases(cases: str | os.PathLike | Sequence[str], all_cases: Sequence[str], splits: Splits) -> list[str]:
    """Sorted case ids: from a file (one id per line, or a JSON list), from `train:K` or `val:K` (fold K of `splits`),
    or a sequence of ids as it is.

    Raises TransplantError for a missing file or fold, no case at all, and ids that are not in `all_cases`."""
    if isinstance(cases, (str, os.PathLike)):
        fold = re.fullmatch(r"(train|val):(\d+)", str(cases))
        if fold and int(fold[2]) >= len(splits):
            raise TransplantError(f"-cases {cases}: the dataset has {len(splits)} folds, counted from 0.")
        chosen = splits[int(fold[2])][fold[1]] if fold else _cases_in_file(Path(cases))
    else:
        chosen = cases
    unknown = sorted(set(chosen) - set(all_cases))
    if unknown:
        raise TransplantError(f"{len(unknown)} of the chosen cases are not in the dataset: {_listed(unknown)}.")
    if not chosen:
        raise TransplantError("No case was chosen.")
    return sorted(set(chosen))


def _cases_in_file(file: Path) -> list[str]:
    if not file.is_file():
        raise TransplantError(f"-cases: there is no file {file}. Give a file with one case id per line, or a fold of "
                              f"the dataset as train:0 or val:0.")
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return [str(case) for case in json.loads(text)]
        except json.JSONDecodeError as error:
            raise TransplantError(f"-cases: {file} starts like a JSON list but is none: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def new_splits(cases: Sequence[str]) -> Splits:
    """nnU-Net's own five folds of these cases: seeded, so always the same. Raises TransplantError below 5 cases."""
    if len(cases) < 5:
        raise TransplantError(f"nnU-Net cannot split fewer than 5 cases into its 5 folds, here are {len(cases)}.")
    return [{part: [str(case) for case in fold[part]] for part in ("train", "val")}
            for fold in generate_crossval_split(sorted(cases), seed=12345, n_splits=5)]


def splits_of_cases(splits: Splits, cases: Sequence[str]) -> tuple[Splits, bool]:
    """Every fold without the cases that were not chosen, or a new split of the chosen ones if that would leave a fold
    with nothing to train or validate on; and whether it is a new one.

    Raises TransplantError if a new split has fewer than 5 cases."""
    chosen = set(cases)
    kept = [{part: [case for case in fold[part] if case in chosen] for part in ("train", "val")} for fold in splits]
    if all(fold["train"] and fold["val"] for fold in kept):
        return kept, False
    return new_splits(cases), True


# ---------------------------------------------------------------------------------------------------------------------
# Writing the datasets

@dataclass(frozen=True)
class TaskDataset:
    """A task dataset that was written."""
    name: str
    labels: dict[str, "int | list[int]"]
    cases: list[str]
    raw_folder: Path
    preprocessed_folder: Path


@dataclass(frozen=True)
class TaskSplit:
    """What split_tasks wrote, for which configurations of which plans, and what a user should know about it."""
    tasks: list[TaskDataset]
    plans_name: str
    configurations: list[str]
    notes: list[str]


@dataclass(frozen=True)
class _DataFolder:
    """A folder of preprocessed cases, the configuration that makes it, and where its images come from: linked from
    the parent's folder, or if that is None preprocessed, once for all tasks (shared) or for each of them."""
    identifier: str
    configuration: str
    parent: Path | None
    shared: bool


@dataclass(frozen=True)
class _Target:
    """A task on its way: the hidden folders that it is built in and those that they will be renamed to."""
    name: str
    value_map: dict[int, int]
    dataset_json: dict
    raw: Path
    preprocessed: Path
    final_raw: Path
    final_preprocessed: Path


def split_tasks(dataset: int | str, tasks: Sequence[str], ids: Sequence[int], plans_name: str = "nnUNetPlans",
                plans_from: int | str | None = None, cases: str | os.PathLike | Sequence[str] | None = None,
                num_processes: int = default_num_processes, show_progress: bool = True) -> TaskSplit:
    """Write one nnU-Net dataset per task, raw and preprocessed: all of them or, on any error, nothing.

    dataset: name or id of the parent, preprocessed with `plans_name` (unless plans_from is given).
    tasks, ids: `NAME=SPEC` (see parse_task) and a free dataset id from 1 to 999, for each task.
    plans_from: name or id of a dataset whose plans are used instead of the parent's, so that models of both can merge.
        The parent's images are then preprocessed once under these plans, into the first task's folder.
    cases: which of the parent's cases to take (see choose_cases), all by default.
    num_processes: cases at a time; 1 starts no process.

    Raises TransplantError for whatever a user can mend: unknown datasets, labels, cases or plans, ids that are taken,
    a parent that was not preprocessed, missing files, label maps with undeclared values.
    """
    raw_root, preprocessed_root = _root("nnUNet_raw"), _root("nnUNet_preprocessed")
    parent = _dataset_name(dataset)
    parent_json_file = raw_root / parent / "dataset.json"
    if not parent_json_file.is_file():
        raise TransplantError(f"There is no dataset {parent} in nnUNet_raw: {parent_json_file} is missing.")
    parent_json = load_json(str(parent_json_file))
    parsed = [parse_task(task, parent_json["labels"]) for task in tasks]
    _check_ids(parsed, ids, parent)
    labels = [task_labels(task.classes, parent_json["labels"], parent_json.get("regions_class_order"))
              for task in parsed]

    source = preprocessed_root / (parent if plans_from is None else _dataset_name(plans_from))
    plans = _load_plans(source, plans_name)
    folders = _data_folders(plans, plans_name, source, source.name == parent)
    _check_plans_fit(plans, folders, parent_json, source.name)

    files = get_filenames_of_train_images_and_targets(str(raw_root / parent), deepcopy(parent_json))
    splits_file = preprocessed_root / parent / "splits_final.json"
    parent_splits = load_json(str(splits_file)) if splits_file.is_file() else None
    splits = parent_splits or new_splits(list(files))
    chosen, new_split = sorted(files), False
    if cases is not None:
        chosen = choose_cases(cases, list(files), splits)
        splits, new_split = splits_of_cases(splits, chosen)
    _check_files(files, chosen, folders)

    task_jsons = [_task_json(parent, parent_json, task, task_label, files, chosen)
                  for task, task_label in zip(parsed, labels, strict=True)]
    names = [f"Dataset{dataset_id:03d}_{task.name}" for task, dataset_id in zip(parsed, ids, strict=True)]
    with _targets(names, labels, task_jsons, raw_root, preprocessed_root) as targets:
        for target in targets:
            _write_task_files(target, plans, plans_name, source, splits, folders)
        # sent to the workers with every case, so without the list of all cases
        light = [replace(target, dataset_json={**target.dataset_json, "dataset": {}}) for target in targets]
        work = partial(_make_case, targets=light, folders=folders, plans=plans)
        _for_each_case(work, {case: files[case] for case in chosen}, num_processes, show_progress)
        if parent_splits is None and splits_file.parent.is_dir():
            save_json(new_splits(list(files)), str(splits_file), sort_keys=False)

    notes = []
    if parent_splits is None:
        notes.append(f"{parent} had no splits_final.json: made nnU-Net's own five folds"
                     + (f" and wrote them to {splits_file}." if splits_file.is_file() else "."))
    if new_split:
        notes.append(f"The chosen cases leave a fold of {parent} without training or validation cases: made a new "
                     f"split of the {len(chosen)} chosen cases, the same for all tasks.")
    notes += [f"{folder.configuration}: the images depend on the labels, or on a preprocessor other than nnU-Net's "
              f"default, and were preprocessed for each task." for folder in folders if not folder.shared]
    identifiers = {folder.identifier for folder in folders}
    configurations = [name for name in plans["configurations"]
                      if _configuration(plans, name).data_identifier in identifiers]
    return TaskSplit([TaskDataset(target.name, target.dataset_json["labels"], chosen, target.final_raw,
                                  target.final_preprocessed) for target in targets], plans_name, configurations, notes)


def _root(variable: str) -> Path:
    if not os.environ.get(variable):
        raise TransplantError(f"The environment variable {variable} is not set (see nnU-Net's setting_up_paths.md).")
    return Path(os.environ[variable]).absolute()


def _dataset_name(dataset: int | str) -> str:
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise TransplantError(f"No dataset '{dataset}': {error}") from error
    if not re.match(r"Dataset\d{3}_", name):
        raise TransplantError(f"'{name}' is no dataset name of nnU-Net: they are like Dataset004_Hippocampus.")
    return name


def _check_ids(tasks: Sequence[Task], ids: Sequence[int], parent: str) -> None:
    if len(tasks) != len(ids):
        raise TransplantError(f"There are {len(tasks)} tasks but {len(ids)} ids: give one id per task.")
    for what, values in (("name", [task.name for task in tasks]), ("id", list(ids))):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise TransplantError(f"Several tasks have the same {what}: {_listed(twice)}.")
    for dataset_id in ids:
        if not 1 <= dataset_id <= 999:
            raise TransplantError(f"The id {dataset_id} is not from 1 to 999.")
        if dataset_id == int(parent[7:10]):
            raise TransplantError(f"The id {dataset_id} is that of {parent} itself.")
        taken = find_candidate_datasets(dataset_id)
        if len(taken):
            raise TransplantError(f"The id {dataset_id} is taken by {_listed(taken)} (in nnUNet_raw, "
                                  f"nnUNet_preprocessed or nnUNet_results). Choose another, or remove that dataset.")


def _load_plans(source: Path, plans_name: str) -> dict:
    """The plans, after a check that what is copied along with them is there."""
    dataset_id = int(source.name[7:10])
    if not (source / f"{plans_name}.json").is_file():
        planner = "" if plans_name == "nnUNetPlans" else f" -pl PLANNER, with the planner that makes {plans_name}"
        raise TransplantError(f"{source.name} has no plans {plans_name} in nnUNet_preprocessed. Run: "
                              f"nnUNetv2_plan_and_preprocess -d {dataset_id}{planner}")
    if not (source / "dataset_fingerprint.json").is_file():
        raise TransplantError(f"{source.name} has no dataset_fingerprint.json in nnUNet_preprocessed. Run: "
                              f"nnUNetv2_extract_fingerprint -d {dataset_id}")
    return load_json(str(source / f"{plans_name}.json"))


def _configuration(plans: dict, name: str) -> ConfigurationManager:
    return PlansManager(plans).get_configuration(name)


def _data_folders(plans: dict, plans_name: str, source: Path, link_images: bool) -> list[_DataFolder]:
    """A folder for each data identifier that `source` has preprocessed.

    If it has none, an error, or when images are not linked: 3d_fullres, or else all configurations."""
    first_with = {}  # several configurations may share a folder
    for name in plans["configurations"]:
        first_with.setdefault(_configuration(plans, name).data_identifier, name)
    found = {identifier: name for identifier, name in first_with.items() if (source / identifier).is_dir()}
    if not found and link_images:
        raise TransplantError(f"{source.name} is planned but not preprocessed. Run: "
                              f"nnUNetv2_preprocess -d {int(source.name[7:10])} -plans_name {plans_name}")
    if not found:
        full = {identifier: name for identifier, name in first_with.items() if name == "3d_fullres"}
        found = full or first_with
    folders = []
    for identifier, name in found.items():
        configuration = _configuration(plans, name)
        if configuration.preprocessor_class is None:
            raise TransplantError(f"nnU-Net has no preprocessor {configuration.preprocessor_name}, which the "
                                  f"configuration {name} of {source.name} asks for.")
        # normalisation within the mask takes in labelled voxels of intensity 0, so the images depend on the labels
        shared = configuration.preprocessor_class is DefaultPreprocessor and not any(configuration.use_mask_for_norm)
        folders.append(_DataFolder(identifier, name, source / identifier if link_images and shared else None, shared))
    return folders


def _channel_names(dataset_json: dict) -> dict[str, str]:
    return dataset_json["channel_names"] if "channel_names" in dataset_json else dataset_json["modality"]


def _check_plans_fit(plans: dict, folders: Sequence[_DataFolder], parent_json: dict, source: str) -> None:
    channels = len(_channel_names(parent_json))
    for folder in folders:
        planned = len(_configuration(plans, folder.configuration).normalization_schemes)
        if planned != channels:
            raise TransplantError(f"The plans of {source} are for {planned} image channels, the dataset has "
                                  f"{channels}.")
    reader = PlansManager(plans).image_reader_writer_class
    if parent_json["file_ending"].lower() not in reader.supported_file_endings:
        raise TransplantError(f"The plans of {source} read images with {reader.__name__}, which cannot read "
                              f"{parent_json['file_ending']} files.")


def _check_files(files: dict[str, dict], cases: Sequence[str], folders: Sequence[_DataFolder]) -> None:
    """Every file that is read or linked is there: the parent's images, label maps and preprocessed images."""
    missing = [file for case in cases for file in (*files[case]["images"], files[case]["label"])
               if not Path(file).is_file()]
    if missing:
        raise TransplantError(f"{len(missing)} image or label files are missing: {_listed(missing)}.")
    for folder in folders:
        if folder.parent is None:
            continue
        again = (f"Run nnUNetv2_preprocess for {folder.parent.parent.name} again, with -c {folder.configuration} and "
                 f"these plans.")
        if any(folder.parent.glob("*.npz")):
            raise TransplantError(f"{folder.parent} holds data in nnU-Net's old npz format. {again}")
        unprocessed = [case for case in cases if not (folder.parent / f"{case}.b2nd").is_file()]
        if unprocessed:
            raise TransplantError(f"{len(unprocessed)} cases are missing in {folder.parent}: {_listed(unprocessed)}. "
                                  f"{again}")


def _task_json(parent: str, parent_json: dict, task: Task, labels: TaskLabels, files: dict[str, dict],
               cases: Sequence[str]) -> dict:
    """A task's dataset.json. What of the parent's is true of the task as well is kept, licences among it."""
    kept = ("channel_names", "modality", "file_ending", "overwrite_image_reader_writer", "licence", "license",
            "reference")
    task_json = {"name": task.name, **{key: parent_json[key] for key in kept if key in parent_json},
                 "labels": labels.labels, "numTraining": len(cases)}
    if labels.regions_class_order is not None:
        task_json["regions_class_order"] = labels.regions_class_order
    task_json[RECORD] = {
        "parent": parent, "parent_labels": parent_json["labels"],
        "parent_regions_class_order": parent_json.get("regions_class_order"), "classes": task.classes}
    task_json["dataset"] = {
        # relative to the raw folder, which is still to be renamed
        case: {"images": [os.path.abspath(image) for image in files[case]["images"]],
               "label": f"labelsTr/{case}{parent_json['file_ending']}"} for case in cases}
    return task_json


@contextmanager
def _targets(names: Sequence[str], labels: Sequence[TaskLabels], task_jsons: Sequence[dict], raw_root: Path,
             preprocessed_root: Path) -> Iterator[list[_Target]]:
    """Hidden folders beside the final ones, which nnU-Net does not take for datasets. Renamed when all is done, removed
    on any error or interruption, the ones already renamed too."""
    token = uuid4().hex[:8]
    targets = [_Target(name, task_label.value_map, task_json, raw_root / f".tmp_{name}_{token}",
                       preprocessed_root / f".tmp_{name}_{token}", raw_root / name, preprocessed_root / name)
               for name, task_label, task_json in zip(names, labels, task_jsons, strict=True)]
    renames = [pair for target in targets
               for pair in ((target.raw, target.final_raw), (target.preprocessed, target.final_preprocessed))]
    made = []
    try:
        for hidden, _ in renames:
            hidden.mkdir(parents=True)
            made.append(hidden)
        yield targets
        for hidden, final in renames:
            hidden.rename(final)
            made[made.index(hidden)] = final
    except BaseException:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_task_files(target: _Target, plans: dict, plans_name: str, source: Path, splits: Splits,
                      folders: Sequence[_DataFolder]) -> None:
    for folder in (target.raw / "labelsTr", target.preprocessed / "gt_segmentations",
                   *(target.preprocessed / folder.identifier for folder in folders)):
        folder.mkdir(parents=True)
    for folder in (target.raw, target.preprocessed):
        save_json(target.dataset_json, str(folder / "dataset.json"), sort_keys=False)
    # the trainer takes its folders from the plans' dataset_name
    save_json({**plans, "dataset_name": target.name}, str(target.preprocessed / f"{plans_name}.json"), sort_keys=False)
    save_json(splits, str(target.preprocessed / "splits_final.json"), sort_keys=False)
    shutil.copyfile(source / "dataset_fingerprint.json", target.preprocessed / "dataset_fingerprint.json")


def _for_each_case(work: Callable[[str, dict], None], files: dict[str, dict], num_processes: int,
                   show_progress: bool) -> None:
    """work(case, its files) for every case, num_processes at a time. The first error stops it."""
    progress = partial(tqdm, desc="Preprocessing cases", total=len(files), disable=not show_progress)
    if num_processes <= 1:
        for case, case_files in progress(files.items()):
            work(case, case_files)
        return
    with ProcessPoolExecutor(min(num_processes, len(files)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, case, case_files) for case, case_files in files.items()]
        try:
            for future in progress(as_completed(futures)):
                future.result()
        except BrokenProcessPool as error:
            raise TransplantError("A background process died, most likely for lack of memory: try a smaller -np."
                                  ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _make_case(case: str, files: dict, targets: Sequence[_Target], folders: Sequence[_DataFolder],
               plans: dict) -> None:
    """Everything that belongs to one case, in all tasks."""
    manager = PlansManager(plans)
    reader = manager.image_reader_writer_class()
    try:
        image, properties = reader.read_images(files["images"])
        parent_seg, seg_properties = reader.read_seg(files["label"])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise TransplantError(f"Cannot read the images or the label map of case {case}: {error}") from error
    if image.shape[1:] != parent_seg.shape[1:]:
        raise TransplantError(f"Case {case}: the images have the shape {image.shape[1:]}, the label map has "
                              f"{parent_seg.shape[1:]}.")
    for target in targets:
        label_name = f"{case}{target.dataset_json['file_ending']}"
        label_file = target.raw / "labelsTr" / label_name
        try:
            seg = remap_labels(parent_seg, target.value_map)
        except TransplantError as error:
            raise TransplantError(f"{files['label']}: {error}") from error
        reader.write_seg(seg[0], str(label_file), seg_properties)
        shutil.copyfile(label_file, target.preprocessed / "gt_segmentations" / label_name)
        seg, _ = reader.read_seg(str(label_file))
        for folder in folders:
            configuration = manager.get_configuration(folder.configuration)
            data_folder = target.preprocessed / folder.identifier
            if folder.parent is not None:
                image_folder = final_image_folder = folder.parent
            elif folder.shared and target is not targets[0]:
                image_folder = targets[0].preprocessed / folder.identifier
                final_image_folder = targets[0].final_preprocessed / folder.identifier
            else:
                preprocessor = configuration.preprocessor_class(verbose=False)
                preprocessor.run_case_save(str(data_folder / case), files["images"], str(label_file), manager,
                                           configuration, target.dataset_json)
                continue
            _save_labels(data_folder / case, image, seg, deepcopy(properties), manager, configuration,
                         target.dataset_json, image_folder / f"{case}.b2nd")
            _link(image_folder / f"{case}.b2nd", data_folder / f"{case}.b2nd", final_image_folder / f"{case}.b2nd")


def _save_labels(truncated: Path, image: np.ndarray, seg: np.ndarray, properties: dict, manager: PlansManager,
                 configuration: ConfigurationManager, dataset_json: dict, preprocessed_image: Path) -> None:
    """CASE_seg.b2nd and CASE.pkl as nnU-Net's preprocessor writes them, without the images' normalisation, resampling
    and compression. image: (channels, x, y, z), seg: (1, x, y, z), both as read."""
    labels_only = ConfigurationManager({
        **configuration.configuration, "resampling_fn_data": "no_resampling_hack", "resampling_fn_data_kwargs": {},
        "normalization_schemes": ["NoNormalization"] * len(image), "use_mask_for_norm": [False] * len(image)})
    _, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image, seg, properties, manager, labels_only, dataset_json)
    shape = blosc2.open(str(preprocessed_image), mode="r").shape
    if tuple(shape) != (len(image), *seg.shape[1:]):
        raise TransplantError(f"{preprocessed_image} has the shape {shape}, but the raw images and the plans give "
                              f"{(len(image), *seg.shape[1:])}: preprocess its dataset again.")
    seg = seg.astype(np.int16, copy=False)
    blocks, chunks = comp_blosc2_params(seg.shape, tuple(configuration.patch_size), seg.itemsize)
    # nnU-Net chooses how to compress; the one voxel that it writes as the image makes room for the link
    voxel = (1, 1, 1, 1)
    nnUNetDatasetBlosc2.save_case(np.zeros(voxel, np.float32), seg, properties, str(truncated), chunks=voxel,
                                  blocks=voxel, chunks_seg=chunks, blocks_seg=blocks)
    truncated.with_name(f"{truncated.name}.b2nd").unlink()


def _link(source: Path, target: Path, final_source: Path) -> None:
    """Hard-link source as target, or where the file systems do not allow it, a symbolic link to where source will be
    when the folders have their final names."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        target.symlink_to(os.path.realpath(final_source))


def _listed(items: Sequence[str], most: int = 5) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _shown(value: "int | Sequence[int]") -> str:
    return "+".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)
