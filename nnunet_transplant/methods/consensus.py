"""Methods that weigh, entry by entry, what the tasks say about it: TALL masks, MagMax, competition balancing."""
from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
import torch

from nnunet_transplant.methods.registry import FREE_MEAN, RATIOS, Lambda, method
from nnunet_transplant.steps import Range
from nnunet_transplant.vectors import (
    TINY,
    TaskVectors,
    Tensors,
    add_weighted,
    added_up,
    at_least,
    in_parallel,
    kept,
    kth_largest_magnitude,
    kth_largest_of_parts,
    where_one,
)

CLIPPED = 1e-4  # share of smallest and of largest magnitudes that competition balancing clips
LARGEST_EXPONENT = 60  # exp of 89 is Inf in float32


@method("consensus", "keep what at least k tasks use (TALL masks), at theta_0 what fewer do",
        reference="Localizing Task Information for Improved Model Merging and Compression, Wang et al., ICML 2024",
        url="https://arxiv.org/abs/2405.07813", weights=FREE_MEAN, needs=("base",), by_entry=True)
def consensus(tensors: Tensors,
              tall_lambda: Annotated[float, "how strict a task's mask is; higher keeps less", Range(0.0, 10.0)] = 0.4,
              k: Annotated[int, "an entry is kept where at least this many tasks use it", Range(1, 1000)] = 2,
              ) -> torch.Tensor:
    """Task t uses an entry where |tau_t| >= tall_lambda |sum_s tau_s - tau_t| (its TALL mask); entries that fewer than
    k tasks use (at most all of them) stay at theta_0."""
    total = added_up(tensors.taus)
    users = added_up([at_least(tau.abs(), (total - tau).abs_().mul_(tall_lambda)) for tau in tensors.taus])
    agreed = at_least(users, torch.tensor(float(min(k, len(tensors.taus)))))
    merged = add_weighted(torch.zeros_like(total), tensors.taus, tensors.weights)
    return merged.mul_(agreed).add_(tensors.theta_0)


@method("magmax", "entry by entry the task vector of largest magnitude",
        reference="MagMax: Leveraging Model Merging for Seamless Continual Learning, Marczak et al., ECCV 2024",
        url="https://arxiv.org/abs/2407.06322", weights=RATIOS, needs=("base",), by_entry=True)
def magmax(tensors: Tensors, lambda_: Lambda = 1.0) -> torch.Tensor:
    """theta_0 + lambda tau_s, where entry by entry s is the task of the largest w_s |tau_s|, the first of equals;
    tasks of weight 0 are left out."""
    weighted = [(tau, weight) for tau, weight in zip(tensors.taus, tensors.weights, strict=True) if weight > 0]
    best, largest = weighted[0][0], weighted[0][1] * weighted[0][0].abs()
    for tau, weight in weighted[1:]:
        magnitude = tau.abs().mul_(weight)
        best = where_one(at_least(largest, magnitude), best, tau)
        largest = torch.maximum(largest, magnitude)
    return tensors.theta_0.add(best, alpha=lambda_)


def competition(vectors: TaskVectors, density: float) -> list[tuple[float, float, float, float]]:
    """For each model, over its whole task vector: the bounds that its magnitudes are clipped to (the 0.01 % smallest
    and largest), the smallest score that is kept and the largest score. Block by block: no whole vector is in memory.
    """
    count = len(vectors.thetas)
    size = sum(tensor.numel() for tensor in vectors.thetas[0].values())
    few = round(CLIPPED * size)

    def of_model(model: int) -> tuple[float, float, float, float]:
        low, high = (kth_largest_magnitude(vectors, model, k) for k in (size - few, 1 + few))

        def scores() -> Iterator[np.ndarray]:
            for block in vectors.blocks():
                yield score(block.taus[model], added_up(block.taus), low, high, count).reshape(-1).numpy()
        smallest = kth_largest_of_parts(scores, size, kept(density, size))
        return low, high, smallest, max((float(part.max(initial=-np.inf)) for part in scores()), default=-np.inf)
    return list(in_parallel(of_model, range(count)))


def score(tau: torch.Tensor, total: torch.Tensor, low: float, high: float, models: int) -> torch.Tensor:
    """How strongly a task claims each entry: intra-balancing exp(T n^2), where n is |tau_t| clipped and scaled to
    [0, 1], times inter-balancing tanh(tau_t sum_s tau_s). Of many models all scores are smaller by one factor, which
    cancels out."""
    exponent = (tau.abs().clamp_(low, high) - low).div_(max(high - low, TINY)).square_().mul_(models)
    if models > LARGEST_EXPONENT:
        exponent.sub_(models - LARGEST_EXPONENT)
    return exponent.exp_().mul_((tau * total).tanh_())


@method("pcb", "parameter competition balancing: entry by entry weights from magnitude and agreement",
        reference="Parameter Competition Balancing for Model Merging, Du et al., NeurIPS 2024 (as its published code "
        "computes it)", url="https://arxiv.org/abs/2410.02396", weights=RATIOS, needs=("base",), by_entry=True)
def pcb(vectors: TaskVectors,
        density: Annotated[float, "share of a task vector's entries that compete", Range(0.0, 1.0)] = 0.1,
        lambda_: Lambda = 1.0) -> Callable[[Tensors], torch.Tensor]:
    """theta_0 + lambda sum_t b_t tau_t / sum_t b_t, entry by entry, where b_t is the task's score, zero where it is not
    among the density share of its task's largest, scaled to [0, 1]."""
    bounds = competition(vectors, density)

    def merge(tensors: Tensors) -> torch.Tensor:
        total = added_up(tensors.taus)
        merged, claims = torch.zeros_like(total), torch.zeros_like(total)
        for tau, weight, (low, high, smallest, largest) in zip(tensors.taus, tensors.weights, bounds, strict=True):
            claim = score(tau, total, low, high, len(tensors.taus)).sub_(smallest).clamp_(min=0.0)
            claim.mul_(weight / max(largest - smallest, TINY))
            merged.addcmul_(claim, tau.abs().clamp_(low, high).mul_(tau.sgn()))
            claims.add_(claim)
        return merged.div_(claims.clamp_(min=TINY)).mul_(lambda_).add_(tensors.theta_0)
    return merge

