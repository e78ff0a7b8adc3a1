"""The papers' experiment, whose tests fill more than one file: they run side by side."""
import re
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def row_of(documentation: Path, regime: str, tasks: str) -> list[str]:
    """The cells of a table of merges."""
    text = (documentation / "stable_base.md").read_text()
    return re.search(rf"^\| {regime} \| {tasks} \| (.+) \|$", text, re.M)[1].split(" | ")
