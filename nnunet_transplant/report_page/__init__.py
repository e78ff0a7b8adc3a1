"""One HTML page about a merged model: what was merged and how, what it scores, and what the analyses say of it.

The page stands alone: no script, nothing loaded from elsewhere, the figures inside. It can be mailed, archived beside
the model, read on a phone and printed. The same inputs give the same page.

`collect` reads the files into plain data, page.html lays them out.
"""
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import atomic_path
from nnunet_transplant.report_page.analyses import ANALYSES, Analysis
from nnunet_transplant.report_page.collect import collect, read_scores

__all__ = ["ANALYSES", "Analysis", "page", "read_scores", "report", "write_report"]

_MARK = b'<meta name="generator" content="nnunet_transplant_report">'  # what tells a report from any other file


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


def report(model: Path | str, output: Path | str, *, evaluation: Path | str | Sequence[Path | str] = (),
           interference: Path | str | None = None, flatness: Path | str | None = None, sweep: Path | str | None = None,
           landscape: Path | str | None = None, overwrite: bool = False) -> Path:
    """Write one HTML page about a merged model folder: see `write_report`. evaluation, interference, ...: the folders
    that these wrote. Returns the page's path."""
    analyses = {"interference": interference, "flatness": flatness, "sweep": sweep, "landscape": landscape}
    evaluations = [evaluation] if isinstance(evaluation, (str, Path)) else evaluation
    write_report(model, output, evaluations, {kind: folder for kind, folder in analyses.items() if folder is not None},
                 overwrite)
    return Path(output)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_dir():
        raise TransplantError(f"{output} is a folder: give a file to -o, such as {output / 'report.html'}")
    if not output.exists():
        return
    if not overwrite:
        raise TransplantError(f"{output} exists already; give another -o, or --overwrite to replace it")
    with open(output, "rb") as file:
        if _MARK not in file.read(2000):
            raise TransplantError(f"{output} is no report: --overwrite replaces nothing else")


def page(model: Path, evaluations: Sequence[Path], analyses: Mapping[str, Path]) -> str:
    """The whole page; see `write_report`."""
    environment = Environment(loader=PackageLoader("nnunet_transplant.report_page", "."), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)
    environment.filters["words"] = words
    return environment.get_template("page.html").render(report=collect(model, evaluations, analyses),
                                                        version=version("nnunet_transplant"))


def words(text: str) -> Markup:
    """Names and paths in it may break after _ and /, and where nothing else would for long. The text is escaped."""
    return Markup("<wbr>").join(re.sub(r"[_/\\]|[^\s_/\\]{24}", "\\g<0>\u200b", text).split("\u200b"))
