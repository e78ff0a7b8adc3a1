"""All weights of a merged model, pulled towards what the experts say."""
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import torch
from torch import nn

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.device import BatchSize, with_gradients
from nnunet_transplant.ensemble import Teacher, divergence
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.registry import fit
from nnunet_transplant.steps import Range, Seed
from nnunet_transplant.volumes import Patch


@fit("polish", "all weights, without labels: steps of AdamW towards the experts",
     reference="this package; after Distilling the Knowledge in a Neural Network, Hinton et al., 2015",
     url="https://arxiv.org/abs/1503.02531", passes=lambda experts, settings: (
         settings["steps"] * experts.configuration.batch_size * (len(experts.models) + 3)))
def polish(merged: dict[str, torch.Tensor], experts: Experts,
           steps: Annotated[int, "steps of AdamW", Range(1, 10 ** 6)] = 100,
           lr: Annotated[float, "learning rate at the start; it falls to 0 as a cosine", Range(1e-12, 1.0)] = 1e-3,
           seed: Seed = 0) -> dict[str, torch.Tensor]:
    """The merged tensors after some steps of AdamW that pull what the model says towards the ensemble: the mean over
    voxels of the Kullback-Leibler divergence from the ensemble's probabilities. No labels, no augmentation.

    Raises TransplantError where the weights become NaN or Inf.
    """
    teacher = experts.once("teacher", lambda: Teacher(experts))
    network = experts.merged_network(merged).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch_size = BatchSize(experts.configuration.batch_size, experts.device)
    for chosen in experts.bar(list(_batches(len(experts.patches), experts.configuration.batch_size, steps, seed)),
                              "polishing"):
        batch_size.run(partial(gradients, experts, network, teacher, [experts.patches[i] for i in chosen]))
        nn.utils.clip_grad_norm_(network.parameters(), 12)  # as nnU-Net
        optimizer.step()
        schedule.step()
    canonical = canonical_names(network)
    polished = {canonical[name]: tensor.detach().cpu().to(merged[canonical[name]].dtype)
                for name, tensor in network.state_dict().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in polished.values()):
        raise TransplantError("polishing diverged: give a smaller -lr")
    return merged | polished


def gradients(experts: Experts, network: nn.Module, teacher: Teacher, patches: Sequence[Patch], size: int) -> None:
    """Those of the divergence from the teacher, the mean over the patches, of which so many pass the network at a
    time."""
    network.zero_grad()
    for start in range(0, len(patches), size):
        some = patches[start:start + size]
        target = teacher(some).float()
        with with_gradients(experts.device):
            logits = network(experts.images(some))
        (divergence(logits.float(), target, experts.regions) * (len(some) / len(patches))).backward()


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """So many batches of patches, each patch once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        del queue[:size]
