"""TIES merging: trim, elect sign, disjoint mean (Yadav et al., NeurIPS 2023)."""
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from nnunet_transplant.merging.registry import Method, Parameter, not_negative, register, uniform


def threshold(magnitudes: np.ndarray, density: float) -> float:
    """The magnitude of the smallest entry among the `density` share of largest ones (at least one): entries at or
    above it are kept, so ties at the threshold are all kept."""
    keep = max(1, round(density * magnitudes.size))
    return float(np.partition(magnitudes, magnitudes.size - keep)[magnitudes.size - keep])


def whole_vector_threshold(taus: Iterable[torch.Tensor], density: float, trim: str, **_: float) -> float | None:
    """The threshold of a whole task vector, or None where every tensor has its own."""
    if trim == "tensor" or density >= 1:
        return None
    return threshold(np.concatenate([tau.abs().reshape(-1).numpy() for tau in taus]), density)


def ties(theta_0: torch.Tensor, thetas: Sequence[torch.Tensor], weights: Sequence[float],
         state: Sequence[float | None], density: float, trim: str, **parameters: float) -> torch.Tensor:
    """theta_0 + lambda m, where m is entry by entry the weighted mean of those trimmed task vectors whose sign is the
    elected one, sign(sum_t w_t tau_t).

    An entry that is zero, trimmed or not, takes no part; an entry whose weighted sum is zero merges to zero.
    """
    total, trimmed = torch.zeros_like(theta_0), []
    for theta, weight, limit in zip(thetas, weights, state, strict=True):
        tau = theta - theta_0
        if limit is None and density < 1 and tau.numel():
            limit = threshold(tau.abs().reshape(-1).numpy(), density)
        if limit is not None:
            tau = torch.where(tau.abs() >= limit, tau, 0.0)
        trimmed.append(tau)
        total.add_(tau, alpha=weight)
    elected = torch.sign(total)
    merged, weight_of_agreeing = torch.zeros_like(theta_0), torch.zeros_like(theta_0)
    for tau, weight in zip(trimmed, weights, strict=True):
        agrees = tau * elected > 0
        merged.add_(torch.where(agrees, tau, 0.0), alpha=weight)
        weight_of_agreeing.add_(agrees, alpha=weight)
    mean = merged / torch.where(weight_of_agreeing > 0, weight_of_agreeing, 1.0)
    return theta_0 + parameters["lambda"] * mean


register(Method(
    name="ties", summary="trim small entries, elect the sign of each entry, average the task vectors that agree",
    reference="TIES-Merging: Resolving Interference When Merging Models, Yadav et al., NeurIPS 2023",
    merge=ties, needs_base=True, weights_rule="not negative, only their ratios count, default equal",
    check_weights=not_negative, default_weight=uniform, prepare=whole_vector_threshold,
    parameters=(
        Parameter("density", 0.2, "share of a task vector's entries that trimming keeps", 0.0, 1.0),
        Parameter("lambda", 1.0, "scale of the merged task vector", -10.0, 10.0),
        Parameter("trim", "vector", "trim over the whole task vector (TIES paper) or in each tensor on its own "
                                    "(U-Net Transplant's code)", choices=("vector", "tensor")))))
