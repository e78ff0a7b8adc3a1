"""nnU-Net's loss of logits, against the labels of patches."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_transplant.heads import head_rows
from nnunet_transplant.labels import has_regions
from nnunet_transplant.volumes import IGNORED, Patch, targets_of

Loss = Callable[[torch.Tensor, Sequence[Patch]], torch.Tensor]  # logits (patches, rows, *size), the patches


def segmentation_loss(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], batch_dice: bool,
                      device: torch.device) -> Loss:
    """nnU-Net's own, for a model of these plans and labels: Dice and cross-entropy, or for regions Dice and binary
    cross-entropy. Logits of a lower resolution than the patches are compared with labels of theirs, as in deep
    supervision.

    batch_dice: Dice over all patches of a batch together, or of each."""
    regions = has_regions(dataset_json["labels"])
    soft_dice = {"batch_dice": batch_dice, "do_bg": regions, "smooth": 1e-5, "ddp": False}
    dice = MemoryEfficientSoftDiceLoss
    if regions:
        region_loss = DC_and_BCE_loss({}, soft_dice, use_ignore_label=True, dice_class=dice)

        def of_regions(logits: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
            target = _at_size(targets_of(patches, plans, dataset_json, device), logits)
            mask = (target[:, :1] == IGNORED).to(target.dtype)  # nnU-Net wants it as the last channel
            return region_loss(logits, torch.cat([target.clamp(min=0), mask], 1))
        return of_regions
    ignored = 1 + max(head_rows(plans, dataset_json).values())  # nnU-Net's number
    label_loss = DC_and_CE_loss(soft_dice, {}, ignore_label=ignored, dice_class=dice)

    def of_labels(logits: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
        target = _at_size(targets_of(patches, plans, dataset_json, device)[:, None], logits)
        return label_loss(logits, torch.where(target == IGNORED, ignored, target))
    return of_labels


def _at_size(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(batch, channels, *size of the logits), as nnU-Net makes the labels of deep supervision."""
    if target.shape[2:] == logits.shape[2:]:
        return target
    return nn.functional.interpolate(target.float(), logits.shape[2:], mode="nearest-exact").to(target.dtype)
