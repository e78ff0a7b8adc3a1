"""One HTML page about a merged model: what was merged and how, what it scores, and what the analyses say of it.

The page stands alone: no script, nothing loaded from elsewhere, the figures inside. It can be mailed, archived beside
the model, read on a phone and printed. The same inputs give the same page.
"""
import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_transplant.checkpoint import read as read_checkpoint
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.evaluation import CSV, DICE_FIGURE, OVERLAYS_FIGURE, TABLE
from nnunet_transplant.files import MOST_TEXT, atomic_path, file_sha256
from nnunet_transplant.heads import origin
from nnunet_transplant.labels import channel_names, check_dataset_json, foreground_values
from nnunet_transplant.merging import METHODS
from nnunet_transplant.model_folder import CHECKPOINT, model_labels, read_json
from nnunet_transplant.tables import structure_means
from nnunet_transplant.task_vector import RECORD

GENERATOR = "nnunet_transplant_report"
_MARK = f'<meta name="generator" content="{GENERATOR}">'  # what tells a report from any other file
_LONG = 300  # characters of a value that is folded away
_WIDE = 24   # characters of a model's name that would make a column too wide


@dataclass(frozen=True)
class Analysis:
    """A kind of folder with a table.txt, figures, or both."""
    title: str
    reading: str  # how to read it
    shows: str    # what its figures show, for who cannot see them


ANALYSES = {
    "interference": Analysis(
        "Interference: where the tasks collide",
        "Weights alone, no data. Tasks get in each other's way where the large entries of their task vectors are the "
        "same (overlap) and disagree in sign (conflict), in stages that hold much of their norm. A cosine near 0, and "
        "an overlap no larger than chance, mean that the tasks go their own ways and add up.",
        "norm, overlap, sign conflicts and cosine of the task vectors, stage by stage through the U-Net"),
    "flatness": Analysis(
        "Flatness: how wide the minimum is",
        "Curvature of the loss at the model: the smaller the trace and the largest eigenvalues λ₁, λ₂, ... of the "
        "Hessian and of the Fisher information are, the wider the minimum, and the further weights can be moved before "
        "the loss rises. The bound of Eq. 7 (U-Net Transplant), ½ λ₁ ‖τ‖², limits what a task vector τ adds to the "
        "loss of its base; ½ τᵀHτ is what the same curvature predicts for τ's own direction.",
        "bars of the largest eigenvalues and Fisher entries on a logarithmic axis, models side by side"),
    "sweep": Analysis(
        "Sweep: which weights are best",
        "Dice of the merged model for many weights. A diamond marks the default weights, a star the best ones. A large "
        "bright area around the diamond means that the weights hardly matter; a star far away from it, that they do. "
        "Believe the score on the cases that were kept back, not that on the cases the weights were tuned on.",
        "Dice over the weights of the models, with the default weights as a diamond and the best as a star"),
    "landscape": Analysis(
        "Landscape: the loss between the models",
        "The loss over the plane through the models, and along the lines between them. Models in one basin merge well; "
        "a ridge between two (a barrier) is what their average has to pay.",
        "contours of the loss over the plane through the models, with every model marked"),
}


def write_report(model: Path | str, output: Path | str, evaluations: Sequence[Path | str] = (),
                 analyses: Mapping[str, Path | str] | None = None, overwrite: bool = False) -> None:
    """Write the page about a merged model folder.

    evaluations: folders of nnunet_transplant_evaluate. analyses: folders by their kind (ANALYSES).
    overwrite: replace an earlier report, and nothing else. The file is there whole or not at all.
    Raises TransplantError for a folder without merge.json or with one of several models, evaluations and analyses that
    hold nothing to show, and an existing output.
    """
    output = Path(output)
    _check_output(output, overwrite)
    text = page(Path(model), [*map(Path, evaluations)], {kind: Path(path) for kind, path in (analyses or {}).items()})
    with atomic_path(output) as temporary:
        # names of files may hold bytes that are no UTF-8
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise TransplantError(f"{output} is a folder: give a file to -o, such as {output / 'report.html'}")
    if not output.exists():
        return
    if not overwrite:
        raise TransplantError(f"{output} exists already; give another -o, or --overwrite to replace it")
    with open(output, "rb") as file:
        if _MARK.encode() not in file.read(2000):
            raise TransplantError(f"{output} is no report: --overwrite replaces nothing else")


def page(model: Path, evaluations: Sequence[Path], analyses: Mapping[str, Path]) -> str:
    """The whole page; see `write_report`."""
    folder = Path(model)
    record = _read_record(folder)
    name = model_labels([folder])[0]
    try:
        sections = [_what(folder, record), _provenance(record)]
        title = _title(record)
    except TransplantError:  # a ValueError too
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise TransplantError(f"{folder / 'merge.json'} is not the record of a merge") from error
    if evaluations:
        sections.append(_scores(evaluations, name))
    sections += [_analysis(ANALYSES[kind], Path(path)) for kind, path in analyses.items()]
    links = "".join(f'<li><a href="#s{i}">{escape(heading)}</a></li>' for i, (heading, _) in enumerate(sections, 1))
    body = "\n".join(f'<section id="s{i}" aria-labelledby="h{i}">\n<h2 id="h{i}">{escape(heading)}</h2>\n{content}\n'
                     "</section>" for i, (heading, content) in enumerate(sections, 1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{_MARK}
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Merged model {escape(name)}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>Merged model {_words(name)}</h1>
<p>{_words(title)}</p>
<nav aria-label="Contents"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer><p>Written by {GENERATOR}, nnunet_transplant {escape(version("nnunet_transplant"))}. Paths are those that
merge.json holds.</p></footer>
</body>
</html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Sections: (heading, HTML)

def _read_record(folder: Path) -> dict[str, Any]:
    """merge.json. Raises TransplantError where there is none, or where it is that of several models."""
    if not folder.is_dir():
        raise TransplantError(f"there is no folder {folder}")
    if not (folder / "merge.json").is_file():
        raise TransplantError(f"{folder} is not a merged model: it has no merge.json")
    record = read_json(folder / "merge.json")
    if isinstance(record.get("models"), list):  # written by -share
        raise TransplantError(f"{folder} holds several models side by side, that share a part: give one of them to -m: "
                              + ", ".join(str(folder / str(name)) for name in record["models"]))
    if not isinstance(record.get("folds"), dict) or not record["folds"]:
        raise TransplantError(f"{folder / 'merge.json'} is not the record of a merge")
    return record


def _title(record: Mapping[str, Any]) -> str:
    folds = record["folds"]
    methods = ", ".join(dict.fromkeys(str(fold["method"]) for fold in folds.values()))
    inputs = max(len(fold["inputs"]) for fold in folds.values())
    title = f"An nnU-Net model, merged from {inputs} model{'s' * (inputs != 1)} by {methods}"
    return title + (f", in {len(folds)} folds." if len(folds) > 1 else ".")


def _what(folder: Path, record: Mapping[str, Any]) -> tuple[str, str]:
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    check_dataset_json(dataset_json, str(folder / "dataset.json"), RECORD)
    files = {f"fold_{fold}/{CHECKPOINT}": folder / f"fold_{fold}" / CHECKPOINT for fold in record["folds"]}
    for path in files.values():
        if not path.is_file():
            raise TransplantError(f"{folder} is not complete: it has no {path.relative_to(folder)}")
    content = read_checkpoint(next(iter(files.values())))
    axes = content["inference_allowed_mirroring_axes"]
    facts = [("configuration", content["init_args"]["configuration"]), ("plans", plans.get("plans_name", "")),
             ("dataset of the plans", plans.get("dataset_name", "")), ("trainer", content["trainer_name"]),
             ("channels", [f"{i}: {name}" for i, name in enumerate(channel_names(dataset_json))]),
             ("test-time mirroring", "none" if not axes else "axes " + ", ".join(map(str, axes))),
             *((f"SHA-256 of {name}", _code(file_sha256(path))) for name, path in files.items())]
    notes = dataset_json.get(RECORD, {})
    sources = notes.get("sources", {}) if isinstance(notes.get("sources", {}), dict) else {}
    rows = [(name, list(values), list(origin(dataset_json, name)), sources.get(name, ""))
            for name, values in foreground_values(dataset_json["labels"]).items()]
    head = ("structure", "label value", f"consists of, in {notes['parent']}" if notes.get("parent") else "consists of",
            "merged from")
    return "What was merged", _table("Structures of the merged model", head, rows) + _facts("The model", facts)


def _provenance(record: Mapping[str, Any]) -> tuple[str, str]:
    parts = []
    for name, fold in record["folds"].items():
        several = len(record["folds"]) > 1
        if several:
            parts.append(f"<h3>Fold {_words(name)}</h3>")
        parts += _provenance_of_fold(fold, f", fold {name}" * several)
    parts.append(_facts("Versions it was merged with", list(record.get("versions", {}).items())))
    return "Provenance", "\n".join(parts)


def _provenance_of_fold(fold: Mapping[str, Any], which: str) -> list[str]:
    method = METHODS.get(fold["method"])
    facts = [("method", fold["method"] if method is None else f"{fold['method']}: {method.summary}"),
             ("reference", fold["reference"]), *(fold["parameters"] or {}).items()]
    if fold.get("weights") is not None:
        facts.append(("weights given", fold["weights"]))
    for key, title in (("keep_base_for", "left at theta_0"), ("stage_weights", "weights of the stages"),
                       ("fit_head", "head fitted to the ensemble"), ("polish", "steps of polish"),
                       ("share", "tensors shared"), ("base", "base given")):
        if fold.get(key):
            facts.append((title, fold[key]))
    if fold.get("polish"):
        facts.append(("learning rate of polish", fold["polish_lr"]))
    if fold.get("theta_0_sha256"):
        facts.append(("theta_0 (SHA-256)", _code(fold["theta_0_sha256"])))
    facts += [(f"found: {key}", value) for key, value in (fold.get("found") or {}).items()]
    volumes = dict(fold.get("volumes") or {})
    facts += [(f"volumes of {name}", cases) for name, cases in (volumes.pop("datasets", None) or {}).items()]
    names = {"n_cases": "volumes asked for", "cases": "chosen from", "device": "looked at on"}
    facts += [(names.get(key, f"found: {key}"), value) for key, value in volumes.items() if value is not None]
    inputs = [(number, _path(each["path"]), each["fold"], f"{float(each['weight']):.4g}", each["structures"],
               _code(each["sha256"])) for number, each in enumerate(fold["inputs"], 1)]
    return [_facts(f"How it was merged{which}", facts),
            _table(f"Inputs{which}", ("", "path", "fold", "weight", "structures", "SHA-256"), inputs)]


_EVALUATION_FIGURES = {
    DICE_FIGURE: "bars of the mean Dice of each structure, models side by side, every case a dot; the means are "
                 "those of the table above",
    OVERLAYS_FIGURE: "the best, the median and the worst case: the image, the truth, and what each model predicts, "
                     "with the outline of the truth over it"}


def _scores(evaluations: Sequence[Path], name: str) -> tuple[str, str]:
    """A table of the mean Dice, and the figures, of each evaluation."""
    parts = []
    for folder in map(Path, evaluations):
        frame, lines = read_scores(folder), _read_text(folder / TABLE).splitlines()
        means, models = structure_means(frame), list(frame["model"].unique())
        rows = [(structure, *(_dice(of_structure, model, models) for model in models))
                for structure, of_structure in means.items()]
        parts.append(f"<h3>{_words(lines[0] if lines else folder.name)}</h3>")
        heads = models
        if max(map(len, models)) > _WIDE:
            heads = [f"[{i}]" for i in range(1, len(models) + 1)]
            parts.append('<ul class="key">' + "".join(f"<li>{head} {_words(model)}</li>" for head, model
                                                      in zip(heads, models, strict=True)) + "</ul>")
        parts.append(_table(f"Mean Dice over the cases, {folder.name}", ("structure", *heads), rows, numbers=True))
        notes = ["The best of each row is bold. - is a structure that the model does not have or the dataset cannot "
                 "score, nan one that is in no case. The mean is over those structures for which every model has a "
                 "Dice.",
                 *([] if name in models else [f"No model of this evaluation is called {name}: check that it is of "
                                              "the model of this page."]),
                 *(line.removeprefix("note: ") for line in lines if line.startswith("note: "))]
        parts += [f'<p class="note">{_words(note)}</p>' for note in notes]
        parts += [_figure(folder / file, f"{folder.name}, {file}: {shows}")
                  for file, shows in _EVALUATION_FIGURES.items() if (folder / file).is_file()]
    return "Scores", "\n".join(parts)


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


def _dice(of_structure: Mapping[str, float], model: str, models: Sequence[str]) -> str:
    if model not in of_structure:
        return "-"
    text = f"{of_structure[model]:.4f}"
    others = [f"{dice:.4f}" for dice in of_structure.values()]
    best = max((each for each in others if each != "nan"), default="")
    return _Html(f"<strong>{text}</strong>") if text == best and len(models) > 1 else text


def _analysis(analysis: Analysis, folder: Path) -> tuple[str, str]:
    """Whatever such a folder holds: table.txt and every .png."""
    if not folder.is_dir():
        raise TransplantError(f"there is no folder {folder}")
    table, figures = _read_text(folder / TABLE).strip("\n"), sorted(folder.glob("*.png"))
    if not table and not figures:
        raise TransplantError(f"{folder} holds nothing to show: neither a {TABLE} nor a .png")
    parts = [f"<p>{escape(analysis.reading)}</p>"]
    if table:
        label = escape(f"Table of {folder.name}")
        columns = max(map(len, table.splitlines()))  # print makes them fit
        parts.append(f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
                     f'<pre style="--columns: {columns}">{escape(table)}</pre></div>')
    parts += [_figure(figure, f"{folder.name}, {figure.name}: {analysis.shows}") for figure in figures]
    more = sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".csv"))
    if more:
        parts.append(f'<p class="note">{_words("Also in " + folder.name + ": " + ", ".join(more))}</p>')
    return analysis.title, "\n".join(parts)


def _read_text(path: Path) -> str:
    """"" where there is no such file."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file.read(MOST_TEXT).decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of HTML

class _Html(str):
    """Text that is HTML already; all other text is escaped where it is put in."""


def _words(text: str) -> _Html:
    """Names and paths in it may break after _ and /, and where nothing else would for long."""
    return _Html(escape(re.sub(r"[_/\\]|[^\s_/\\]{24}", "\\g<0>\u200b", text)).replace("\u200b", "<wbr>"))


def _text(value: Any) -> _Html:
    """The cell of a table. What is long is folded away."""
    if isinstance(value, _Html):
        return value
    several = isinstance(value, (list, tuple)) and not any(isinstance(each, (list, dict)) for each in value)
    text = ", ".join(map(_plain, value)) if several else _plain(value)
    if len(text) <= _LONG:
        return _words(text)
    return _Html(f"<details><summary>{len(text)} characters</summary>{_words(text)}</details>")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _code(value: Any) -> _Html:
    return _Html(f"<code>{escape(str(value))}</code>")


def _path(value: Any) -> _Html:
    return _Html(f'<span class="path">{_text(str(value))}</span>')


def _table(caption: str, head: Iterable[str], rows: Iterable[Sequence[Any]], numbers: bool = False) -> str:
    """A table that scrolls sideways where it is too wide. The first cell of each row is its heading."""
    columns = "".join(f'<th scope="col">{_text(title)}</th>' if title else "<td></td>" for title in head)
    lines = [f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>"
             for first, *cells in rows]
    return _scrolling(caption, f"<thead><tr>{columns}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>",
                      "numbers" if numbers else "texts")


def _facts(caption: str, rows: Iterable[tuple[Any, Any]]) -> str:
    """A table of two columns, without headings above them: what, and its value."""
    lines = [f'<tr><th scope="row">{_text(key)}</th><td>{_text(value)}</td></tr>' for key, value in rows]
    return _scrolling(caption, "<tbody>\n" + "\n".join(lines) + "\n</tbody>", "facts")


def _scrolling(caption: str, content: str, kind: str) -> str:
    return (f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table class="{kind}">\n'
            f"<caption>{_words(caption)}</caption>\n{content}\n</table></div>")


def _figure(path: Path, text: str) -> str:
    """A PNG inside the page. Its size is given, so that nothing moves while the page loads."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise TransplantError(f"{path} is not a PNG image")
    width, height = (int.from_bytes(data[start:start + 4], "big") for start in (16, 20))
    source = base64.b64encode(data).decode("ascii")
    shape = "wide" if width > height else "tall"
    return (f'<figure class="{shape}"><img src="data:image/png;base64,{source}" alt="{escape(text)}" width="{width}" '
            f'height="{height}">\n<figcaption>{_words(text)}</figcaption></figure>')


_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --band: #f6f8fa;
  --link: #0a58ca; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e9ed; --soft: #a3adb8; --line: #3a424c; --band: #1c2128; --link: #86b7ff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 68rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0.5rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 0.75rem; padding-bottom: 0.25rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 0.5rem; }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 0.75rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: 0.35rem 0; }
.note, figcaption, footer { color: var(--soft); font-size: 0.875rem; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); }
.scroll { margin: 1rem 0; overflow-x: auto; -webkit-overflow-scrolling: touch; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9375rem; }
caption { padding: 0.25rem 0; text-align: left; font-weight: 600; }
th, td { padding: 0.4rem 0.75rem 0.4rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th, thead td { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody tr { background: var(--paper); }
tbody tr:nth-child(odd) { background: var(--band); }
th[scope="row"] { font-weight: 500; }
.numbers th[scope="row"] { position: sticky; left: 0; min-width: 5.5rem; max-width: 12rem; background: inherit; }
.numbers th[scope="col"] { min-width: 4rem; text-align: right; font-weight: 600; }
.numbers th[scope="col"]:first-child { text-align: left; }
.numbers td { text-align: right; font-variant-numeric: tabular-nums; }
.key { margin: 0.5rem 0; padding: 0; list-style: none; font-size: 0.9375rem; }
.key li { padding-left: 2rem; text-indent: -2rem; }
.facts th { width: 12rem; min-width: 7rem; color: var(--soft); }
.texts th, .texts td { min-width: 4rem; }
.texts th[scope="row"]:empty, .texts thead td { min-width: 0; }
.path { display: block; min-width: 14rem; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { display: block; min-width: 9.5rem; font-size: 0.8125rem; word-break: break-all; }
pre { margin: 0; padding: 0.75rem; background: var(--band); font-size: 0.8125rem; line-height: 1.4; width: max-content;
  min-width: 100%; }
figure { margin: 1.25rem 0; }
img { display: block; max-width: min(100%, 52rem); height: auto; background: #ffffff; border-radius: 4px; }
figcaption { margin-top: 0.4rem; overflow-wrap: anywhere; }
@page { margin: 15mm; }
@media print {
  :root { color-scheme: light; --paper: #ffffff; --ink: #000000; --soft: #000000; --line: #999999; --band: #ffffff;
    --link: #000000; }
  html { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { width: 100%; font-size: 8.5pt; }
  th, td, .path, .numbers th[scope] { min-width: 0; max-width: none; position: static; }
  th, td { padding: 1mm 2mm 1mm 0; }
  code { min-width: 32mm; font-size: 7pt; }
  pre { width: auto; padding: 0; font-size: max(4pt, min(7.5pt, 178mm / (0.61 * var(--columns))));
    white-space: pre-wrap; overflow-wrap: anywhere; }
  h2, h3, caption, .key { break-after: avoid; }
  tr, figure, .key { break-inside: avoid; }
  img { max-width: 100%; width: auto; }
  .tall img { max-height: 215mm; }
  .wide img { max-height: 105mm; }
  footer { break-before: avoid; margin-top: 5mm; }
}
"""
