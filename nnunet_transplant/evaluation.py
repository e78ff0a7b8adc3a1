"""Dice per structure of trained models on a dataset's cases: nnU-Net's predictions and metrics, structures matched by
name.

A model of one task, a merged model and the model of the whole dataset number their labels differently. They are scored
against the same reference: the dataset's own labels, found by what each structure says it consists of.
"""
import contextlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import (
    compute_tp_fp_fn_tn,
    label_or_region_to_key,
    region_or_label_to_mask,
    save_summary_json,
)
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunet_transplant.checkpoint import atomic_path
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import origin
from nnunet_transplant.labels import foreground_values, has_regions
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, open_models, preprocessing_fields
from nnunet_transplant.prediction import overflow_explained, predictor, torch_device

Key = int | tuple[int, ...]  # a label or a region of the dataset, as nnU-Net's summary.json names it

CSV, TABLE, SUMMARY, PREDICTIONS = "evaluation.csv", "table.txt", "summary.json", "predictions"
PER_CASE = "\nDice per case\n"  # the line of table.txt below which every case has its rows
_TERMINAL = 120  # characters; wider tables number the models


@dataclass(frozen=True)
class Cases:
    """The labelled cases of a raw dataset that models are scored on."""
    dataset: str
    dataset_json: dict[str, Any]
    files: dict[str, dict[str, Any]]  # case -> {"images": one path for each channel, "label": path}


class Target(NamedTuple):
    """A structure of a model and what it is scored against."""
    structure: str
    key: Key                     # identifies the structure in summary.json; no two of one model share it
    reference: tuple[int, ...]   # its values in the dataset's label maps
    prediction: tuple[int, ...]  # its values in the model's label maps
    row: str                     # its name in tables: the dataset's own where it has one


@dataclass(frozen=True)
class _Contender:
    """A model in the evaluation: its folds, what of it is scored, and nnU-Net's predictor for it."""
    label: str
    folds: list[TrainedModel]
    targets: list[Target]
    predictor: nnUNetPredictor


def evaluate(models: Sequence[Path], dataset: str | int, fold: str | int = "0", *, output: Path,
             checkpoint_name: str = CHECKPOINT, device: str = "cuda", step_size: float = 0.5, mirroring: bool = True,
             trust: bool = False, overwrite: bool = False, progress: bool = False) -> pd.DataFrame:
    """Predict a dataset's cases with each model, score every structure by name, and write it all to a folder.

    models: trained model folders (several folds are nnU-Net's ensemble) or checkpoints inside them.
    dataset: name or id of a dataset in nnUNet_raw; its labels are the reference.
    fold: the validation cases of this fold in the dataset's splits_final.json, or "all" for all its training cases.
    output: gets, for each model, predictions/ and nnU-Net's summary.json, and for all evaluation.csv and table.txt; it
        appears whole or not at all. overwrite replaces an earlier evaluation.
    device, step_size (of the sliding window, in patches), mirroring: as nnUNetv2_predict has them.

    Returns a row for each model, structure and case, as in evaluation.csv: columns model, structure, case, dice.
    dice is NaN where neither reference nor prediction has the structure, so that means leave such cases out.
    Raises TransplantError for what a user can mend: unknown dataset, fold, model or device, missing files, channels or
    structures that do not fit the dataset, label maps of another shape than their images, an existing output.
    """
    if not 0 < step_size <= 1:
        raise TransplantError(f"-step_size must be above 0 and at most 1, not {step_size:g}")
    output = Path(os.path.abspath(output))
    check_output(output, models, overwrite)
    cases = find_cases(dataset, fold)
    torch_device_ = torch_device(device)
    use_our_trainers()
    labels = model_labels(models)
    groups = [open_models(Path(path), None, checkpoint_name, trust) for path in models]
    targets_of, notes = name_targets(labels, groups, cases)
    for label, folds in zip(labels, groups, strict=True):
        _check_input(label, folds[0], cases)
    contenders = [_Contender(label, folds, targets, predictor(folds, torch_device_, step_size, mirroring,
                                                              progress_bar=False))
                  for label, folds, targets in zip(labels, groups, targets_of, strict=True)]
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        scores = _predict_and_score(contenders, cases, folder, output, progress)
        for contender in contenders:
            write_summary(scores[contender.label], contender.targets, folder / contender.label / SUMMARY)
        frame = _frame(contenders, scores, cases)
        frame.to_csv(folder / CSV, index=False)
        of_fold = "all cases" if str(fold) == "all" else f"fold {fold}"
        title = f"Dice on {cases.dataset}, {of_fold} ({len(cases.files)} case{'s' * (len(cases.files) > 1)})"
        (folder / TABLE).write_text("\n".join([title, "", means_table(frame), *notes]) + "\n" + PER_CASE + "\n"
                                    + cases_table(frame) + "\n", encoding="utf-8")
    return frame


def check_output(output: Path, models: Sequence[Path], overwrite: bool) -> None:
    """Raise TransplantError unless an evaluation may be written here."""
    if any(output.resolve() in (Path(path).resolve(), *Path(path).resolve().parents) for path in models):
        raise TransplantError(f"{output} is one of the models, or holds one: give another -o")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise TransplantError(f"{output} exists already; give another -o, or --overwrite to replace it")
    if not (output / CSV).is_file():
        raise TransplantError(f"{output} is not an earlier evaluation (it has no {CSV}): --overwrite replaces nothing "
                              "else")


# ---------------------------------------------------------------------------------------------------------------------
# Which cases, which models

def find_cases(dataset: str | int, fold: str | int) -> Cases:
    """The validation cases of a fold, or with fold "all" every case of imagesTr. Raises TransplantError where the
    dataset, the fold or a file is not there."""
    raw = _folder("nnUNet_raw")
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        what = str(error).partition(". ")[0].partition("\n")[0]
        raise TransplantError(f"-d {dataset}: {what} (give a name such as Dataset004_Hippocampus or its id)") from error
    if not (raw / name / "dataset.json").is_file():
        raise TransplantError(f"-d {dataset}: nnUNet_raw has no dataset {name} ({raw / name / 'dataset.json'} is "
                              "missing); images and labels are read from there")
    dataset_json = load_json(str(raw / name / "dataset.json"))
    if "dataset" not in dataset_json and not (raw / name / "imagesTr").is_dir():
        raise TransplantError(f"{raw / name} has no imagesTr")
    files = get_filenames_of_train_images_and_targets(str(raw / name), dict(dataset_json))
    files = {str(case): dict(entry) for case, entry in files.items()}
    chosen = sorted(files) if str(fold) == "all" else _validation_cases(name, fold)
    if not chosen:
        raise TransplantError(f"there is no case to evaluate: {name} has none in fold {fold}")
    for case in chosen:
        if case not in files:
            raise TransplantError(f"case {case} of fold {fold} has no images in {raw / name}")
        missing = [path for path in (*files[case]["images"], files[case]["label"]) if not Path(path).is_file()]
        if missing:
            raise TransplantError(f"case {case} of {name}: there is no file {missing[0]}")
    return Cases(name, dataset_json, {case: files[case] for case in chosen})


def _folder(variable: str) -> Path:
    if not os.environ.get(variable):
        raise TransplantError(f"the environment variable {variable} is not set (see nnU-Net's setting_up_paths.md)")
    return Path(os.path.abspath(os.environ[variable]))


def _validation_cases(dataset: str, fold: str | int) -> list[str]:
    if not str(fold).isdecimal():
        raise TransplantError(f"-f must be the number of a fold or all, not {fold}")
    splits_file = _folder("nnUNet_preprocessed") / dataset / "splits_final.json"
    if not splits_file.is_file():
        raise TransplantError(f"fold {fold} is unknown, there is no {splits_file}: nnU-Net writes it when the first "
                              "fold is trained. Use -f all for all cases")
    splits = load_json(str(splits_file))
    if int(fold) >= len(splits):
        raise TransplantError(f"{dataset} has no fold {fold}: its splits_final.json holds folds 0 to {len(splits) - 1}")
    return [str(case) for case in splits[int(fold)]["val"]]


def model_labels(models: Iterable[Path]) -> list[str]:
    """A short, unique name for each model, which is also its folder in the output.

    .../Dataset901_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres gives Dataset901_Liver__nnUNetTrainer, any other folder
    its own name. A checkpoint adds its fold: it is evaluated alone. Equal names get _2, _3, ...
    """
    labels: list[str] = []
    for model in models:
        path = Path(os.path.abspath(model))
        folder = path.parent.parent if path.is_file() else path
        label = folder.name
        if folder.parent.name.startswith("Dataset") and label.count("__") == 2:
            label = f"{folder.parent.name}__{label.partition('__')[0]}"
        if path.is_file():
            label += f"__{path.parent.name}"
        taken = {other.lower() for other in (*labels, CSV, TABLE)}  # some file systems ignore case
        candidates = (label, *(f"{label}_{i}" for i in range(2, len(taken) + 3)))
        labels.append(next(candidate for candidate in candidates if candidate.lower() not in taken))
    return labels


def _check_input(label: str, model: TrainedModel, cases: Cases) -> None:
    """Raise TransplantError unless the model can take the dataset's images."""
    plans = model.labels and _manager(model)
    channels = len(model.dataset_json.get("channel_names", model.dataset_json.get("modality", {})))
    for case, files in cases.files.items():
        if len(files["images"]) != channels:
            raise TransplantError(f"{label} takes {channels} channel{'s' * (channels > 1)}, but case {case} of "
                                  f"{cases.dataset} has {len(files['images'])}")
    return plans
