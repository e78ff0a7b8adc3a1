"""Every figure of the package."""
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import SimpleITK

matplotlib.use("agg")

import matplotlib.pyplot as plt

# Okabe and Ito's palette for colour-blind readers
BLUE = "#0072B2"
STRUCTURE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")


def save_inputs_figure(provenance: dict[str, Any], path: Path) -> None:
    """What a merged fold has in place of nnU-Net's progress.png: its inputs and their weights."""
    inputs = provenance["inputs"]
    names = [f"{Path(one['path']).parent.parent.parent.name} fold {one['fold']}: {', '.join(one['structures'])}"
             for one in inputs]
    names = [name if len(name) <= 80 else name[:77] + "..." for name in names]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(inputs)), layout="constrained")
    axes.barh(range(len(inputs)), [one["weight"] for one in inputs], color=BLUE)
    axes.set_yticks(range(len(inputs)), names, parse_math=False)  # a name may hold dollars
    axes.invert_yaxis()
    axes.set(title=f"Merged by {provenance['method']}", xlabel="weight")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
        figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


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
    views = [(axis, int(_kinds(masks[0], axis).argmax())) for axis in (0, 1)]
    low, high = np.percentile(volume[foreground], [1, 99])
    margin = 1.5 * (high - low)
    figure, grid = plt.subplots(2, len(panels) + 1, figsize=(2.3 * (len(panels) + 1), 4.6), layout="constrained")
    for row, (axis, index) in zip(grid, views, strict=True):
        in_plane = np.delete(spacing, axis)
        for column, axes in enumerate(row):
            # rows of a coronal slice run from foot to head: show the head above
            axes.imshow(np.take(volume, index, axis), cmap="gray", vmin=low - margin, vmax=high + margin / 2,
                        origin="lower" if axis else "upper", aspect=in_plane[0] / in_plane[1])
            axes.set_axis_off()
            if axis == 0:
                axes.set_title("image" if column == 0 else panels[column - 1][0], fontsize=9)
            for i, (name, mask) in enumerate(masks[column - 1].items() if column else ()):
                colour = STRUCTURE_COLOURS[structures.index(name) % len(STRUCTURE_COLOURS)]
                part = np.take(mask, index, axis).astype(float)
                if part.any():
                    axes.contourf(part, levels=[0.5, 1.5], colors=[colour], alpha=0.55, zorder=2 + i)
                    axes.contour(part, levels=[0.5], colors=[colour], linewidths=1, zorder=3 + i)
    handles = [plt.Rectangle((0, 0), 1, 1, color=STRUCTURE_COLOURS[i % len(STRUCTURE_COLOURS)])
               for i in range(len(structures))]
    figure.legend(handles, structures, loc="outside lower center", ncols=len(structures), frameon=False)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _kinds(masks: dict[str, np.ndarray], axis: int) -> np.ndarray:
    """How much there is to see in each slice: first the number of structures, then the share of each."""
    areas = np.stack([mask.sum(axis=tuple(other for other in range(3) if other != axis)) for mask in masks.values()])
    return (areas > 0).sum(0) + (areas / areas.max(1, keepdims=True).clip(1)).mean(0)


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
    colours = plt.get_cmap("tab20").colors
    figure, axes = plt.subplots(figsize=(1.3 * (1 + max(x for x, _ in columns.values())),
                                         1.1 * (1 + max(y for _, y in columns.values()))), layout="constrained")
    reads = {tensor: [name for name, parts in groups.items() if (tensor, True) in parts] for tensor in columns}
    for tensor, (x, y) in columns.items():
        transposed, head = "transpconv" in tensor, "seg_layers" in tensor
        axes.add_patch(plt.Rectangle((x - 0.36, -y - 0.3), 0.72, 0.6, facecolor="white", edgecolor="0.3"))
        axes.text(x, -y, "head" if head else "up" if transposed else "conv", ha="center", va="center", fontsize=8)
        for i, name in enumerate(reads[tensor]):
            height = 0.6 / len(reads[tensor])
            axes.add_patch(plt.Rectangle((x - 0.36, -y + 0.3 - (i + 1) * height), 0.12, height,
                                         color=colours[list(groups).index(name) % 20]))
        for index, (name, parts) in enumerate(groups.items()):
            if (tensor, False) in parts:
                axes.add_patch(plt.Rectangle((x + 0.24, -y - 0.3), 0.12, 0.6, color=colours[index % 20]))
                for other, (to_x, to_y) in columns.items():
                    if name in reads[other]:
                        i, height = reads[other].index(name), 0.6 / len(reads[other])
                        axes.annotate("", (to_x - 0.36, -to_y + 0.3 - (i + 0.5) * height), (x + 0.36, -y),
                                      arrowprops={"arrowstyle": "->", "color": colours[index % 20], "lw": 1.2})
    axes.set_xlim(-0.6, max(x for x, _ in columns.values()) + 0.6)
    axes.set_ylim(-max(y for _, y in columns.values()) - 0.6, 0.6)
    axes.set_axis_off()
    figure.savefig(path, metadata={"Software": None}, dpi=130)
    plt.close(figure)


def save_barrier_figure(positions: Sequence[float], losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """The loss along the line from one model (0) to another (1), a line for each way to align them."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, values), colour in zip(losses.items(), STRUCTURE_COLOURS, strict=False):
        axes.plot(positions, values, marker="o", color=colour, label=name)
    axes.set(xlabel="share of the second model's weights", ylabel="loss")
    axes.legend()
    figure.savefig(path, metadata={"Software": None}, dpi=130)
    plt.close(figure)
