"""Segmentations of one image side by side."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nnunet_transplant.figures.common import STRUCTURE_COLOURS, draw_mask, save_figure
from nnunet_transplant.figures.evaluation import slice_to_show


def save_segmentations_figure(image: Path, panels: Sequence[tuple[str, Path, dict[str, int]]],
                              structures: Sequence[str], path: Path) -> None:
    """An image and several segmentations of it side by side, in the axial and the coronal slice with most structure.

    panels: title, segmentation file, and structure -> label value in it. structures: what is drawn, each in one colour
    in all panels. The first panel (the truth) says which slices are shown.
    """
    volume, spacing = _read(image)
    masks: list[dict[str, np.ndarray]] = []
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
            for i, (name, mask) in enumerate((masks[column - 1] if column else {}).items()):
                colour = STRUCTURE_COLOURS[structures.index(name) % len(STRUCTURE_COLOURS)]
                draw_mask(axes, np.take(mask, index, axis), colour, order=2 + i)
    handles = [Rectangle((0, 0), 1, 1, color=STRUCTURE_COLOURS[i % len(STRUCTURE_COLOURS)])
               for i in range(len(structures))]
    figure.legend(handles, structures, loc="outside lower center", ncols=len(structures), frameon=False)
    save_figure(figure, path)


def _areas(masks: dict[str, np.ndarray], axis: int) -> np.ndarray:
    return np.stack([mask.sum(axis=tuple(other for other in range(3) if other != axis)) for mask in masks.values()])


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = SimpleITK.ReadImage(str(path))
    return SimpleITK.GetArrayFromImage(image), np.array(image.GetSpacing())[::-1]
