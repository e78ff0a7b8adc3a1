"""The Dice of models, and what they predict."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from nnunet_transplant.figures.common import (
    MODEL_HATCHES,
    STRUCTURE_COLOURS,
    add_legend,
    draw_mask,
    model_style,
    save_figure,
    shortened,
    within_border,
)

_MOST_SLOTS = 28   # of bars side by side; more structures go to another row
_MOST_PANELS = 5   # side by side
_HALO = withStroke(linewidth=1.6, foreground="black")


def save_dice_figure(dice: Mapping[tuple[str, str], Sequence[float]], structures: Sequence[str], models: Sequence[str],
                     title: str, path: Path) -> None:
    """Bars of the mean Dice of each structure, models side by side (U-Net Transplant, Fig. 4); each case is a dot.

    dice: (structure, model) -> Dice of every case, NaN where it has none. A model has no bar for what is not there.
    """
    rows: list[list[tuple[str, list[str]]]] = [[]]
    for structure in structures:
        group = (structure, [model for model in models if (structure, model) in dice])
        if rows[-1] and _slots([*rows[-1], group]) > _MOST_SLOTS:
            rows.append([])
        rows[-1].append(group)
    slots = max(6, *map(_slots, rows))
    width = min(9.0, 3 + 0.4 * slots)
    figure = Figure(figsize=(width, 0.8 + 2.7 * len(rows) + 0.2 * len(models)), layout="constrained")
    grid = figure.subplots(len(rows), squeeze=False)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        ticks, x = [], (slots - _slots(row)) / 2 if len(rows) == 1 else 0.0
        for structure, having in row:
            ticks.append(x + (len(having) - 1) / 2)
            for model in having:
                _draw_bar(axes, x, dice[structure, model], list(models).index(model))
                x += 1
            x += 1
        names = [shortened(structure, 40) for structure, _ in row]
        room = [(len(having) + 1) * 9 * width / slots for _, having in row]  # characters
        tilted = any(len(name) > most for name, most in zip(names, room, strict=True))
        turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if tilted else {}
        axes.set_xticks(ticks, names, parse_math=False, rotation_mode="anchor", **turned)
        axes.tick_params(axis="x", length=0)
        axes.set(xlim=(-1, slots - 1), ylim=(0, 1), ylabel="Dice", yticks=np.linspace(0, 1, 6))
        axes.grid(axis="y", alpha=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    handles = [Rectangle((0, 0), 1, 1, **model_style(index)) for index in range(len(models))]
    names = [shortened(model, 90) for model in models]
    add_legend(figure, handles, names, max(1, int(13 * width) // (8 + max(map(len, names)))))
    save_figure(figure, path)


def _slots(row: Sequence[tuple[str, list[str]]]) -> int:
    """As many bars as would fill a row: its own and a gap behind each structure."""
    return sum(len(having) + 1 for _, having in row)


def _draw_bar(axes: Axes, x: float, values: Sequence[float], model: int) -> None:
    there = [value for value in values if not np.isnan(value)]
    if not there:
        axes.text(x, 0.02, "in no case", rotation=90, ha="center", va="bottom", fontsize=7)
        return
    axes.bar(x, np.mean(there), 1, **model_style(model))
    if len(there) > 1:
        axes.scatter(x + np.linspace(-0.35, 0.35, len(there)), there, s=min(9, max(2, 300 / len(there))),
                     color="white", edgecolor="black", linewidth=0.5, zorder=3, clip_on=False)


class Overlay(NamedTuple):
    """A slice of a case and what is said to be in it."""
    title: str
    image: np.ndarray             # (rows, columns)
    spacing: tuple[float, float]  # of rows and of columns
    # title, and structure -> mask (rows, columns): first the truth, with all structures that any panel has
    panels: Sequence[tuple[str, Mapping[str, np.ndarray]]]


def save_overlays_figure(cases: Sequence[Overlay], structures: Sequence[str], title: str, path: Path) -> None:
    """For each case its image, the truth in it, and predictions with the truth's outline over them, cut to what there
    is. structures: all that is drawn, each in one colour. All cases have as many panels."""
    panels = 1 + len(cases[0].panels)
    lines = -(-panels // _MOST_PANELS)
    columns = -(-panels // lines)
    cases = [_cut(case) for case in cases]
    titles = ["image", *(_wrapped(name) for name, _ in cases[0].panels)]
    above = 0.2 + 0.12 * max(map(len, map(str.splitlines, titles)))
    tallest = 1.5 if lines == 1 else 1.1  # times the width of a panel
    heights = [lines * (1.75 * min(tallest, _height_over_width(case)) + above) + 0.3 for case in cases]
    figure = Figure(figsize=(max(5.0, 1.85 * columns), sum(heights) + 0.8 + 0.2 * (len(structures) // columns)),
                    layout="constrained")
    figure.suptitle(title, parse_math=False)
    parts = figure.subfigures(len(cases), height_ratios=heights, squeeze=False)[:, 0]
    for part, case in zip(parts, cases, strict=True):
        part.suptitle(case.title, x=0.01, ha="left", fontsize=10, parse_math=False)
        grid = part.subplots(lines, columns, squeeze=False).flatten()
        for axes in grid:
            axes.set_axis_off()
        shown: list[tuple[str, Mapping[str, np.ndarray]]] = [("image", {}), *case.panels]
        for axes, (name, masks) in zip(grid, shown, strict=False):
            low, high = _window(case)
            axes.imshow(case.image, cmap="gray", vmin=low, vmax=high, aspect=case.spacing[0] / case.spacing[1])
            axes.set(autoscale_on=False)
            axes.set_title(_wrapped(name), fontsize=7, parse_math=False)
            for order, structure in enumerate(sorted(masks, key=lambda name: -masks[name].sum())):  # regions may nest
                draw_mask(axes, masks[structure], order=2 + order, **_structure_style(structures.index(structure)))
                if masks is not case.panels[0][1]:
                    _draw_outline(axes, case.panels[0][1][structure], order=4 + len(structures))
    styles = [_structure_style(index) for index in range(len(structures))]
    handles: list[Artist] = [Rectangle((0, 0), 1, 1, facecolor=style["colour"], hatch=style["hatch"])
                             for style in styles]
    handles.append(Line2D([], [], color="white", linewidth=1, path_effects=[_HALO]))
    names = [*(shortened(structure, 40) for structure in structures), "outline of the truth"]
    add_legend(figure, handles, names, max(1, int(24 * columns) // (6 + max(map(len, names)))))
    save_figure(figure, path)


def slice_to_show(areas: np.ndarray) -> int:
    """The slice with most to see: first the number of structures counts, then the share of each.

    areas: (structures, slices), how much of a structure is in a slice."""
    return int(((areas > 0).sum(0) + (areas / areas.max(1, keepdims=True).clip(1)).mean(0)).argmax())


def _structure_style(index: int) -> dict[str, Any]:
    """How a structure looks. It is hatched where the colours start anew."""
    turn, colour = divmod(index, len(STRUCTURE_COLOURS))
    return {"colour": STRUCTURE_COLOURS[colour], "hatch": MODEL_HATCHES[turn % len(MODEL_HATCHES)] or None}


def _height_over_width(case: Overlay) -> float:
    return case.image.shape[0] * case.spacing[0] / (case.image.shape[1] * case.spacing[1])


def _cut(case: Overlay) -> Overlay:
    """To a square about all that is marked, where the image has room for it; never less than a quarter of it."""
    marked = _marked(case)
    if not marked.any():
        return case
    sizes, spacing = np.array(marked.shape), np.array(case.spacing)
    where = np.argwhere(marked)
    first, last = where.min(0), where.max(0)
    side = max(1.5 * ((last - first + 1) * spacing).max(), 0.25 * (sizes * spacing).max())
    wanted = np.minimum(sizes, np.ceil(side / spacing).astype(int))
    start = np.clip((first + last + 1 - wanted) // 2, 0, sizes - wanted)
    window = tuple(slice(begin, begin + size) for begin, size in zip(start, wanted, strict=True))
    return case._replace(image=case.image[window], panels=[
        (name, {structure: mask[window] for structure, mask in masks.items()}) for name, masks in case.panels])


def _marked(case: Overlay) -> np.ndarray:
    return np.any([mask for _, masks in case.panels for mask in masks.values()], axis=0)


def _window(case: Overlay) -> tuple[float, float]:
    """The values to show black and white: those of what is marked in the middle, whatever else the image holds."""
    marked = _marked(case)
    low, high = np.percentile(case.image[marked] if marked.any() else case.image, [1, 99])
    if low == high:  # one voxel, or an image of one value
        low, high = case.image.min(), case.image.max()
        return float(low), float(max(high, low + 1))
    return low - 1.5 * (high - low), high + 0.75 * (high - low)


def _wrapped(title: str) -> str:
    """Each line broken where it is too long for a panel: after an underscore, where there is one."""
    return "\n".join(part for line in title.split("\n") for part in re.findall(".{1,28}(?:_|$)|.{1,29}", line))


def _draw_outline(axes: Axes, mask: np.ndarray, order: int) -> None:
    if mask.any():
        lines = axes.contour(*within_border(mask), levels=[0.5], colors=["white"], linewidths=0.7, zorder=order)
        lines.set_path_effects([_HALO])
