"""What figures share: colours, how names and masks are drawn, and how a figure is saved."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_transplant.figures.fonts import add_fallback_fonts, without_remarks

# Okabe and Ito's palette for colour-blind readers
BLUE = "#0072B2"
STRUCTURE_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2")
MODEL_COLOURS = (*STRUCTURE_COLOURS, "#999999")
MODEL_HATCHES = ("", "///", "...", "xx", "\\\\\\", "|||", "--", "++")  # tell models apart in grey


def save_figure(figure: Figure, path: Path | BinaryIO, dpi: int = 150) -> None:
    """Write a figure; without the date and version that would make two runs differ."""
    add_fallback_fonts(figure)
    with without_remarks():
        figure.savefig(path, metadata={"Software": None}, dpi=dpi)


def add_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """Below the figure. Names may hold dollars, or begin with an underscore, which keeps labels out of legends."""
    legend = figure.legend(handles, ["-"] * len(handles), loc="outside lower center", frameon=False, fontsize=9,
                           ncols=min(columns, len(handles)))
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[:most - 3] + "..."


def model_style(index: int) -> dict[str, Any]:
    """How the bars of a model look. The hatches move on where the colours start anew."""
    turn, colour = divmod(index, len(MODEL_COLOURS))
    return {"facecolor": MODEL_COLOURS[colour], "hatch": MODEL_HATCHES[(colour + turn) % len(MODEL_HATCHES)],
            "edgecolor": "black", "linewidth": 0.5}


def draw_mask(axes: Axes, mask: np.ndarray, colour: str, order: int, hatch: str | None = None) -> None:
    """Fill what is in a mask (rows, columns)."""
    if mask.any():
        parts = within_border(mask)
        axes.contourf(*parts, levels=[0.5, 1.5], colors=[colour], alpha=0.55, hatches=[hatch], zorder=order)
        axes.contour(*parts, levels=[0.5], colors=[colour], linewidths=1, zorder=order + 1)


def within_border(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mask with a border of nothing, which closes its contours at the edge, and where its columns and rows lie."""
    rows, columns = mask.shape
    return np.arange(-1, columns + 1), np.arange(-1, rows + 1), np.pad(mask.astype(float), 1)
