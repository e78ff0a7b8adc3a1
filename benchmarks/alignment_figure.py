"""The figure of documentation/alignment.md: which units of a small U-Net share one permutation.

    python benchmarks/alignment_figure.py documentation/alignment.png
"""
import re
import sys
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_transplant.alignment.spec import derive
from nnunet_transplant.plotting import save_units_figure

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
