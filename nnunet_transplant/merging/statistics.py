"""Running statistics of batch norms, which weights that were merged or moved no longer fit.

An instance norm needs no such thing: it has no memory and takes the statistics of its input.
"""
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.merging.calibration import Calibration


def has_running_statistics(names: list[str]) -> bool:
    return any(name.endswith(".running_mean") for name in names)


def recomputed(calibration: Calibration, network: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of a network on the calibration patches, by canonical name."""
    size = calibration.configuration.batch_size
    batches = [calibration.patches[start:start + size] for start in range(0, len(calibration.patches), size)]
    update_bn((calibration.images(batch) for batch in calibration.bar(batches, "running statistics")), network)
    canonical = canonical_names(network)
    return {canonical[name]: buffer.detach().cpu().clone() for name, buffer in network.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")}
