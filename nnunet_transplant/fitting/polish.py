"""All weights of a merged model, pulled towards what the experts say."""
from typing import Annotated

import torch
from torch import nn

from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.descent import descend, passes_of_steps, state_of
from nnunet_transplant.fitting.registry import fit
from nnunet_transplant.steps import MANY_PATCHES, Range, Seed


@fit("polish", "all weights, without labels: steps of AdamW towards the experts",
     reference="this package; after Distilling the Knowledge in a Neural Network, Hinton et al., 2015",
     url="https://arxiv.org/abs/1503.02531", passes=passes_of_steps, n_patches=MANY_PATCHES)
def polish(merged: dict[str, torch.Tensor], experts: Experts,
           steps: Annotated[int, "steps of AdamW", Range(1, 10 ** 6)] = 100,
           lr: Annotated[float, "learning rate at the start; it falls to 0 as a cosine", Range(1e-12, 1.0)] = 1e-3,
           seed: Seed = 0) -> dict[str, torch.Tensor]:
    """The merged tensors after some steps of AdamW towards the ensemble (see `descend`).

    Raises TransplantError where the weights become NaN or Inf.
    """
    network = experts.merged_network(merged).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.0)

    def step() -> None:
        nn.utils.clip_grad_norm_(network.parameters(), 12)  # as nnU-Net
        optimizer.step()
    descend(experts, network, optimizer, step, steps, seed, "polishing")
    return state_of(network, merged, "polish")
