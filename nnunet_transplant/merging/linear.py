"""Linear combinations of models and of task vectors."""
from collections.abc import Sequence

import torch

from nnunet_transplant.merging.registry import Method, any_weights, one, register, sum_to_one, uniform


def average(theta_0: torch.Tensor | None, thetas: Sequence[torch.Tensor], weights: Sequence[float],
            state: Sequence[None]) -> torch.Tensor:
    """sum_t w_t theta_t: with sum_t w_t = 1 this is theta_0 + sum_t w_t tau_t (U-Net Transplant, Eq. 1), whatever
    theta_0 is. A model of weight 1 comes out bit for bit."""
    merged = weights[0] * thetas[0]
    for weight, theta in zip(weights[1:], thetas[1:], strict=True):
        merged.add_(theta, alpha=weight)
    return merged


def task_arithmetic(theta_0: torch.Tensor, thetas: Sequence[torch.Tensor], weights: Sequence[float],
                    state: Sequence[None]) -> torch.Tensor:
    """theta_0 + sum_t w_t tau_t with free weights, written as (1 - sum_t w_t) theta_0 + sum_t w_t theta_t so that one
    model of weight 1 comes out bit for bit (Ilharco et al., ICLR 2023)."""
    merged = (1 - sum(weights)) * theta_0
    for weight, theta in zip(weights, thetas, strict=True):
        merged.add_(theta, alpha=weight)
    return merged


register(Method(
    name="average", summary="weighted mean of the models: theta_0 + sum_t w_t tau_t with weights that sum to 1",
    reference="U-Net Transplant, Lumetti et al., MICCAI 2025, Eq. 1",
    merge=average, needs_base=False, weights_rule="sum to 1, default 1/T", check_weights=sum_to_one,
    default_weight=uniform))
register(Method(
    name="task_arithmetic", summary="theta_0 + sum_t w_t tau_t with free weights; a negative one forgets its task",
    reference="Editing Models with Task Arithmetic, Ilharco et al., ICLR 2023",
    merge=task_arithmetic, needs_base=True, weights_rule="free, default 1", check_weights=any_weights,
    default_weight=one))
