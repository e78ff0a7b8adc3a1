"""TIES merging: trim, elect sign, disjoint mean (Yadav et al., NeurIPS 2023)."""
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch

from nnunet_transplant.methods.registry import RATIOS, Lambda, method
from nnunet_transplant.steps import Range
from nnunet_transplant.vectors import (
    TINY,
    TaskVectors,
    Tensors,
    add_weighted,
    in_parallel,
    keep_from,
    kept,
    kth_largest,
    kth_largest_magnitude,
)


def thresholds(vectors: TaskVectors, density: float, trim: str) -> list[dict[str, float]]:
    """For each model the magnitude of the smallest entry that trimming keeps, by tensor name: of the whole task vector,
    or of each tensor. Entries as large as it are all kept. Density 1 keeps everything: the threshold is 0."""
    def of_model(model: int) -> dict[str, float]:
        if density >= 1:
            return dict.fromkeys(vectors.names, 0.0)
        if trim == "tensor":
            taus = zip(vectors.names, vectors.tau(model), strict=True)
            return {name: smallest_kept(tau, density) for name, tau in taus}
        size = sum(tensor.numel() for tensor in vectors.thetas[model].values())
        return dict.fromkeys(vectors.names, kth_largest_magnitude(vectors, model, kept(density, size)))
    return list(in_parallel(of_model, range(len(vectors.thetas))))


def smallest_kept(tau: torch.Tensor, density: float) -> float:
    magnitudes = tau.abs().reshape(-1).numpy()
    return kth_largest(magnitudes, kept(density, magnitudes.size))


def disjoint_mean(taus: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Entry by entry the weighted mean of those task vectors whose sign is the elected one, sign(sum_t w_t tau_t).

    An entry that is zero, trimmed or not, takes no part; an entry whose weighted sum is zero merges to zero.
    """
    elected = add_weighted(weights[0] * taus[0], taus[1:], weights[1:]).sgn_()  # sign_ is slower
    merged, weight_of_agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau, weight in zip(taus, weights, strict=True):
        agreeing = (tau * elected).relu_()
        merged.add_(agreeing, alpha=weight)
        weight_of_agreeing.add_(agreeing.sgn_(), alpha=weight)
    return merged.div_(weight_of_agreeing.clamp_(min=TINY)).mul_(elected)


@method("ties", "trim small entries, elect the sign of each entry, average the task vectors that agree",
        reference="TIES-Merging: Resolving Interference When Merging Models, Yadav et al., NeurIPS 2023",
        url="https://arxiv.org/abs/2306.01708", weights=RATIOS, needs=("base",), by_entry=True)
def ties(vectors: TaskVectors,
         density: Annotated[float, "share of a task vector's entries that trimming keeps", Range(0.0, 1.0)] = 0.2,
         lambda_: Lambda = 1.0,
         trim: Annotated[Literal["vector", "tensor"], "trim over the whole task vector (TIES paper) or in each tensor "
                         "on its own (U-Net Transplant's code)"] = "vector") -> Callable[[Tensors], torch.Tensor]:
    """theta_0 + lambda m, where m is the disjoint mean of the trimmed task vectors."""
    limits = thresholds(vectors, density, trim)

    def merge(tensors: Tensors) -> torch.Tensor:
        trimmed = [keep_from(tau, of_model[tensors.name]) if of_model[tensors.name] > 0 else tau
                   for tau, of_model in zip(tensors.taus, limits, strict=True)]
        return disjoint_mean(trimmed, tensors.weights).mul_(lambda_).add_(tensors.theta_0)
    return merge
