"""Small 2d models as an ensemble that teaches a merged one, on random patches."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from expert_models import equal_weights, experts_with
from factory import small_plans, write_model
from permuted import LABELS
from torch.distributions import Bernoulli, Categorical, kl_divergence

from nnunet_transplant.data.cases import Cases
from nnunet_transplant.ensemble import ensemble_logits
from nnunet_transplant.experts import Experts
from nnunet_transplant.volumes import Patch

PLANS = small_plans(2)
SOFTMAX = {"a": {"background": 0, "Liver": 1, "Spleen": 2}, "b": {"background": 0, "Kidney": 1, "Liver": 2}}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def opened(folders: Sequence[Path], patches: int = 3, values: Sequence[np.ndarray] | None = None,
           own: dict | None = None) -> Experts:
    """Random patches for models of equal weights. own: the labels of the dataset that they are from."""
    generator = torch.Generator().manual_seed(0)
    cases = Cases("Dataset001_X", {"labels": own or LABELS}, {})
    return experts_with(folders, [
        Patch(torch.randn(1, 16, 16, generator=generator), None if values is None else values[i], cases)
        for i in range(patches)])


def write_same(folder: Path) -> list[Path]:
    return [write_model(folder / f"same_{seed}", LABELS, plans=PLANS, seed=seed) for seed in range(3)]


def write_tasks(folder: Path) -> list[Path]:
    return [write_model(folder / name, labels, plans=PLANS, seed=seed)
            for seed, (name, labels) in enumerate(SOFTMAX.items())]


def mean_of(experts: Experts) -> dict[str, torch.Tensor]:
    """The tensors that merge plainly, as a student."""
    first = experts.tensors[0]
    return {name: sum(tensors[name] for tensors in experts.tensors) / len(experts.tensors)
            if tensor.shape == experts.tensors[-1][name].shape and tensor.is_floating_point() else tensor.clone()
            for name, tensor in first.items()} | experts.heads(equal_weights(experts.models))


def loss_of(experts: Experts, tensors: dict[str, torch.Tensor], regions: bool) -> float:
    teacher = torch.stack([*ensemble_logits(experts)]).float()
    images = torch.stack([patch.image for patch in experts.patches])
    with torch.no_grad():
        said = experts.merged_network(tensors)(images)
    return kl_divergence(distribution(teacher, regions), distribution(said, regions)).mean().item()


def distribution(logits: torch.Tensor, regions: bool) -> Bernoulli | Categorical:
    """Of every voxel, logits (batch, rows, ...)."""
    return Bernoulli(logits=logits) if regions else Categorical(logits=logits.movedim(1, -1))


def plain_dice_loss(student: torch.Tensor, teacher: torch.Tensor, regions: bool, power: int) -> float:
    """Patch by patch, structure by structure: 1 - 2 sum(p q) / (sum(p^2) + sum(q^2)), or 1 - 2 sum(min(p, q)) / (sum(p)
    + sum(q))."""
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        losses.append(0.0)
        for row in range(0 if regions else 1, len(mine)):
            p, q = (logits.sigmoid()[row] if regions else logits.softmax(0)[row] for logits in (mine, theirs))
            seen = theirs[row] > 0 if regions else theirs.argmax(0) == row
            if seen.any():
                both = torch.minimum(p, q) if power == 1 else p * q
                losses[-1] += float(1 - 2 * both.sum() / (p ** power + q ** power).sum())
    return float(np.mean(losses))
