"""Task datasets: one labelled nnU-Net dataset split into several, each with a part of its labels and the same images.

A task dataset is an ordinary nnU-Net dataset, raw and preprocessed. Raw: remapped labels, and the parent's images by
nnU-Net's `dataset` entry. Preprocessed: the parent's image volumes as hard links, and what depends on the labels made
anew by nnU-Net's own preprocessor, so that it equals what `nnUNetv2_preprocess` makes of the raw folder.
"""
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from uuid import uuid4

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_transplant.data.cases import (
    Splits,
    choose_cases,
    dataset_name,
    listed,
    new_splits,
    nnunet_folder,
    open_cases,
    open_splits,
    splits_of_cases,
)
from nnunet_transplant.data.task_cases import DataFolder, TaskFolders, for_each_case, make_case
from nnunet_transplant.data.tasks import Task, parse_task
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import atomic_path, read_json
from nnunet_transplant.labels import TaskLabels, channel_names, same_channels, task_labels
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.task_vector import RECORD


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
    """What split_tasks wrote, for which configurations of which plans, and what a user should know about it.

    checkpoint: of the model that the plans are from, where they are a model's: it can be the base."""
    tasks: list[TaskDataset]
    plans_name: str
    configurations: list[str]
    notes: list[str]
    checkpoint: Path | None = None


@dataclass(frozen=True)
class _Source:
    """Whose plans are used: a dataset's, or a trained model's."""
    name: str                  # for messages
    folder: Path
    plans: dict
    plans_name: str
    fingerprint: Path
    channels: list[str]        # how it calls its image channels; empty where nothing says so
    configuration: str | None  # that of a model
    checkpoint: Path | None


def split_tasks(dataset: int | str, tasks: Sequence[str], ids: Sequence[int], *, plans_name: str | None = None,
                plans_from: int | str | Path | None = None, cases: str | os.PathLike | Sequence[str] | None = None,
                regions: bool = False, num_processes: int = default_num_processes, trust: bool = False,
                progress: bool = False) -> TaskSplit:
    """Write one nnU-Net dataset per task, raw and preprocessed: all of them or, on any error, nothing.

    dataset: name or id of the parent, preprocessed with `plans_name` (unless plans_from is given). Nothing in its
        folders needs to be writable.
    tasks, ids: `NAME=SPEC` (see parse_task) and a free dataset id from 1 to 999, for each task.
    plans_name: nnUNetPlans by default; a model's plans have the name that they have.
    plans_from: whose plans are used instead of the parent's, so that models of both can merge: name or id of a dataset,
        or a trained model folder (or a checkpoint in one), of which nothing else need be on this machine. The parent's
        images are then preprocessed once under these plans, into the first task's folder.
    cases: which of the parent's cases to take (see choose_cases), all by default.
    regions: make regions of all classes, which a sigmoid head tells from everything else one by one, instead of labels,
        which a softmax head tells from each other and from background.
    num_processes: cases at a time; 1 starts no process.
    trust: plans of a model that name other classes than networks and layers, and checkpoints that ask for more than
        weights; they can run code.

    Raises TransplantError for whatever a user can mend: unknown datasets, labels, cases or plans, ids that are taken,
    a parent that was not preprocessed, missing files, label maps with undeclared values.
    """
    raw_root, preprocessed_root = nnunet_folder("nnUNet_raw"), nnunet_folder("nnUNet_preprocessed")
    opened = open_cases(dataset)
    parent, parent_json, files = opened.dataset, opened.dataset_json, opened.files
    parsed = [parse_task(task, parent_json["labels"]) for task in tasks]
    _check_ids(parsed, ids, parent)
    labels = [task_labels(task.classes, parent_json["labels"], parent_json.get("regions_class_order"), regions)
              for task in parsed]

    source = _open_source(parent if plans_from is None else plans_from, plans_name, preprocessed_root / parent, trust)
    plans = source.plans
    folders = _data_folders(source, link_images=source.folder == preprocessed_root / parent)
    _check_plans_fit(plans, folders, parent_json, source.name)
    notes = _channel_notes(parent, parent_json, source)

    splits_file = preprocessed_root / parent / "splits_final.json"
    parent_splits = open_splits(parent)
    all_splits = splits = parent_splits or new_splits(list(files))
    chosen, new_split = sorted(files), False
    if cases is not None:
        chosen = choose_cases(cases, list(files), splits)
        splits, new_split = splits_of_cases(splits, chosen)
    else:
        _check_splits(splits, files, splits_file)
    _check_files(files, chosen, folders)

    task_jsons = [_task_json(parent, parent_json, task, task_label, files, chosen)
                  for task, task_label in zip(parsed, labels, strict=True)]
    names = [f"Dataset{dataset_id:03d}_{task.name}" for task, dataset_id in zip(parsed, ids, strict=True)]
    with _targets(names, labels, task_jsons, raw_root, preprocessed_root) as targets:
        for target in targets:
            _write_task_files(target, source, splits, folders)
        # sent to the workers with every case, so without the list of all cases
        light = [replace(target, dataset_json={**target.dataset_json, "dataset": {}}) for target in targets]
        work = partial(make_case, targets=light, folders=folders, plans=plans)
        for_each_case(work, {case: files[case] for case in chosen}, num_processes, progress)
    if parent_splits is None:
        notes.append(f"{parent} had no splits_final.json: made nnU-Net's own five folds"
                     + (f" and wrote them to {splits_file}." if _offer(all_splits, splits_file) else "."))
    if new_split:
        notes.append(f"The chosen cases leave a fold of {parent} without training or validation cases: made a new "
                     f"split of the {len(chosen)} chosen cases, the same for all tasks.")
    notes += [f"{folder.configuration}: the images depend on the labels, or on a preprocessor other than nnU-Net's "
              f"default, and were preprocessed for each task." for folder in folders if not folder.shared]
    identifiers = {folder.identifier for folder in folders}
    configurations = [name for name in plans["configurations"]
                      if _configuration(plans, name).data_identifier in identifiers]
    return TaskSplit([TaskDataset(target.name, target.dataset_json["labels"], chosen, target.final_raw,
                                  target.final_preprocessed) for target in targets], source.plans_name, configurations,
                     notes, source.checkpoint)


def _check_ids(tasks: Sequence[Task], ids: Sequence[int], parent: str) -> None:
    if len(tasks) != len(ids):
        raise TransplantError(f"there are {len(tasks)} tasks but {len(ids)} ids: give one id per task")
    for what, values in (("name", [task.name for task in tasks]), ("id", [str(number) for number in ids])):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise TransplantError(f"several tasks have the same {what}: {listed(twice)}")
    for dataset_id in ids:
        if not 1 <= dataset_id <= 999:
            raise TransplantError(f"the id {dataset_id} is not from 1 to 999")
        if dataset_id == int(parent[7:10]):
            raise TransplantError(f"the id {dataset_id} is that of {parent} itself")
        taken = find_candidate_datasets(dataset_id)
        if len(taken):
            raise TransplantError(f"the id {dataset_id} is taken by {listed(taken)} (in nnUNet_raw, "
                                  f"nnUNet_preprocessed or nnUNet_results). Choose another, or remove that dataset")


def _open_source(given: int | str | Path, plans_name: str | None, parent: Path, trust: bool) -> _Source:
    """parent: the preprocessed folder of the dataset that is split."""
    path = Path(str(given))
    may_be_dataset = re.fullmatch(r"Dataset\d{3}_[^/]+|\d+", str(given))
    if (path / "plans.json").is_file() or (not may_be_dataset and (path.exists() or len(path.parts) > 1)):
        return _model_source(path, plans_name, parent, trust)
    return _dataset_source(dataset_name(str(given), "-plans_from"), plans_name or "nnUNetPlans")


def _dataset_source(name: str, plans_name: str) -> _Source:
    folder = nnunet_folder("nnUNet_preprocessed") / name
    if not (folder / f"{plans_name}.json").is_file():
        planner = "" if plans_name == "nnUNetPlans" else f" -pl PLANNER, with the planner that makes {plans_name}"
        raise TransplantError(f"{name} has no plans {plans_name} in nnUNet_preprocessed. Run: "
                              f"nnUNetv2_plan_and_preprocess -d {int(name[7:10])}{planner}. Or give the trained model "
                              "folder that is to be the base as -plans_from: it has its plans")
    described = folder / "dataset.json"
    return _Source(name, folder, read_json(folder / f"{plans_name}.json"), plans_name, _fingerprint(folder),
                   channel_names(read_json(described)) if described.is_file() else [], None, None)


def _model_source(path: Path, plans_name: str | None, parent: Path, trust: bool) -> _Source:
    use_our_trainers()
    model = open_models(path, trust=trust)[0]
    own = str(model.plans.get("plans_name", "nnUNetPlans"))
    if not re.fullmatch(r"\w[\w.-]*", own):  # it becomes the name of a file
        raise TransplantError(f"the plans of {path} have no usable plans_name: {own[:80]}")
    if plans_name not in (None, own):
        raise TransplantError(f"the plans of {path} are called {own}: leave out -p {plans_name}")
    beside = model.folder / "dataset_fingerprint.json"
    return _Source(str(path), model.folder, model.plans, own, beside if beside.is_file() else _fingerprint(parent),
                   channel_names(model.dataset_json), model.configuration, model.path)


def _fingerprint(preprocessed: Path) -> Path:
    """nnU-Net copies it into every folder of results, so that it must be there."""
    path = preprocessed / "dataset_fingerprint.json"
    if not path.is_file():
        raise TransplantError(f"{preprocessed.name} has no dataset_fingerprint.json in nnUNet_preprocessed. Run: "
                              f"nnUNetv2_extract_fingerprint -d {int(preprocessed.name[7:10])}")
    return path


def _channel_notes(parent: str, parent_json: dict, source: _Source) -> list[str]:
    """Said before anybody trains: a merge refuses models whose channels are called otherwise."""
    own = channel_names(parent_json)
    if not source.channels or same_channels(own, source.channels):
        return []
    return [f"The image channels of {parent} are called {', '.join(own)}, those of {source.name} "
            f"{', '.join(source.channels)}. Models of both merge only with --same_channels: use it if they are the "
            "same."]


def _check_splits(splits: Splits, cases: Mapping[str, dict], path: Path) -> None:
    """A fold of a task with cases that are not there would end its training."""
    unknown = sorted({case for fold in splits for part in fold.values() for case in part} - set(cases))
    if unknown:
        raise TransplantError(f"{path} has {len(unknown)} cases that the dataset does not have: {listed(unknown)}. "
                              "Take them out, or choose cases with -cases")


def _offer(splits: Splits, path: Path) -> bool:
    """Write a dataset's folds where nnU-Net would, so that base and tasks have the same; not where the dataset is not
    preprocessed or belongs to somebody else."""
    if not path.parent.is_dir():
        return False
    try:
        with atomic_path(path) as temporary:
            save_json(splits, str(temporary), sort_keys=False)
    except OSError:
        return False
    return True


def _configuration(plans: dict, name: str) -> ConfigurationManager:
    try:
        return PlansManager(plans).get_configuration(name)
    except Exception as error:  # people write configurations by hand; nnU-Net meets a missing key with any exception
        raise TransplantError(f"nnU-Net cannot read the configuration {name} of the plans "
                              f"({type(error).__name__}: {error})") from error


def _data_folders(source: _Source, link_images: bool) -> list[DataFolder]:
    """A folder for each data identifier that the source has preprocessed; for the configuration of a model.

    If it has none, an error, or when images are not linked: 3d_fullres, or else all configurations."""
    plans = source.plans
    first_with: dict[str, str] = {}  # several configurations may share a folder
    for name in plans["configurations"] if source.configuration is None else [source.configuration]:
        first_with.setdefault(_configuration(plans, name).data_identifier, name)
    found = {identifier: name for identifier, name in first_with.items() if (source.folder / identifier).is_dir()}
    if not found and link_images:
        raise TransplantError(f"{source.name} is planned but not preprocessed. Run: nnUNetv2_preprocess "
                              f"-d {int(source.name[7:10])} -plans_name {source.plans_name}")
    if not found:
        full = {identifier: name for identifier, name in first_with.items() if name == "3d_fullres"}
        found = full or first_with
    folders = []
    for identifier, name in found.items():
        configuration = _configuration(plans, name)
        if configuration.preprocessor_class is None:
            raise TransplantError(f"nnU-Net has no preprocessor {configuration.preprocessor_name}, which the "
                                  f"configuration {name} of {source.name} asks for")
        # normalisation within the mask takes in labelled voxels of intensity 0, so the images depend on the labels
        shared = configuration.preprocessor_class is DefaultPreprocessor and not any(configuration.use_mask_for_norm)
        folders.append(DataFolder(identifier, name, source.folder / identifier if link_images and shared else None,
                                  shared))
    return folders


def _check_plans_fit(plans: dict, folders: Sequence[DataFolder], parent_json: dict, source: str) -> None:
    channels = len(channel_names(parent_json))
    for folder in folders:
        planned = len(_configuration(plans, folder.configuration).normalization_schemes)
        if planned != channels:
            raise TransplantError(f"the plans of {source} are for {planned} image channels, the dataset has "
                                  f"{channels}")
    reader = PlansManager(plans).image_reader_writer_class
    if parent_json["file_ending"].lower() not in reader.supported_file_endings:
        raise TransplantError(f"the plans of {source} read images with {reader.__name__}, which cannot read "
                              f"{parent_json['file_ending']} files")


def _check_files(files: dict[str, dict], cases: Sequence[str], folders: Sequence[DataFolder]) -> None:
    """Every file that is read or linked is there: the parent's images, label maps and preprocessed images."""
    missing = [file for case in cases for file in (*files[case]["images"], files[case]["label"])
               if not Path(file).is_file()]
    if missing:
        raise TransplantError(f"{len(missing)} image or label files are missing: {listed(missing)}")
    for folder in folders:
        if folder.parent is None:
            continue
        again = (f"Run nnUNetv2_preprocess for {folder.parent.parent.name} again, with -c {folder.configuration} and "
                 f"these plans.")
        if any(folder.parent.glob("*.npz")):
            raise TransplantError(f"{folder.parent} holds data in nnU-Net's old npz format. {again}")
        unprocessed = [case for case in cases if not (folder.parent / f"{case}.b2nd").is_file()]
        if unprocessed:
            raise TransplantError(f"{len(unprocessed)} cases are missing in {folder.parent}: {listed(unprocessed)}. "
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
             preprocessed_root: Path) -> Iterator[list[TaskFolders]]:
    """Hidden folders beside the final ones, which nnU-Net does not take for datasets. Renamed when all is done, removed
    on any error or interruption, the ones already renamed too."""
    token = uuid4().hex[:8]
    targets = [TaskFolders(name, task_label.value_map, task_json, raw_root / f".tmp_{name}_{token}",
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


def _write_task_files(target: TaskFolders, source: _Source, splits: Splits, folders: Sequence[DataFolder]) -> None:
    for folder in (target.raw / "labelsTr", target.preprocessed / "gt_segmentations",
                   *(target.preprocessed / folder.identifier for folder in folders)):
        folder.mkdir(parents=True)
    for folder in (target.raw, target.preprocessed):
        save_json(target.dataset_json, str(folder / "dataset.json"), sort_keys=False)
    # the trainer takes its folders from the plans' dataset_name
    save_json({**source.plans, "dataset_name": target.name}, str(target.preprocessed / f"{source.plans_name}.json"),
              sort_keys=False)
    save_json(splits, str(target.preprocessed / "splits_final.json"), sort_keys=False)
    shutil.copyfile(source.fingerprint, target.preprocessed / "dataset_fingerprint.json")
