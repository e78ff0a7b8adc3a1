"""Every figure of the package. None is made by pyplot, whose state and backend are the user's."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import SimpleITK
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from nnunet_transplant.fonts import add_fallback_fonts, without_remarks

# Okabe and Ito's palette for colour-blind readers
BLUE = "#0072B2"
STRUCTURE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")


def save_inputs_figure(provenance: dict[str, Any], path: Path) -> None:
    """What a merged fold has in place of nnU-Net's progress.png: its inputs and their weights."""
    inputs = provenance["inputs"]
    names = [f"{Path(one['path']).parent.parent.parent.name} fold {one['fold']}: {', '.join(one['structures'])}"
             for one in inputs]
    names = [name if len(name) <= 80 else name[:77] + "..." for name in names]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(inputs)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(inputs)), [one["weight"] for one in inputs], color=BLUE)
    axes.set_yticks(range(len(inputs)), names, parse_math=False)  # a name may hold dollars
    axes.invert_yaxis()
    axes.set(title=f"Merged by {provenance['method']}", xlabel="weight")
    save_figure(figure, path, dpi=100)


def save_segmentations_figure(image: Path, panels: Sequence[tuple[str, Path, dict[str, int]]],
                              structures: Sequence[str], path: Path) -> None:
    """An image and several segmentations of it side by side, in the axial and the coronal slice with most structure.

    panels: title, segmentation file, and structure -> label value in it. structures: what is drawn, each in one colour
    in all panels. The first panel (the truth) says which slices are shown.
    """
    volume, spacing = _read(image)
    masks = []
    for _, file, values in panels:
        labels, _ = _read(file)
        masks.append({name: labels == values[name] for name in structures if name in values})
    foreground = np.any(list(masks[0].values()), axis=0)
    views = [(axis, slice_to_show(_areas(masks[0], axis))) for axis in (0, 1)]
    low, high = np.percentile(volume[foreground], [1, 99])
    margin = 1.5 * (high - low)
    figure = Figure(figsize=(2.3 * (len(panels) + 1), 4.6), layout="constrained")
    grid = figure.subplots(2, len(panels) + 1)
    for row, (axis, index) in zip(grid, views, strict=True):
        in_plane = np.delete(spacing, axis)
        for column, axes in enumerate(row):
            # rows of a coronal slice run from foot to head: show the head above
            axes.imshow(np.take(volume, index, axis), cmap="gray", vmin=low - margin, vmax=high + margin / 2,
                        origin="lower" if axis else "upper", aspect=in_plane[0] / in_plane[1])
            axes.set(autoscale_on=False)
            axes.set_axis_off()
            if axis == 0:
                axes.set_title("image" if column == 0 else panels[column - 1][0], fontsize=9)
            for i, (name, mask) in enumerate(masks[column - 1].items() if column else ()):
                colour = STRUCTURE_COLOURS[structures.index(name) % len(STRUCTURE_COLOURS)]
                _draw_mask(axes, np.take(mask, index, axis), colour, order=2 + i)
    handles = [Rectangle((0, 0), 1, 1, color=STRUCTURE_COLOURS[i % len(STRUCTURE_COLOURS)])
               for i in range(len(structures))]
    figure.legend(handles, structures, loc="outside lower center", ncols=len(structures), frameon=False)
    save_figure(figure, path)


def _draw_mask(axes: Axes, mask: np.ndarray, colour: str, order: int, hatch: str | None = None) -> None:
    """Fill what is in a mask (rows, columns)."""
    if mask.any():
        parts = _within_border(mask)
        axes.contourf(*parts, levels=[0.5, 1.5], colors=[colour], alpha=0.55, hatches=[hatch], zorder=order)
        axes.contour(*parts, levels=[0.5], colors=[colour], linewidths=1, zorder=order + 1)


def _within_border(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mask with a border of nothing, which closes its contours at the edge, and where its columns and rows lie."""
    rows, columns = mask.shape
    return np.arange(-1, columns + 1), np.arange(-1, rows + 1), np.pad(mask.astype(float), 1)


def slice_to_show(areas: np.ndarray) -> int:
    """The slice with most to see: first the number of structures counts, then the share of each.

    areas: (structures, slices), how much of a structure is in a slice."""
    return int(((areas > 0).sum(0) + (areas / areas.max(1, keepdims=True).clip(1)).mean(0)).argmax())


def _areas(masks: dict[str, np.ndarray], axis: int) -> np.ndarray:
    return np.stack([mask.sum(axis=tuple(other for other in range(3) if other != axis)) for mask in masks.values()])


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image), np.array(image.GetSpacing())[::-1]


def save_units_figure(groups: Mapping[str, Sequence[tuple[str, bool]]], columns: Mapping[str, tuple[int, int]],
                      path: Path) -> None:
    """What is matched with what in a U-Net: every tensor that makes or reads units as a box, with a bar of its group's
    colour on the right for the units it makes, and bars on the left, one above the other, for those it reads.

    groups: by name, the tensors that it has a part in, and whether they read its units.
    columns: where to draw each tensor: (column, row), rows from the top.
    """
    colours = colormaps["tab20"].colors
    figure = Figure(figsize=(1.3 * (1 + max(x for x, _ in columns.values())),
                             1.1 * (1 + max(y for _, y in columns.values()))), layout="constrained")
    axes = figure.subplots()
    reads = {tensor: [name for name, parts in groups.items() if (tensor, True) in parts] for tensor in columns}
    for tensor, (x, y) in columns.items():
        transposed, head = "transpconv" in tensor, "seg_layers" in tensor
        axes.add_patch(Rectangle((x - 0.36, -y - 0.3), 0.72, 0.6, facecolor="white", edgecolor="0.3"))
        axes.text(x, -y, "head" if head else "up" if transposed else "conv", ha="center", va="center", fontsize=8)
        for i, name in enumerate(reads[tensor]):
            height = 0.6 / len(reads[tensor])
            axes.add_patch(Rectangle((x - 0.36, -y + 0.3 - (i + 1) * height), 0.12, height,
                                     color=colours[list(groups).index(name) % 20]))
        for index, (name, parts) in enumerate(groups.items()):
            if (tensor, False) in parts:
                axes.add_patch(Rectangle((x + 0.24, -y - 0.3), 0.12, 0.6, color=colours[index % 20]))
                for other, (to_x, to_y) in columns.items():
                    if name in reads[other]:
                        i, height = reads[other].index(name), 0.6 / len(reads[other])
                        axes.annotate("", (to_x - 0.36, -to_y + 0.3 - (i + 0.5) * height), (x + 0.36, -y),
                                      arrowprops={"arrowstyle": "->", "color": colours[index % 20], "lw": 1.2})
    axes.set_xlim(-0.6, max(x for x, _ in columns.values()) + 0.6)
    axes.set_ylim(-max(y for _, y in columns.values()) - 0.6, 0.6)
    axes.set_axis_off()
    save_figure(figure, path, dpi=130)


def save_barrier_figure(positions: Sequence[float], losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """The loss along the line from one model (0) to another (1), a line for each way to align them."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(losses.items(), STRUCTURE_COLOURS, strict=False):
        axes.plot(positions, values, marker="o", color=colour, label=name)
    axes.set(xlabel="share of the second model's weights", ylabel="loss")
    axes.legend()
    save_figure(figure, path, dpi=130)


def save_flatness_figure(models: Mapping[str, Mapping[str, Any]], patches: int, path: Path) -> None:
    """The largest eigenvalues of the Hessian, and the largest entries of the Fisher's diagonal, models side by side
    (U-Net Transplant, Fig. 2). Logarithmic: what is not positive has no bar."""
    panels = [(key, title, symbol) for key, title, symbol in (
        ("hessian_eigenvalues", "largest eigenvalues of the Hessian", "λ"),
        ("fisher_largest", "largest entries of the Fisher's diagonal", "F"))
        if any(key in model for model in models.values())]
    figure = Figure(figsize=(5.5 * len(panels), 4 + 0.2 * len(models)), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)
    width = 0.8 / len(models)
    for axes, (key, title, symbol) in zip(row[0], panels, strict=True):
        longest = max(len(model.get(key, ())) for model in models.values())
        for index, model in enumerate(models.values()):
            values = np.array(model.get(key, ()))
            axes.bar(np.arange(len(values)) + (index - (len(models) - 1) / 2) * width, np.where(values > 0, values, 0),
                     width, **_model_style(index))
        axes.set_xticks(range(longest), [f"{symbol}{i + 1}" for i in range(longest)])
        lowest = min((value for model in models.values() for value in model.get(key, ()) if value > 0), default=1.0)
        axes.set(yscale="log", title=title, ylabel="curvature of the loss", xlabel="by size")
        axes.set_ylim(bottom=10.0 ** (np.floor(np.log10(lowest)) - (np.log10(lowest) % 1 < 0.1)))
        axes.grid(axis="y", alpha=0.4)
        axes.set_axisbelow(True)
    figure.suptitle(f"Width of the minimum on {patches} patches (lower is wider)")
    _legend(figure, row[0][0].containers, list(models), 1)
    save_figure(figure, path)


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
    panels = [  # title, unit, rows, a row of another kind
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
    _legend(figure, handles, [f"task {t}: {name}" for t, name in enumerate(names, 1)],
            2 if max(map(len, names)) < 60 else 1)
    save_figure(figure, path)


def _line_style(index: int) -> dict[str, Any]:
    return {"color": _LINE_COLOURS[index % len(_LINE_COLOURS)], "marker": "osD^vP"[index % 6], "markersize": 5}


def _stage_lines(axes: Axes, stages: Sequence[str], unit: str, rows: Mapping[str, np.ndarray],
                 more: Mapping[str, np.ndarray], first_colour: int) -> None:
    """A line through the stages of the U-Net for each row, dashed and grey for those of another kind; what is no stage
    stands beside it."""
    of_unet = np.array([stage.startswith(("encoder", "decoder")) for stage in stages])
    styles = [_line_style(first_colour + index) for index in range(len(rows))] + len(more) * [
        {"color": "0.4", "marker": "x", "markersize": 5, "linestyle": "--"}]
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


MODEL_COLOURS = (*STRUCTURE_COLOURS, "#999999")
MODEL_HATCHES = ("", "///", "...", "xx", "\\\\\\", "|||", "--", "++")  # tell models apart in grey
_MOST_SLOTS = 28   # of bars side by side; more structures go to another row
_MOST_PANELS = 5   # side by side


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
        names = [_shortened(structure, 40) for structure, _ in row]
        room = [(len(having) + 1) * 9 * width / slots for _, having in row]  # characters
        tilted = any(len(name) > most for name, most in zip(names, room, strict=True))
        axes.set_xticks(ticks, names, parse_math=False, rotation_mode="anchor",
                        **({"rotation": 30, "ha": "right"} if tilted else {}))
        axes.tick_params(axis="x", length=0)
        axes.set(xlim=(-1, slots - 1), ylim=(0, 1), ylabel="Dice", yticks=np.linspace(0, 1, 6))
        axes.grid(axis="y", alpha=0.4)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, parse_math=False)
    handles = [Rectangle((0, 0), 1, 1, **_model_style(index)) for index in range(len(models))]
    names = [_shortened(model, 90) for model in models]
    _legend(figure, handles, names, max(1, int(13 * width) // (8 + max(map(len, names)))))
    save_figure(figure, path)


def _slots(row: Sequence[tuple[str, list[str]]]) -> int:
    """As many bars as would fill a row: its own and a gap behind each structure."""
    return sum(len(having) + 1 for _, having in row)


def _model_style(index: int) -> dict[str, Any]:
    """How the bars of a model look. The hatches move on where the colours start anew."""
    turn, colour = divmod(index, len(MODEL_COLOURS))
    return {"facecolor": MODEL_COLOURS[colour], "hatch": MODEL_HATCHES[(colour + turn) % len(MODEL_HATCHES)],
            "edgecolor": "black", "linewidth": 0.5}


def _draw_bar(axes: Axes, x: float, values: Sequence[float], model: int) -> None:
    there = [value for value in values if not np.isnan(value)]
    if not there:
        axes.text(x, 0.02, "in no case", rotation=90, ha="center", va="bottom", fontsize=7)
        return
    axes.bar(x, np.mean(there), 1, **_model_style(model))
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
        for axes, (name, masks) in zip(grid, [("image", {}), *case.panels], strict=False):
            low, high = _window(case)
            axes.imshow(case.image, cmap="gray", vmin=low, vmax=high, aspect=case.spacing[0] / case.spacing[1])
            axes.set(autoscale_on=False)
            axes.set_title(_wrapped(name), fontsize=7, parse_math=False)
            for order, structure in enumerate(sorted(masks, key=lambda name: -masks[name].sum())):  # regions may nest
                _draw_mask(axes, masks[structure], order=2 + order, **_structure_style(structures.index(structure)))
                if masks is not case.panels[0][1]:
                    _draw_outline(axes, case.panels[0][1][structure], order=4 + len(structures))
    styles = [_structure_style(index) for index in range(len(structures))]
    handles = [Rectangle((0, 0), 1, 1, facecolor=style["colour"], hatch=style["hatch"]) for style in styles]
    handles.append(Line2D([], [], color="white", linewidth=1, path_effects=[_HALO]))
    names = [*(_shortened(structure, 40) for structure in structures), "outline of the truth"]
    _legend(figure, handles, names, max(1, int(24 * columns) // (6 + max(map(len, names)))))
    save_figure(figure, path)


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


_HALO = withStroke(linewidth=1.6, foreground="black")


def _draw_outline(axes: Axes, mask: np.ndarray, order: int) -> None:
    if mask.any():
        lines = axes.contour(*_within_border(mask), levels=[0.5], colors=["white"], linewidths=0.7, zorder=order)
        lines.set_path_effects([_HALO])


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[:most - 3] + "..."


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """Below the figure. Names may hold dollars, or begin with an underscore, which keeps labels out of legends."""
    legend = figure.legend(handles, ["-"] * len(handles), loc="outside lower center", frameon=False, fontsize=9,
                           ncols=min(columns, len(handles)))
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def save_figure(figure: Figure, path: Path | BinaryIO, dpi: int = 150) -> None:
    """Write a figure; without the date and version that would make two runs differ."""
    add_fallback_fonts(figure)
    with without_remarks():
        figure.savefig(path, metadata={"Software": None}, dpi=dpi)


# What coefficients do to a merge (analysis/sweep.py). `marks` says which evaluation is the default and which the best.
_MARKERS = {"default": {"marker": "D", "s": 60}, "best": {"marker": "*", "s": 190}}
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
    low, high = (float(extreme([extreme(values) for values in dice.values()])) for extreme in (np.min, np.max))
    colours = {"cmap": "cividis", "vmin": low, "vmax": max(high, low + 1e-6)}
    for axes, (name, values) in zip(grid.flat, dice.items(), strict=False):
        if cells is None:
            drawn = axes.scatter(*points.T, c=values, s=34, edgecolors="0.3", linewidths=0.4, **colours)
            axes.set(**{f"{axis}lim": (lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
                        for axis, (lowest, highest) in zip("xy", ranges.values(), strict=True)})
        else:
            drawn = _draw_cells(axes, points, values, cells, colours)
        for which, row in marks.items():  # a dot keeps the colour of its Dice
            filled = {"color": "white"} if cells is not None else {"c": values[[row]], **colours}
            axes.scatter(*points[row], edgecolors="black", zorder=5, clip_on=False, **filled, **_MARKERS[which])
        there = "   ".join(f"{_MARKS[which]} {values[row]:.3f}" for which, row in marks.items())
        axes.set_title(f"{_shortened(name, 28)}\n{there}", fontsize=9, parse_math=False)
        axes.set_box_aspect(1)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    for axes in grid.flat[len(dice):]:
        axes.set_axis_off()
    names = [_shortened(name, 40) for name in ranges]
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
        axes.set_xlabel(_shortened(name, 40), parse_math=False)
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
        axes.scatter(*values.T, color="0.75", s=18, linewidths=0, label="evaluated")
        along = values[sorted(front, key=lambda row: values[row, 0])]
        axes.plot(*along.T, drawstyle="steps-pre", color=BLUE, marker="o", markersize=4, linewidth=1.2,
                  label="none is better in both")
        for set_label, name in zip((axes.set_xlabel, axes.set_ylabel), dice, strict=True):
            set_label(f"Dice of {_shortened(name, 40)}", parse_math=False)
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
        axes.set_xticks(where, [_shortened(name, 20) for name in dice], rotation=30, ha="right", parse_math=False)
        axes.set_ylabel("Dice")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=4 if len(dice) > 4 else 2, frameon=False)
    axes.set_title(title, fontsize=10, parse_math=False)
    save_figure(figure, path)


def _mark_legend(figure: Figure, names: Mapping[str, str]) -> None:
    handles = [Line2D([], [], linestyle="", marker=_MARKERS[which]["marker"], markerfacecolor="white",
                      markeredgecolor="black", markersize=7 + 5 * (which == "best")) for which in names]
    _legend(figure, handles, list(names.values()), len(names))


def save_plane_figure(losses: Mapping[tuple[float, float], Mapping[str, float]],
                      models: Mapping[str, tuple[float, float]], experts: int, path: Path) -> None:
    """The loss over a plane through models, a panel for each task and one for their mean (MuDSC, Fig. 3); every model
    marked: the first `experts` with dots, others with stars, numbered as the legend says."""
    places = np.array(list(losses))
    tasks = list(next(iter(losses.values())))
    values = {task: np.array([loss[task] for loss in losses.values()]) for task in tasks}
    if len(tasks) > 1:
        values = {"mean of the tasks": np.mean(list(values.values()), axis=0), **values}
    figure = Figure(figsize=(4.6 * len(values), 4.2 + 0.25 * len(models)), layout="constrained")
    row = figure.subplots(1, len(values), squeeze=False)
    for axes, (title, loss) in zip(row[0], values.items(), strict=True):
        finite = np.isfinite(loss)
        # beyond the upper half all is far too high: levels would tell nothing of the valley
        top = np.quantile(loss[finite], 0.75)
        levels = np.linspace(loss[finite].min(), max(top, loss[finite].min() + 1e-6), 16)
        filled = axes.tricontourf(*places[finite].T, loss[finite], levels=levels, cmap="cividis", extend="max")
        axes.tricontour(*places[finite].T, loss[finite], levels=levels, colors="white", linewidths=0.4)
        figure.colorbar(filled, ax=axes, label="loss", format="%.2f")
        for index, (x, y) in enumerate(models.values()):
            axes.plot(x, y, "o" if index < experts else "*", color="white", markeredgecolor="black",
                      markersize=8 if index < experts else 13)
            axes.annotate(str(index + 1), (x, y), (6, 6), textcoords="offset points", fontsize=10, color="black",
                          bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0})
        axes.set_title(title, parse_math=False)
        axes.set(xlabel="first principal component\n(distance of weights)",
                 ylabel="second principal component\n(distance of weights)", aspect="equal")
    handles = [Line2D([], [], linestyle="", marker="o" if index < experts else "*", color="white",
                      markeredgecolor="black", markersize=9) for index in range(len(models))]
    _legend(figure, handles, [f"{index}  {name}" for index, name in enumerate(models, 1)], 1)
    figure.suptitle("Loss over the plane closest to the models")
    save_figure(figure, path)


def save_lines_figure(losses: Mapping[tuple[str, float, float], Mapping[str, float]], labels: Sequence[str],
                      path: Path) -> None:
    """The loss along the line between each two models, a panel for each pair ("0-1", by their numbers) and a curve for
    each task."""
    pairs = list(dict.fromkeys(place[0] for place in losses))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    used = sorted({int(index) for pair in pairs for index in pair.split("-")})
    names = [f"{index + 1}  {labels[index]}" for index in used]
    figure = Figure(figsize=(max(4.4 * columns, 0.08 * max(map(len, names))), 3.2 * rows + 0.2 * len(used) + 0.6),
                    layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(pairs):]:
        axes.set_axis_off()
    for axes, pair in zip(grid.flat, pairs, strict=False):
        line = sorted((place[1], loss) for place, loss in losses.items() if place[0] == pair)
        one, other = (int(index) + 1 for index in pair.split("-"))
        for index, task in enumerate(line[0][1]):
            axes.plot([share for share, _ in line], [loss[task] for _, loss in line], label=task,
                      color=STRUCTURE_COLOURS[-1 - index % len(STRUCTURE_COLOURS)], marker="os^Dvx"[index % 6],
                      linestyle=("-", "--", ":", "-.")[index % 4])
        axes.set(xlabel=f"share of model {other}, the rest is model {one}", ylabel="loss",
                 title=f"between {one} and {other}")
        axes.grid(alpha=0.4)
        for text in axes.legend(title="" if len(line[0][1]) == 1 else "task").get_texts():
            text.set_parse_math(False)
    _legend(figure, [Line2D([], [], linestyle="") for _ in names], names, 1)
    figure.suptitle("Loss along the lines between models")
    save_figure(figure, path)
