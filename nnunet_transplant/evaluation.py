"""Dice per structure of trained models on a dataset's cases: nnU-Net's predictions and metrics, structures matched by
name.

A model of one task, a merged model and the model of the whole dataset number their labels differently. They are scored
against the same reference: the dataset's own labels, found by what each structure says it consists of.
"""
import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.evaluation.evaluate_predictions import (
    compute_tp_fp_fn_tn,
    label_or_region_to_key,
    region_or_label_to_mask,
    save_summary_json,
)
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_transplant.data.cases import Cases, evaluation_cases
from nnunet_transplant.data.images import check_images
from nnunet_transplant.device import AUTO, threads_of_nnunet, torch_device
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError, out_of_memory
from nnunet_transplant.figures.evaluation import Overlay, save_dice_figure, save_overlays_figure, slice_to_show
from nnunet_transplant.files import atomic_path, check_output
from nnunet_transplant.mergeable import preprocessing_fields
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, model_labels, open_models
from nnunet_transplant.parallel import ahead
from nnunet_transplant.prediction import WatchedPredictor, overflow_explained, predictor
from nnunet_transplant.tables import cases_table, mean_without_nan, means_table, structure_means
from nnunet_transplant.targets import Key, Target, name_targets

CSV, TABLE, SUMMARY, PREDICTIONS = "evaluation.csv", "table.txt", "summary.json", "predictions"
DICE_FIGURE, OVERLAYS_FIGURE = "dice.png", "overlays.png"
EXPORTERS = 3  # cases that are exported and scored at the same time, as nnUNetv2_predict exports
PER_CASE = "\nDice per case\n"  # the line of table.txt below which every case has its rows


@dataclass(frozen=True)
class _Contender:
    """A model in the evaluation: its folds, what of it is scored, and nnU-Net's predictor for it."""
    label: str
    folds: list[TrainedModel]
    targets: list[Target]
    predictor: nnUNetPredictor


def evaluate(models: Sequence[Path | str], dataset: str | int, fold: str | int = "0", *, output: Path | str,
             cases: str | None = None, n_cases: int | None = None, checkpoint_name: str = CHECKPOINT,
             device: str = AUTO, step_size: float = 0.5, mirroring: bool = True, trust: bool = False,
             overwrite: bool = False, progress: bool = False) -> pd.DataFrame:
    """Predict a dataset's cases with each model, score every structure by name, and write it all to a folder.

    models: trained model folders (several folds are nnU-Net's ensemble) or checkpoints inside them.
    dataset: name or id of a dataset in nnUNet_raw; its labels are the reference.
    fold: the validation cases of this fold in the dataset's splits_final.json, or "all" for all its training cases.
    cases, n_cases: those of `cases` instead (FILE, train:K, val:K); and so many of them, spread evenly.
    output: gets, for each model, predictions/ and nnU-Net's summary.json, and for all evaluation.csv, table.txt,
        dice.png and overlays.png; it appears whole or not at all. overwrite replaces an earlier evaluation.
    device, step_size (of the sliding window, in patches), mirroring: as nnUNetv2_predict has them.
    trust: load checkpoints that ask for more than weights; they can run code.

    Returns a row for each model, structure and case, as in evaluation.csv: columns model, structure, case, dice.
    dice is NaN where neither reference nor prediction has the structure, so that means leave such cases out.
    Raises TransplantError for what a user can mend: unknown dataset, fold, model or device, missing files, channels or
    structures that do not fit the dataset, label maps of another shape than their images, an existing output.
    """
    if not 0 < step_size <= 1:
        raise TransplantError(f"-step_size must be above 0 and at most 1, not {step_size:g}")
    output = Path(os.path.abspath(output))
    check_output(output, models, overwrite, CSV, "an earlier evaluation")
    found = evaluation_cases(dataset, fold, cases, n_cases)
    target_device = torch_device(device)
    threads_of_nnunet(target_device)
    use_our_trainers()
    labels = model_labels(models, (CSV, TABLE, DICE_FIGURE, OVERLAYS_FIGURE))
    groups = [open_models(Path(path), None, checkpoint_name, trust) for path in models]
    targets_of, notes = name_targets(labels, groups, found)
    checked: list[dict[str, Any]] = []
    for label, folds in zip(labels, groups, strict=True):
        if (how := _how_preprocessed(folds[0])) not in checked:  # the images are asked once for all that read alike
            _check_input(label, folds[0], found)
            checked.append(how)
    kind = WatchedPredictor if progress else nnUNetPredictor
    contenders = [_Contender(label, folds, targets, predictor(folds, target_device, step_size, mirroring,
                                                              progress_bar=False, kind=kind))
                  for label, folds, targets in zip(labels, groups, targets_of, strict=True)]
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        scores = _predict_and_score(contenders, found, folder, output, progress)
        for contender in contenders:
            write_summary(scores[contender.label], contender.targets, folder / contender.label / SUMMARY)
        frame = _frame(contenders, scores, found)
        frame.to_csv(folder / CSV, index=False)
        of_fold = f"cases {cases}" if cases is not None else "all cases" if str(fold) == "all" else f"fold {fold}"
        title = f"Dice on {found.dataset}, {of_fold} ({len(found.files)} case{'s' * (len(found.files) > 1)})"
        (folder / TABLE).write_text("\n".join([title, "", means_table(frame), *notes]) + "\n" + PER_CASE + "\n"
                                    + cases_table(frame) + "\n", encoding="utf-8")
        _draw_dice(frame, title, folder / DICE_FIGURE)
        _draw_overlays(contenders, found, frame, folder)
    return frame


# ---------------------------------------------------------------------------------------------------------------------
# Which cases, which models

def _check_input(label: str, model: TrainedModel, cases: Cases) -> None:
    """Raise TransplantError unless the model can read the dataset's images and has as many channels."""
    if PlansManager(model.plans).get_configuration(model.configuration).previous_stage_name is not None:
        raise TransplantError(f"{label} is the second stage of a cascade: it cannot be evaluated from images alone")
    check_images({case: files["images"] for case, files in cases.files.items()}, cases.dataset_json["file_ending"],
                 cases.dataset, label, model.plans, model.dataset_json)


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and scores

def score(reference: np.ndarray, prediction: np.ndarray, targets: Sequence[Target],
          ignore: int | None = None) -> dict[Key, dict[str, float]]:
    """nnU-Net's metrics of each target by its key, for label maps of the same shape.

    Voxels that the reference marks with the ignore label do not count. Dice = 2 TP / (2 TP + FP + FN) and
    IoU = TP / (TP + FP + FN) are NaN where the structure is neither in the reference nor in the prediction.
    Raises TransplantError for label maps of different shapes.
    """
    if reference.shape != prediction.shape:
        raise TransplantError(f"the reference has the shape {reference.shape}, the prediction (and the image) "
                              f"{prediction.shape}")
    ignored = None if ignore is None else reference == ignore
    metrics = {}
    for target in targets:
        tp, fp, fn, tn = (int(count) for count in compute_tp_fp_fn_tn(
            region_or_label_to_mask(reference, target.reference),
            region_or_label_to_mask(prediction, target.prediction), ignored))
        there = tp + fp + fn > 0
        metrics[target.key] = {"Dice": 2 * tp / (2 * tp + fp + fn) if there else np.nan,
                               "IoU": tp / (tp + fp + fn) if there else np.nan,
                               "FP": fp, "TP": tp, "FN": fn, "TN": tn, "n_pred": fp + tp, "n_ref": fn + tp}
    return metrics


def _predict_and_score(contenders: Sequence[_Contender], cases: Cases, folder: Path, output: Path,
                       progress: bool) -> dict[str, list[dict[str, Any]]]:
    """For each model nnU-Net's metric_per_case, in the order of the cases. Predictions are written to folder, which is
    going to be output.

    The next case is read, and the last ones are exported and scored, while a network predicts. On threads: most of that
    is resampling, which leaves Python to others, and nnU-Net's processes take longer to start than a few small cases to
    predict. Case by case, so that models with the same preprocessing share it.
    """
    scores: dict[str, list[dict[str, Any]]] = {contender.label: [] for contender in contenders}
    for contender in contenders:
        (folder / contender.label / PREDICTIONS).mkdir(parents=True)
    export = partial(_export_and_score, cases, folder, output)
    exporters = min(EXPORTERS, os.cpu_count() or 1)
    # closing: whatever ends this, nothing else is begun, and it waits for what a thread still writes to the folder
    with (_silence(), tqdm(total=len(cases.files) * len(contenders), unit="prediction", disable=not progress) as bar,
          contextlib.closing(ahead(_read, _readings(contenders, cases), workers=1)) as given,
          contextlib.closing(ahead(export, _predictions(given, bar), exporters)) as scored):
        for label, entry in scored:
            scores[label].append(entry)
            bar.update()
    empty_cache(contenders[0].predictor.device)
    return scores


class _Reading(NamedTuple):
    """A case to read for models that see it in the same way."""
    case: str
    files: Mapping[str, Any]
    contenders: list[_Contender]


class _Input(NamedTuple):
    """A case as models get it."""
    what: _Reading
    image: np.ndarray           # preprocessed, (channels, z, y, x)
    properties: dict[str, Any]  # what nnU-Net needs to undo the preprocessing
    reference: np.ndarray       # the label map as the models' reader reads it, (1, z, y, x) of the raw image


class _Prediction(NamedTuple):
    """What a model says of a case."""
    given: _Input
    contender: _Contender
    logits: torch.Tensor  # (outputs, z, y, x) of the preprocessed image


def _readings(contenders: Sequence[_Contender], cases: Cases) -> Iterator[_Reading]:
    alike: list[tuple[dict[str, Any], list[_Contender]]] = []
    for contender in contenders:
        how = _how_preprocessed(contender.folds[0])
        group = next((group for other, group in alike if other == how), [])
        if not group:
            alike.append((how, group))
        group.append(contender)
    for case, files in cases.files.items():
        for _, group in alike:
            yield _Reading(case, files, group)


def _how_preprocessed(model: TrainedModel) -> dict[str, Any]:
    """Models for which this is equal see a case in the same way, and undo the preprocessing in the same way."""
    return preprocessing_fields(model, channels=False)


def _read(what: _Reading) -> _Input:
    first = what.contenders[0]
    nnunet = first.predictor
    preprocessor = nnunet.configuration_manager.preprocessor_class(verbose=False)
    with _explained(f"read and preprocess case {what.case} for {first.label}"):
        reference = nnunet.plans_manager.image_reader_writer_class().read_seg(what.files["label"])[0]
        image, _, properties = preprocessor.run_case(list(what.files["images"]), None, nnunet.plans_manager,
                                                     nnunet.configuration_manager, nnunet.dataset_json)
    return _Input(what, image, properties, reference)


def _predictions(inputs: Iterable[_Input], bar: tqdm) -> Iterator[_Prediction]:
    for given in inputs:
        for contender in given.what.contenders:
            bar.set_postfix_str(f"{contender.label} {given.what.case}")
            yield _Prediction(given, contender, _predict(contender, given.image))  # no name keeps the logits in memory


def _predict(contender: _Contender, image: np.ndarray) -> torch.Tensor:
    with overflow_explained():
        return contender.predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image)).cpu()


def _export_and_score(cases: Cases, folder: Path, output: Path, prediction: _Prediction) -> tuple[str, dict[str, Any]]:
    """The model's label, and the case's entry in its metric_per_case."""
    given, contender, _ = prediction
    case, files, _ = given.what
    name = Path(contender.label) / PREDICTIONS / f"{case}{cases.dataset_json['file_ending']}"
    with _explained(f"write what {contender.label} says of case {case}"):
        label_map = _export(prediction, cases.dataset_json["file_ending"], folder / name)
    try:
        metrics = score(given.reference, label_map, contender.targets, cases.dataset_json["labels"].get("ignore"))
    except TransplantError as error:
        raise TransplantError(f"case {case} of {cases.dataset}: {error}") from error
    return contender.label, {"reference_file": str(files["label"]), "prediction_file": str(output / name),
                             "metrics": metrics}


def _export(prediction: _Prediction, ending: str, path: Path) -> np.ndarray:
    """Write the label map to path as nnUNetPredictor does, and read it as it is there."""
    nnunet = prediction.contender.predictor
    export_prediction_from_logits(
        prediction.logits, prediction.given.properties, nnunet.configuration_manager, nnunet.plans_manager,
        nnunet.dataset_json | {"file_ending": ending}, str(path).removesuffix(ending),
        num_threads_torch=min(default_num_processes, os.cpu_count() or 1))  # of this thread: a network keeps its own
    return nnunet.plans_manager.image_reader_writer_class().read_seg(str(path))[0]


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """nnU-Net's readers, resampling and writers meet unfit images and full disks with any exception: say it in one
    line. Memory that ran out is said elsewhere."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        raise TransplantError(f"nnU-Net cannot {what} ({type(error).__name__}: {' '.join(str(error).split())})"
                              ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what nnU-Net prints, on any thread."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# What is written

def write_summary(per_case: Sequence[dict[str, Any]], targets: Sequence[Target], path: Path) -> None:
    """nnU-Net's summary.json of one model, and an entry of our own: "structures", the model's structure -> its key.

    per_case: reference_file, prediction_file and metrics (see `score`) of each case.
    """
    means = {target.key: {metric: mean_without_nan(entry["metrics"][target.key][metric] for entry in per_case)
                          for metric in per_case[0]["metrics"][target.key]} for target in targets}
    foreground = {metric: float(np.mean([mean[metric] for mean in means.values()])) for metric in means[targets[0].key]}
    save_summary_json({"metric_per_case": list(per_case), "mean": means, "foreground_mean": foreground,
                       "structures": {target.structure: label_or_region_to_key(target.key) for target in targets}},
                      str(path))


def _frame(contenders: Sequence[_Contender], scores: dict[str, list[dict[str, Any]]], cases: Cases) -> pd.DataFrame:
    rows = [(contender.label, target.row, case, entry["metrics"][target.key]["Dice"])
            for contender in contenders for target in contender.targets
            for case, entry in zip(cases.files, scores[contender.label], strict=True)]
    return pd.DataFrame(rows, columns=["model", "structure", "case", "dice"])


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn

def _draw_dice(frame: pd.DataFrame, title: str, path: Path) -> None:
    """Bars of what `means_table` holds, with the cases."""
    dice = {where: values.tolist() for where, values in frame.groupby(["structure", "model"], sort=False)["dice"]}
    rows = list(frame["structure"].unique())
    *_, (last, means) = structure_means(frame).items()
    if last not in (*rows, "mean of 1"):  # the mean of one is that one
        rows.append(last)
        dice |= {(last, model): [mean] for model, mean in means.items()}
    save_dice_figure(dice, rows, list(frame["model"].unique()), title, path)


def shown_cases(dice: Mapping[str, float]) -> dict[str, str]:
    """Which cases to look at, by their Dice: "best", "median" and "worst" -> case, each case once.

    The median of an even number of cases is the worse one in the middle; of equal cases the first counts as worse. NaN
    counts for nothing; where there is nothing else it is the "first" case.
    """
    ranked = sorted((case for case in dice if not np.isnan(dice[case])), key=lambda case: dice[case])
    if not ranked:
        return {"first": next(iter(dice))}
    chosen = {"best": ranked[-1], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[0]}
    if len(ranked) == 2:
        del chosen["median"]
    return chosen if len(ranked) > 1 else {"only": ranked[0]}


def _draw_overlays(contenders: Sequence[_Contender], cases: Cases, frame: pd.DataFrame, folder: Path) -> None:
    """The best, median and worst case of the first merged model (of the first model, where none is merged), with what
    every model says of them."""
    leading = next((each for each in contenders if (each.folds[0].folder / "merge.json").is_file()), contenders[0])
    # a case's Dice by one model: the mean over its structures, without NaN
    means = frame.groupby(["model", "case"])["dice"].mean()
    chosen = shown_cases({case: means[leading.label, case] for case in cases.files})
    with _silence():
        overlays = [_overlay(f"{which}: {case}", case, contenders, leading, cases, means, folder)
                    for which, case in chosen.items()]
    save_overlays_figure(overlays, list(frame["structure"].unique()),
                         f"Cases by the mean Dice of {leading.label}", folder / OVERLAYS_FIGURE)


def _overlay(title: str, case: str, contenders: Sequence[_Contender], leading: _Contender, cases: Cases,
             means: Mapping[tuple[str, str], float], folder: Path) -> Overlay:
    """The slice with most structure in the truth (where it has none, in what the leading model says). Everything is
    read by one model's reader, to lie on one grid, and one volume at a time, as they may be big."""
    reader = PlansManager(leading.folds[0].plans).image_reader_writer_class()
    files, ending = cases.files[case], cases.dataset_json["file_ending"]

    def predicted(contender: _Contender) -> np.ndarray:
        return reader.read_seg(str(folder / contender.label / PREDICTIONS / f"{case}{ending}"))[0][0]

    truth = reader.read_seg(files["label"])[0][0]
    image, properties = reader.read_images(list(files["images"])[:1])
    spacing = np.array(properties["spacing"], dtype=float)
    axis = int(np.argmax(np.round(spacing / spacing.min(), 1)))  # the coarsest: slices as the image was taken
    structures = {target.row: target.reference for contender in contenders for target in contender.targets}
    areas = _areas(truth, structures.values(), axis)
    if not areas.any():
        areas = _areas(predicted(leading), [target.prediction for target in leading.targets], axis)
    index = slice_to_show(areas)

    def plane(volume: np.ndarray) -> np.ndarray:
        return np.take(volume, index, axis)[::-1 if axis else 1]  # but for axial slices, rows run from foot to head

    panels = [("truth", {row: region_or_label_to_mask(plane(truth), values) for row, values in structures.items()})]
    for contender in contenders:
        said, dice = plane(predicted(contender)), means[contender.label, case]
        panels.append((f"{contender.label}\n" + ("no Dice" if np.isnan(dice) else f"Dice {dice:.3f}"),
                       {target.row: region_or_label_to_mask(said, target.prediction) for target in contender.targets}))
    rows, columns = np.delete(spacing, axis)
    return Overlay(title, plane(image[0]), (rows, columns), panels)


def _areas(volume: np.ndarray, structures: Iterable[tuple[int, ...]], axis: int) -> np.ndarray:
    """(structures, slices): voxels of each in each."""
    others = tuple(other for other in range(3) if other != axis)
    return np.stack([region_or_label_to_mask(volume, values).sum(others) for values in structures])
