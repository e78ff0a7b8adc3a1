"""Running statistics of batch norms, which weights that were merged or moved no longer fit.

An instance norm needs no such thing: it has no memory and takes the statistics of its input.
"""
import math

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.merging.calibration import Calibration


def has_running_statistics(names: list[str]) -> bool:
    return any(name.endswith(".running_mean") for name in names)


def recomputed(calibration: Calibration, network: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of a network on the calibration patches, by canonical name."""
    count = len(calibration.patches)
    parts = math.ceil(count / calibration.configuration.batch_size)  # as equal as can be: every batch counts the same
    batches = [calibration.patches[part * count // parts:(part + 1) * count // parts] for part in range(parts)]
    update_bn((calibration.images(batch) for batch in calibration.bar(batches, "running statistics")), network)
    canonical = canonical_names(network)
    return {canonical[name]: buffer.detach().cpu().clone() for name, buffer in network.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")}
