"""Where in the network tasks collide."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nnunet_transplant.figures.common import BLUE, add_legend, save_figure

_LINE_COLOURS = (BLUE, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # those that show on white
_MOST_ROWS = 60  # of a map whose rows can all be named


def save_interference_figure(tasks: Sequence[str], stages: Sequence[str], entries: np.ndarray, energy: np.ndarray,
                             cosine: np.ndarray, conflict: np.ndarray, conflict_of_all: np.ndarray,
                             overlap: np.ndarray, overlap_by_chance: np.ndarray, density: float, path: Path) -> None:
    """Where in the network T tasks collide: four panels over S stages, the last of which is the whole network.

    entries (S,) and energy (S, T): shares of the whole; the others (S, P) for the pairs 1+2, 1+3, ..., and
    conflict_of_all (S,). Up to six pairs are lines, more are maps with a row for each pair.
    """
    pairs = [f"{a}+{b}" for a in range(1, len(tasks) + 1) for b in range(a + 1, len(tasks) + 1)]
    as_lines = len(pairs) <= len(_LINE_COLOURS)
    part = np.where(np.arange(len(stages)) < len(stages) - 1, 1.0, np.nan)  # of the whole network all shares are 1
    # title, unit, rows, a row of another kind
    panels: list[tuple[str, str, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]] = [
        ("Where each task changed the network", "share of the task's squared norm",
         {str(t): row for t, row in enumerate(energy.T * part, 1)}, {"all entries": entries * part}),
        ("Do tasks pull the same way? (1: yes, 0: unrelated, -1: opposite)", "cosine of two task vectors",
         dict(zip(pairs, cosine.T, strict=True)), {}),
        ("Do they disagree? (0.5: signs by chance)", "share of opposite signs\nwhere both are large",
         dict(zip(pairs, conflict.T, strict=True)), {"all tasks": conflict_of_all} if len(tasks) > 2 else {}),
        ("Do they need the same entries?", "large in both / large in either",
         dict(zip(pairs, overlap.T, strict=True)), {"by chance": np.ma.masked_invalid(overlap_by_chance).mean(1)})]
    height = 3.3 if as_lines else max(3.3, 0.16 * min(len(pairs), _MOST_ROWS))
    figure = Figure(figsize=(13, 2 * height + 1.5 + 0.2 * len(tasks)), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (title, unit, rows, more) in zip(grid.flat, panels, strict=True):
        axes.set_title(title, fontsize=11)
        if as_lines:  # pairs in other colours than tasks, as far as there are any
            _stage_lines(axes, stages, unit, rows, more, 0 if axes is grid[0, 0] else len(tasks))
        else:
            _stage_map(axes, stages, unit, rows, more)
            axes.set_ylabel("task" if axes is grid[0, 0] else "pair of tasks")
    for axes in grid[1]:
        axes.set_xticks(range(len(stages)), stages, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xlabel("stage: encoder from full resolution down, decoder back up")
    figure.suptitle(f"Where {len(tasks)} fine-tuned models collide "
                    f"(large: the {100 * density:g} % largest entries of each task vector)")
    heads = [task.partition("__")[0] for task in tasks]
    names = heads if len(set(heads)) == len(tasks) else tasks
    handles = [Line2D([], [], **(_line_style(t) if as_lines else {"linestyle": ""})) for t in range(len(tasks))]
    add_legend(figure, handles, [f"task {t}: {name}" for t, name in enumerate(names, 1)],
            2 if max(map(len, names)) < 60 else 1)
    save_figure(figure, path)


def _line_style(index: int) -> dict[str, Any]:
    return {"color": _LINE_COLOURS[index % len(_LINE_COLOURS)], "marker": "osD^vP"[index % 6], "markersize": 5}


def _stage_lines(axes: Axes, stages: Sequence[str], unit: str, rows: Mapping[str, np.ndarray],
                 more: Mapping[str, np.ndarray], first_colour: int) -> None:
    """A line through the stages of the U-Net for each row, dashed and grey for those of another kind; what is no stage
    stands beside it."""
    of_unet = np.array([stage.startswith(("encoder", "decoder")) for stage in stages])
    of_more: dict[str, Any] = {"color": "0.4", "marker": "x", "markersize": 5, "linestyle": "--"}
    styles = [_line_style(first_colour + index) for index in range(len(rows))] + len(more) * [of_more]
    for (name, row), style in zip({**rows, **more}.items(), styles, strict=True):
        axes.plot(np.where(of_unet, row, np.nan), **style, label=name)
        axes.plot(np.where(of_unet, np.nan, row), **style | {"linestyle": ""})
    for x in _borders(stages):
        axes.axvline(x, color="0.75", linewidth=1, zorder=0)
    axes.axhline(0, color="0.4", linewidth=1, zorder=0)
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside: it would hide markers


def _stage_map(axes: Axes, stages: Sequence[str], unit: str, rows: Mapping[str, np.ndarray],
               more: Mapping[str, np.ndarray]) -> None:
    """A coloured cell for each row and stage; rows of another kind below a line. No cell where nothing is defined."""
    values = np.ma.masked_invalid(np.array([*rows.values(), *more.values()], float))
    image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=min(0.0, values.min()), interpolation="nearest")
    for x in _borders(stages):
        axes.axvline(x, color="white", linewidth=3)
    if more:
        axes.axhline(len(rows) - 0.5, color="white", linewidth=3)
    ticks = [*range(0, len(rows), -(-len(rows) // _MOST_ROWS)), *range(len(rows), len(values))]
    names = [*rows, *more]
    axes.set_yticks(ticks, [names[tick] for tick in ticks], fontsize=7 if len(rows) > 20 else 9)
    axes.figure.colorbar(image, ax=axes, label=unit.replace("\n", " "), pad=0.01)


def _borders(stages: Sequence[str]) -> list[float]:
    """Between encoder, decoder and what is neither."""
    kinds = [stage.partition(" ")[0] for stage in stages]
    return [i - 0.5 for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
