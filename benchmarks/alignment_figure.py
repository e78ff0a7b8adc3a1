"""The figure of documentation/reference/alignment.md: which units of a small U-Net share one permutation.

    python benchmarks/alignment_figure.py documentation/reference/alignment.png
"""
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.figures.common import save_figure

STAGES = 3


def place(tensor: str) -> tuple[int, int] | None:
    """Column and row of a convolution: down on the left, up on the right."""
    if found := re.search(r"encoder\.stages\.(\d)\.0\.convs\.(\d).*0\.weight$", tensor):
        return 2 * int(found[1]) + int(found[2]), int(found[1])
    if found := re.search(r"transpconvs\.(\d)\.weight$", tensor):
        return 2 * STAGES + 3 * int(found[1]), STAGES - 1 - int(found[1])
    if found := re.search(r"decoder\.stages\.(\d)\.convs\.(\d).*0\.weight$", tensor):
        return 2 * STAGES + 3 * int(found[1]) + 1 + int(found[2]), STAGES - 2 - int(found[1])
    if re.search(rf"seg_layers\.{STAGES - 2}\.weight$", tensor):
        return 2 * STAGES + 3 * (STAGES - 1), 0
    return None


def save_units_figure(groups: Mapping[str, Sequence[tuple[str, bool]]], columns: Mapping[str, tuple[int, int]],
                      path: Path) -> None:
    """What is matched with what in a U-Net: every tensor that makes or reads units as a box, with a bar of its group's
    colour on the right for the units it makes, and bars on the left, one above the other, for those it reads.

    groups: by name, the tensors that it has a part in, and whether they read its units.
    columns: where to draw each tensor: (column, row), rows from the top.
    """
    colours = colormaps["tab20"](range(20))
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


def main() -> None:
    network = PlainConvUNet(1, STAGES, [4, 8, 16], torch.nn.Conv3d, 3, [1, 2, 2], 2, 3, 2, True,
                            torch.nn.InstanceNorm3d, {"affine": True}, None, None, torch.nn.LeakyReLU, None, True)
    spec = derive(network, (1, 1, 8, 8, 8))
    tensors = {s.tensor for group in spec.groups.values() for s in group.segments}
    columns = {tensor: where for tensor in tensors if (where := place(tensor)) is not None}
    groups = {name: [(s.tensor, s.reads) for s in group.segments] for name, group in spec.groups.items()}
    save_units_figure(groups, columns, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
