"""Steps of a merged network towards what the experts say of a few images, without labels."""
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.device import BatchSize, with_gradients
from nnunet_transplant.ensemble import Teacher, dice_loss, divergence, teacher_of, teacher_passes
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts
from nnunet_transplant.volumes import Patch

DICE_WEIGHT = 0.3  # chosen in documentation/experiments/default_merge.md


def passes_of_steps(experts: Experts, settings: Mapping[str, Any]) -> float:
    """Of the teacher, and of the network forward and backward."""
    visits = settings["steps"] * experts.configuration.batch_size
    return teacher_passes(experts, visits) + 3 * visits


def descend(experts: Experts, network: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None],
            steps: int, seed: int, what: str) -> None:
    """So many steps of a network, in place, towards the ensemble (`distance`), a batch of the plans' size at a time.
    No labels, no augmentation.

    step: moves the network by the gradients of its parameters. The learning rates of the optimizer fall to 0 as a
    cosine.
    """
    teacher = teacher_of(experts)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = experts.configuration.batch_size
    batch_size = BatchSize(size, experts.device)
    for chosen in experts.bar(list(batches(len(experts.patches), size, steps, seed)), what):
        batch_size.run(partial(gradients, experts, network, teacher, [experts.patches[i] for i in chosen]))
        step()
        schedule.step()


def gradients(experts: Experts, network: nn.Module, teacher: Teacher, patches: Sequence[Patch], size: int) -> None:
    """Those of the distance from the teacher, the mean over the patches, of which so many pass the network at a time.
    """
    network.zero_grad()
    for start in range(0, len(patches), size):
        some = patches[start:start + size]
        target = teacher(some).float()
        with with_gradients(experts.device):
            logits = network(experts.images(some))
        (distance(logits.float(), target, experts.regions) * (len(some) / len(patches))).backward()


def distance(logits: torch.Tensor, target: torch.Tensor, regions: bool) -> torch.Tensor:
    """From the teacher, both logits (batch, rows, *size): the Kullback-Leibler divergence, a mean over voxels, which
    alone loses small structures, and a share of both forms of the Dice loss."""
    dice = dice_loss(logits, target, regions, 1) + dice_loss(logits, target, regions, 2)
    return divergence(logits, target, regions) + DICE_WEIGHT * dice


def state_of(network: nn.Module, like: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """A network's tensors by canonical name, of the types of others. Raises TransplantError for NaN and Inf."""
    canonical = canonical_names(network)
    found = {canonical[key]: tensor.detach().cpu().to(like[canonical[key]].dtype)
             for key, tensor in network.state_dict().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise TransplantError(f"-fit {name} diverged: give a smaller -lr")
    return like | found


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """So many batches of patches, each patch once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        del queue[:size]
