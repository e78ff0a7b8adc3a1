"""Methods that thin every task vector out before they add them: DARE, DELLA, Model Breadcrumbs."""
import hashlib
from typing import Annotated, Literal

import numpy as np
import torch

from nnunet_transplant.methods.registry import FREE_MEAN, RATIOS, Lambda, method
from nnunet_transplant.methods.ties import disjoint_mean
from nnunet_transplant.steps import Range, Seed
from nnunet_transplant.vectors import TINY, Tensors, add_weighted, keep_from, kept, kth_largest


def uniform_like(tau: torch.Tensor, tensors: Tensors, model: int, seed: int) -> torch.Tensor:
    """Uniform random numbers in [0, 1) that depend on the seed, the model's position and the place in the network, not
    on the order in which places are visited."""
    place = hashlib.blake2b(f"{seed} {model} {tensors.name} {tensors.start}".encode(), digest_size=8).digest()
    return torch.rand(tau.shape, generator=torch.Generator().manual_seed(int.from_bytes(place, "little") >> 1))


@method("dare", "drop entries of each task vector at random and rescale the rest, then add or elect signs",
        reference="Language Models are Super Mario, Yu et al., ICML 2024", url="https://arxiv.org/abs/2311.03099",
        weights=FREE_MEAN, needs=("base",), by_entry=True)
def dare(tensors: Tensors, density: Annotated[float, "share of entries that survive", Range(1e-4, 1.0)] = 0.1,
         lambda_: Lambda = 1.0,
         combine: Annotated[Literal["linear", "ties"], "how the thinned task vectors are merged: weighted sum, or "
                            "TIES' election of signs"] = "linear",
         seed: Seed = 0) -> torch.Tensor:
    """Drop entries of every task vector at random, scale the others by 1 / density, then add (linear) or elect signs
    (ties; a task vector of negative weight counts as its opposite, of that weight without its sign)."""
    taus = []
    for model, tau in enumerate(tensors.taus):
        random = uniform_like(tau, tensors, model, seed)
        taus.append(torch.lt(random, density, out=random).mul_(tau).div_(density))
    if combine == "linear":
        weights = [weight * lambda_ for weight in tensors.weights]
        return add_weighted(tensors.theta_0.clone(), taus, weights)
    taus = [tau if weight >= 0 else tau.neg_() for tau, weight in zip(taus, tensors.weights, strict=True)]
    weights = [abs(weight) for weight in tensors.weights]
    return disjoint_mean(taus, weights).mul_(lambda_).add_(tensors.theta_0)


@method("della", "drop entries at random, small ones more often, rescale, elect signs, average",
        reference="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling, Deep et "
        "al., 2024", url="https://arxiv.org/abs/2406.11617", weights=RATIOS, needs=("base",))
def della(tensors: Tensors, density: Annotated[float, "mean share of entries that survive", Range(1e-4, 1.0)] = 0.5,
          epsilon: Annotated[float, "how much likelier the largest entry of a row survives than the smallest",
                             Range(0.0, 1.0)] = 0.2,
          lambda_: Lambda = 1.0, seed: Seed = 0) -> torch.Tensor:
    """MagPrune, elect, fuse: as DARE with TIES, but larger entries are kept more often. Within a row of a matrix (the
    weights of one output unit) the chance to be kept grows evenly with the rank of the magnitude, from
    density - epsilon / 2 to density + epsilon / 2; what is kept is divided by its chance."""
    taus = []
    for model, tau in enumerate(tensors.taus):
        rows = tau.flatten(1) if tau.dim() > 1 else tau.reshape(1, -1)
        length = rows.shape[1]
        rank = torch.arange(length) / (length - 1) if length > 1 else torch.tensor([0.5])
        chance = (density + epsilon * (rank - 0.5)).clamp_(0.0, 1.0)
        by_rank = torch.from_numpy(np.argsort(rows.abs().numpy(), axis=1))  # numpy's is many times faster
        random = uniform_like(rows, tensors, model, seed)
        keep = torch.lt(random, chance, out=random).div_(chance.clamp(min=TINY))  # of each rank, for each row
        taus.append(rows.mul(torch.empty_like(rows).scatter_(1, by_rank, keep)).reshape(tau.shape))
    return disjoint_mean(taus, tensors.weights).mul_(lambda_).add_(tensors.theta_0)


@method("breadcrumbs", "leave out the largest and the many small entries of each tensor of a task vector, add",
        reference="Model Breadcrumbs, Davari and Belilovsky, ECCV 2024", url="https://arxiv.org/abs/2312.06795",
        weights=FREE_MEAN, needs=("base",))
def breadcrumbs(tensors: Tensors,
                density: Annotated[float, "share of a tensor's entries that are kept", Range(0.0, 1.0)] = 0.15,
                gamma: Annotated[float, "share of its largest entries that are left out", Range(0.0, 1.0)] = 0.01,
                ) -> torch.Tensor:
    """Leave out of each tensor of each task vector the gamma share of largest entries and all but the density share of
    the next largest."""
    return add_weighted(tensors.theta_0.clone(), [middle(tau, density, gamma) for tau in tensors.taus], tensors.weights)


def middle(tau: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    magnitudes = tau.abs().reshape(-1).numpy()
    outliers = min(round(gamma * magnitudes.size), magnitudes.size - 1)
    count = min(kept(density, magnitudes.size), magnitudes.size - outliers)
    largest, smallest = kth_largest(magnitudes, outliers + 1), kth_largest(magnitudes, outliers + count)
    middle = keep_from(tau, smallest) if smallest > 0 else tau
    return middle - torch.nn.functional.hardshrink(tau, largest)  # which keeps only what is larger

