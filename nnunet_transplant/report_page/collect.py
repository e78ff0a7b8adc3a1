"""All that a page shows, read from the folders into plain data. Nothing here knows of HTML."""
import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nnunet_transplant.checkpoint import read as read_checkpoint
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.evaluation import CSV, DICE_FIGURE, OVERLAYS_FIGURE, TABLE
from nnunet_transplant.files import MOST_TEXT, file_sha256
from nnunet_transplant.heads import origin
from nnunet_transplant.labels import channel_names, check_dataset_json, foreground_values
from nnunet_transplant.model_folder import CHECKPOINT, model_labels, read_json
from nnunet_transplant.report_page.analyses import ANALYSES, Analysis
from nnunet_transplant.report_page.facts import Fact, fact, in_words
from nnunet_transplant.report_page.record import Record, read_record
from nnunet_transplant.tables import structure_means
from nnunet_transplant.task_vector import RECORD

_WIDE = 24  # characters of a model's name that would make a column too wide
_EVALUATION_FIGURES = {
    DICE_FIGURE: "bars of the mean Dice of each structure, models side by side, every case a dot; the means are "
                 "those of the table above",
    OVERLAYS_FIGURE: "the best, the median and the worst case: the image, the truth, and what each model predicts, "
                     "with the outline of the truth over it"}


@dataclass(frozen=True)
class Figure:
    """A PNG to put into the page. Its size is given, so that nothing moves while the page loads."""
    base64: str
    width: int
    height: int
    text: str  # for who cannot see it


@dataclass(frozen=True)
class Structure:
    name: str
    values: str
    parts: str   # what it consists of
    source: str  # what it was merged from


@dataclass(frozen=True)
class Model:
    facts: list[Fact]
    structures: list[Structure]
    parent: str  # the dataset whose labels the structures consist of, "" where none is known


@dataclass(frozen=True)
class Score:
    dice: str
    best: bool


@dataclass(frozen=True)
class Evaluation:
    folder: str
    heading: str
    models: list[str]
    numbered: bool  # the names are too long for a table
    scores: list[tuple[str, list[Score]]]  # of each structure, by each model
    notes: list[str]
    figures: list[Figure]


@dataclass(frozen=True)
class Result:
    """What an analysis gave."""
    analysis: Analysis
    folder: str
    table: str
    figures: list[Figure]
    files: list[str]  # what else is in the folder


@dataclass(frozen=True)
class Report:
    name: str
    record: Record
    model: Model
    evaluations: list[Evaluation]
    results: list[Result]


def collect(folder: Path, evaluations: Sequence[Path], analyses: Mapping[str, Path]) -> Report:
    """Raises TransplantError for all that `write_report` does, apart from its output."""
    try:
        record = read_record(folder)
        model = _model(folder, record)
    except TransplantError:  # a ValueError too
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TransplantError(f"{folder / 'merge.json'} is not the record of a merge") from error
    return Report(model_labels([folder])[0], record, model, [_evaluation(path) for path in evaluations],
                  [_result(ANALYSES[kind], path) for kind, path in analyses.items()])


def _model(folder: Path, record: Record) -> Model:
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    check_dataset_json(dataset_json, str(folder / "dataset.json"), RECORD)
    files = {name: folder / name for name in (f"fold_{fold.name}/{CHECKPOINT}" for fold in record.folds)}
    for name, path in files.items():
        if not path.is_file():
            raise TransplantError(f"{folder} is not complete: it has no {name}")
    content = read_checkpoint(next(iter(files.values())))
    axes = content["inference_allowed_mirroring_axes"]
    facts = [fact("configuration", content["init_args"]["configuration"]), fact("plans", plans.get("plans_name", "")),
             fact("dataset of the plans", plans.get("dataset_name", "")), fact("trainer", content["trainer_name"]),
             fact("channels", [f"{i}: {name}" for i, name in enumerate(channel_names(dataset_json))]),
             fact("test-time mirroring", "none" if not axes else "axes " + ", ".join(map(str, axes))),
             *(Fact(f"SHA-256 of {name}", file_sha256(path), digest=True) for name, path in files.items())]
    notes = dataset_json.get(RECORD, {})
    sources = notes.get("sources", {}) if isinstance(notes.get("sources", {}), dict) else {}
    structures = [Structure(name, in_words(values), in_words(origin(dataset_json, name)),
                            in_words(sources.get(name, "")))
                  for name, values in foreground_values(dataset_json["labels"]).items()]
    return Model(facts, structures, notes.get("parent", ""))


def _evaluation(folder: Path) -> Evaluation:
    """The mean Dice, the notes and the figures of an evaluation."""
    frame, lines = read_scores(folder), _read_text(folder / TABLE).splitlines()
    models = list(frame["model"].unique())
    return Evaluation(
        folder=folder.name, heading=lines[0] if lines else folder.name, models=models,
        numbered=max(map(len, models)) > _WIDE,
        scores=[(structure, _scores(means, models)) for structure, means in structure_means(frame).items()],
        notes=[line.removeprefix("note: ") for line in lines if line.startswith("note: ")],
        figures=[_figure(folder / file, f"{folder.name}, {file}: {shows}")
                 for file, shows in _EVALUATION_FIGURES.items() if (folder / file).is_file()])


def read_scores(folder: Path) -> pd.DataFrame:
    """An evaluation.csv as `evaluate` returned it. Raises TransplantError where it is missing or something else."""
    if not (folder / CSV).is_file():
        raise TransplantError(f"{folder} is not an evaluation: it has no {CSV}")
    try:
        frame = pd.read_csv(folder / CSV, dtype={"model": str, "structure": str, "case": str, "dice": float},
                            keep_default_na=False, na_values={"dice": [""]})
    except ValueError as error:  # pandas' own errors are too
        raise TransplantError(f"{folder / CSV} is not as nnunet_transplant_evaluate writes it") from error
    if list(frame.columns) != ["model", "structure", "case", "dice"] or frame.empty:
        raise TransplantError(f"{folder / CSV} is not as nnunet_transplant_evaluate writes it")
    return frame


def _scores(of_structure: Mapping[str, float], models: Sequence[str]) -> list[Score]:
    """- where a model has no Dice. The best is one among several models, as far as the digits shown tell them apart."""
    digits = {model: f"{dice:.4f}" for model, dice in of_structure.items()}
    best = max((dice for dice in digits.values() if dice != "nan"), default="")
    return [Score(digits.get(model, "-"), best=len(models) > 1 and digits.get(model) == best) for model in models]


def _result(analysis: Analysis, folder: Path) -> Result:
    """Whatever such a folder holds: table.txt and every .png."""
    if not folder.is_dir():
        raise TransplantError(f"there is no folder {folder}")
    table, figures = _read_text(folder / TABLE).strip("\n"), sorted(folder.glob("*.png"))
    if not table and not figures:
        raise TransplantError(f"{folder} holds nothing to show: neither a {TABLE} nor a .png")
    return Result(analysis, folder.name, table,
                  [_figure(path, f"{folder.name}, {path.name}: {analysis.shows}") for path in figures],
                  sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".csv")))


def _read_text(path: Path) -> str:
    """"" where there is no such file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(MOST_TEXT).decode("utf-8", errors="replace")


def _figure(path: Path, text: str) -> Figure:
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise TransplantError(f"{path} is not a PNG image")
    width, height = (int.from_bytes(data[start:start + 4], "big") for start in (16, 20))
    return Figure(base64.b64encode(data).decode("ascii"), width, height, text)
