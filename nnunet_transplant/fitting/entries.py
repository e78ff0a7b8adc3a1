"""One coefficient for every entry of every task vector, learned towards what the experts say.

    theta = theta_0 + sum_t lambda_t * tau_t        (entry by entry; lambda_t of the shape of tau_t)

Adam steps of the lambda_t need no more memory than those of one network, whatever the number of tasks. The gradient of
lambda_t is tau_t times that of theta, and Adam divides a gradient by its own size: of one entry all lambda_t take the
same step, but for the sign of tau_t, and theta moves by that step times S = sum_t |tau_t|. So one number x for each
entry is learned instead, with theta = merged + x S / mean(S); lambda_t is its start plus sign(tau_t) x / mean(S). Exact
but for Adam's epsilon. An entry that no expert moved stays; one that they moved much may go far. A learning rate is the
mean step of a weight, so that one rate suits two experts that are near to their base, and twenty, and strangers.
"""
from collections.abc import Iterable
from typing import Annotated

import torch

from nnunet_transplant.architecture import canonical_parameters
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.descent import descend, passes_of_steps, state_of
from nnunet_transplant.fitting.registry import fit
from nnunet_transplant.steps import MANY_PATCHES, Range, Seed
from nnunet_transplant.vectors import TaskVectors, added_up

HEAD_LR = 1e-3  # of the heads, which have no common base: AdamW's own, as the trainers'


@fit("entries", "a coefficient for every entry of the task vectors, and the head, without labels",
     reference="this package; after Editing Models with Task Arithmetic, Ilharco et al., ICLR 2023",
     url="https://arxiv.org/abs/2212.04089", passes=passes_of_steps, n_patches=MANY_PATCHES)
def entries(merged: dict[str, torch.Tensor], experts: Experts, vectors: TaskVectors,
            steps: Annotated[int, "steps of Adam", Range(1, 10 ** 6)] = 300,
            lr: Annotated[float, "learning rate at the start, the mean step of a weight; it falls to 0 as a cosine",
                          Range(1e-12, 1.0)] = 5e-4,
            seed: Seed = 0) -> dict[str, torch.Tensor]:
    """The merged tensors, each entry moved by learned multiples of its task vectors' entries, and the heads, towards
    the ensemble (see `descend`).

    Raises TransplantError where the weights become NaN or Inf.
    """
    network = experts.merged_network(merged).requires_grad_(True)
    parameters = canonical_parameters(network)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items() if name in vectors.names}
    reach = reach_of(vectors, start, experts.device)
    x = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    heads = [parameter for name, parameter in parameters.items() if name not in start]
    optimizer = torch.optim.Adam([{"params": list(x.values()), "lr": lr}, {"params": heads, "lr": HEAD_LR}])

    def step() -> None:
        for name, tensor in x.items():
            gradient = parameters[name].grad
            tensor.grad = None if gradient is None else gradient.mul_(reach[name])
        optimizer.step()
        with torch.no_grad():
            for name, tensor in x.items():
                torch.addcmul(start[name], reach[name], tensor, out=parameters[name].data)
    descend(experts, network, optimizer, step, steps, seed, "learning coefficients")
    return state_of(network, merged, "entries")


def reach_of(vectors: TaskVectors, names: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
    """sum_t |tau_t| by tensor, divided by its mean over the entries of all of them."""
    found = {name: added_up(tau.abs() for tau in vectors.block(name).taus) for name in names}
    total = sum(float(tensor.double().sum()) for tensor in found.values())
    mean = total / sum(tensor.numel() for tensor in found.values())
    return {name: (tensor / mean if mean > 0 else tensor).to(device) for name, tensor in found.items()}
