"""Linear combinations of models and of task vectors."""
import torch

from nnunet_transplant.merging.registry import FREE_SUM, SUM_TO_ONE, Method, register
from nnunet_transplant.merging.vectors import Tensors, add_weighted


def average(tensors: Tensors, state: None = None) -> torch.Tensor:
    """sum_t w_t theta_t: with sum_t w_t = 1 this is theta_0 + sum_t w_t tau_t (U-Net Transplant, Eq. 1), whatever
    theta_0 is. A model of weight 1 comes out bit for bit."""
    return add_weighted(tensors.weights[0] * tensors.thetas[0], tensors.thetas[1:], tensors.weights[1:])


def task_arithmetic(tensors: Tensors, state: None = None) -> torch.Tensor:
    """theta_0 + sum_t w_t tau_t with free weights, written as (1 - sum_t w_t) theta_0 + sum_t w_t theta_t so that one
    model of weight 1 comes out bit for bit (Ilharco et al., ICLR 2023)."""
    return add_weighted((1 - sum(tensors.weights)) * tensors.theta_0, tensors.thetas, tensors.weights)


register(Method(
    name="average", summary="weighted mean of the models: theta_0 + sum_t w_t tau_t with weights that sum to 1",
    reference="U-Net Transplant, Lumetti et al., MICCAI 2025, Eq. 1",
    merge=average, weights_rule=SUM_TO_ONE, needs_base=False, by_entry=True))
register(Method(
    name="task_arithmetic", summary="theta_0 + sum_t w_t tau_t with free weights; a negative one forgets its task",
    reference="Editing Models with Task Arithmetic, Ilharco et al., ICLR 2023",
    merge=task_arithmetic, weights_rule=FREE_SUM, by_entry=True))
