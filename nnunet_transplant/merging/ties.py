"""TIES merging: trim, elect sign, disjoint mean (Yadav et al., NeurIPS 2023)."""
from collections.abc import Sequence

import torch

from nnunet_transplant.merging.registry import LAMBDA, RATIOS, Method, Parameter, register
from nnunet_transplant.merging.vectors import (
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


def thresholds(vectors: TaskVectors, density: float, trim: str, **_: float) -> list[dict[str, float]]:
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


def ties(tensors: Tensors, state: list[dict[str, float]], **parameters: float) -> torch.Tensor:
    """theta_0 + lambda m, where m is the disjoint mean of the trimmed task vectors."""
    trimmed = [keep_from(tau, limits[tensors.name]) if limits[tensors.name] > 0 else tau
               for tau, limits in zip(tensors.taus, state, strict=True)]
    return disjoint_mean(trimmed, tensors.weights).mul_(parameters["lambda"]).add_(tensors.theta_0)


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


register(Method(
    name="ties", summary="trim small entries, elect the sign of each entry, average the task vectors that agree",
    reference="TIES-Merging: Resolving Interference When Merging Models, Yadav et al., NeurIPS 2023",
    merge=ties, weights_rule=RATIOS, by_entry=True, prepare=thresholds,
    parameters=(
        Parameter("density", 0.2, "share of a task vector's entries that trimming keeps", 0.0, 1.0),
        LAMBDA,
        Parameter("trim", "vector", "trim over the whole task vector (TIES paper) or in each tensor on its own "
                                    "(U-Net Transplant's code)", choices=("vector", "tensor")))))
