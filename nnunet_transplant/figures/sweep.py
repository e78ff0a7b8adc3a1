"""What coefficients do to a merge. `marks` says which evaluation is the default and which the best."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nnunet_transplant.figures.common import BLUE, add_legend, save_figure, shortened

_MARKERS: dict[str, dict[str, Any]] = {"default": {"marker": "D", "s": 60}, "best": {"marker": "*", "s": 190}}
_MARKS = {"default": "\N{WHITE DIAMOND}", "best": "\N{WHITE STAR}"}
_MARKED = {"default": "default", "best": "best mean"}


def save_maps_figure(points: np.ndarray, dice: Mapping[str, np.ndarray], ranges: Mapping[str, tuple[float, float]],
                     marks: Mapping[str, int], title: str, path: Path | BinaryIO,
                     cells: Sequence[Sequence[float]] | None = None) -> None:
    """Dice over two weights: a map for each structure, all in the same colours (U-Net Transplant, Fig. 3).

    points: (evaluations, 2); dice: structure -> (evaluations,); ranges: name of each weight -> lowest, highest.
    cells: the values of both weights, where the points are their grid; else each evaluation is a dot.
    """
    columns = min(len(dice), 4)
    rows = -(-len(dice) // columns)
    figure = Figure(figsize=(1.3 + 2.9 * columns, 1.5 + 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    low, high = float(np.min(list(dice.values()))), float(np.max(list(dice.values())))
    colours: dict[str, Any] = {"cmap": "cividis", "vmin": low, "vmax": max(high, low + 1e-6)}
    for axes, (name, values) in zip(grid.flat, dice.items(), strict=False):
        if cells is None:
            drawn = axes.scatter(*points.T, c=values, s=34, edgecolors="0.3", linewidths=0.4, **colours)
            axes.set(**{f"{axis}lim": (lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
                        for axis, (lowest, highest) in zip("xy", ranges.values(), strict=True)})
        else:
            drawn = _draw_cells(axes, points, values, cells, colours)
        for which, row in marks.items():  # a dot keeps the colour of its Dice
            filled: dict[str, Any] = {"color": "white"} if cells is not None else {"c": values[[row]], **colours}
            axes.scatter(*points[row], edgecolors="black", zorder=5, clip_on=False, **filled, **_MARKERS[which])
        there = "   ".join(f"{_MARKS[which]} {values[row]:.3f}" for which, row in marks.items())
        axes.set_title(f"{shortened(name, 28)}\n{there}", fontsize=9, parse_math=False)
        axes.set_box_aspect(1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in grid.flat[len(dice):]:
        axes.set_axis_off()
    names = [shortened(name, 40) for name in ranges]
    for column in range(columns):
        lowest_row = max(row for row in range(rows) if row * columns + column < len(dice))
        grid[lowest_row, column].set_xlabel(names[0], parse_math=False)
        grid[lowest_row, column].xaxis.set_tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(names[1], parse_math=False)
    figure.colorbar(drawn, ax=grid, label="Dice", shrink=0.9, aspect=30)
    figure.suptitle(title, fontsize=10, parse_math=False)
    _mark_legend(figure, {which: f"{_MARKED[which]}: {points[row][0]:.3g}, {points[row][1]:.3g}"
                          for which, row in marks.items()})
    save_figure(figure, path)


def _draw_cells(axes: Axes, points: np.ndarray, values: np.ndarray, cells: Sequence[Sequence[float]],
                colours: Mapping[str, Any]) -> Any:
    """A cell around every point of the grid and, where there are enough of them, lines of equal Dice."""
    at = {tuple(np.round(point, 6)): value for point, value in zip(points, values, strict=True)}
    dice = np.array([[at[round(x, 6), round(y, 6)] for x in cells[0]] for y in cells[1]])
    drawn = axes.pcolormesh(*cells, dice, shading="nearest", rasterized=True, **colours)
    levels = [level for level in np.arange(1, 10) / 10 if dice.min() < level < dice.max()]
    if min(dice.shape) >= 9 and levels:
        middle = (colours["vmin"] + colours["vmax"]) / 2
        lines = axes.contour(*cells, dice, levels=levels, linewidths=0.7,
                             colors=["white" if level < middle else "black" for level in levels])
        axes.clabel(lines, fmt="%.1f", fontsize=7)
    return drawn


def save_slices_figure(numbers: Mapping[str, np.ndarray], dice: np.ndarray, marks: Mapping[str, int], title: str,
                       path: Path | BinaryIO) -> None:
    """The mean Dice of every evaluation over each number that was searched: name -> (evaluations,)."""
    columns = min(len(numbers), 4)
    rows = -(-len(numbers) // columns)
    figure = Figure(figsize=(0.8 + 2.9 * columns, 1.3 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (name, values) in zip(grid.flat, numbers.items(), strict=False):
        axes.scatter(values, dice, color=BLUE, s=18, alpha=0.6, linewidths=0)
        for which, row in marks.items():
            axes.scatter(values[row], dice[row], color="white", edgecolors="black", zorder=5, clip_on=False,
                         **_MARKERS[which])
        axes.set_xlabel(shortened(name, 40), parse_math=False)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(numbers):]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("mean Dice")
    figure.suptitle(title, fontsize=10, parse_math=False)
    _mark_legend(figure, {which: f"{_MARKED[which]}: {dice[row]:.3f}" for which, row in marks.items()})
    save_figure(figure, path)


def save_front_figure(dice: Mapping[str, np.ndarray], front: Sequence[int], marks: Mapping[str, int], title: str,
                      path: Path | BinaryIO) -> None:
    """Which Dice can be had together: of two structures one over the other, of more as a line across all of them.

    dice: structure -> (evaluations,). front: the evaluations than which none is better in every structure.
    """
    values = np.stack(list(dice.values()), axis=1)
    width = 5.6 if len(dice) == 2 else 2 + 1.1 * len(dice)
    figure = Figure(figsize=(width, 5), layout="constrained")
    axes = figure.subplots()
    if len(dice) == 2:
        axes.scatter(values[:, 0], values[:, 1], color="0.75", s=18, linewidths=0, label="evaluated")
        along = values[sorted(front, key=lambda row: values[row, 0])]
        axes.plot(*along.T, drawstyle="steps-pre", color=BLUE, marker="o", markersize=4, linewidth=1.2,
                  label="none is better in both")
        over, up = (f"Dice of {shortened(name, 40)}" for name in dice)
        axes.set_xlabel(over, parse_math=False)
        axes.set_ylabel(up, parse_math=False)
        for which, row in marks.items():
            axes.scatter(*values[row], color="white", edgecolors="black", zorder=5, **_MARKERS[which],
                         label=_MARKED[which])
    else:
        where = range(len(dice))
        others = [row for row in range(len(values)) if row not in front]
        for rows, colour, label in ((others, "0.85", "evaluated"), (front, BLUE, "none is better in all")):
            for row in rows:
                axes.plot(where, values[row], color=colour, linewidth=0.9, label=label if row == rows[0] else None)
        for which, row in marks.items():
            axes.plot(where, values[row], color="black", linestyle="--" if which == "default" else "-",
                      marker=_MARKERS[which]["marker"], markerfacecolor="white", markersize=8 + 4 * (which == "best"),
                      label=_MARKED[which])
        axes.set_xticks(where, [shortened(name, 20) for name in dice], rotation=30, ha="right", parse_math=False)
        axes.set_ylabel("Dice")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=4 if len(dice) > 4 else 2, frameon=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def _mark_legend(figure: Figure, names: Mapping[str, str]) -> None:
    handles = [Line2D([], [], linestyle="", marker=_MARKERS[which]["marker"], markerfacecolor="white",
                      markeredgecolor="black", markersize=7 + 5 * (which == "best")) for which in names]
    add_legend(figure, handles, list(names.values()), len(names))
