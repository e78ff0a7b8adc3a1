"""What the default merge keeps of its experts, over volumes, steps and the number of tasks: from the tables that
default_merge.py made.

    python benchmarks/default_figure.py documentation/experiments/default_merge.png WORK/mouse4 WORK/mouse8 WORK/mouse20
"""
import argparse
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_transplant.figures.common import STRUCTURE_COLOURS, save_figure

VOLUMES, STEPS = 8, 300  # of the default
ROWS = {"default": "the default", "base, head fitted": "base, head fitted", "joint": "one model, trained on all",
        "average, head fitted": "average, head fitted"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", type=Path)
    parser.add_argument("folders", type=Path, nargs="+", help="with rows.csv; the first one has --curves")
    args = parser.parse_args()
    tables = {int(re.sub(r"\D", "", folder.name)): kept(folder / "rows.csv") for folder in args.folders}
    save(tables, args.figure)


def kept(file: Path) -> pd.Series:
    """Of each row the mean Dice on the test cases, as a share of the experts' (in percent)."""
    rows = pd.read_csv(file, index_col="row")
    test = rows[[column for column in rows if column.startswith("test ")]]
    experts = pd.Series({column: test.loc[f"expert {column.removeprefix('test ')}", column] for column in test})
    merged = test[~test.index.str.startswith("expert ")]
    return 100 * merged.mean(axis=1) / experts.mean()


def curve(table: pd.Series, pattern: str, of_default: int) -> pd.Series:
    """The rows whose name has a number in it, by this number, and the default itself."""
    found = {int(match[1]): value for name, value in table.items() if (match := re.fullmatch(pattern, str(name)))}
    return pd.Series(found | {of_default: table["default"]}).sort_index()


def save(tables: Mapping[int, pd.Series], path: Path) -> None:
    """tables: by number of tasks."""
    first = next(iter(tables.values()))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    row = figure.subplots(1, 2 + (len(tables) > 1), sharey=True)
    lines: list[tuple[Axes, str, pd.Series]] = [
        (row[0], "unlabelled volumes", curve(first, r"default, (\d+) volumes", VOLUMES)),
        (row[1], "steps", curve(first, r"default, (\d+) steps", STEPS))]
    for axes, title, values in lines:
        axes.plot(values.index, values, marker="o", color=STRUCTURE_COLOURS[0], label=ROWS["default"])
        axes.axhline(first["base, head fitted"], color=STRUCTURE_COLOURS[1], linestyle="--",
                     label=ROWS["base, head fitted"])
        finish(axes, title, [int(value) for value in values.index])
    if len(tables) > 1:
        for (name, label), colour in zip(ROWS.items(), STRUCTURE_COLOURS, strict=False):
            values = pd.Series({tasks: table[name] for tasks, table in tables.items() if name in table}).sort_index()
            row[2].plot(values.index, values, marker="o", color=colour, label=label)
        finish(row[2], "tasks in one model", sorted(tables))
    row[0].set_ylabel("Dice, % of the experts'")
    figure.legend(*row[-1].get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=len(ROWS))
    save_figure(figure, path, dpi=130)


def finish(axes: Axes, title: str, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel(title)
    axes.axhline(100, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
