"""Linear combinations of models and of task vectors."""
import torch

from nnunet_transplant.methods.registry import FREE_SUM, SUM_TO_ONE, method
from nnunet_transplant.vectors import Tensors, add_weighted, weighted_sum


@method("average", "weighted mean of the models: theta_0 + sum_t w_t tau_t with weights that sum to 1",
        reference="U-Net Transplant, Lumetti et al., MICCAI 2025, Eq. 1",
        url="https://papers.miccai.org/miccai-2025/0971-Paper0752.html", weights=SUM_TO_ONE, by_entry=True)
def average(tensors: Tensors) -> torch.Tensor:
    """sum_t w_t theta_t: with sum_t w_t = 1 this is theta_0 + sum_t w_t tau_t (U-Net Transplant, Eq. 1), whatever
    theta_0 is. A model of weight 1 comes out bit for bit."""
    return weighted_sum(tensors.thetas, tensors.weights)


@method("task_arithmetic", "theta_0 + sum_t w_t tau_t with free weights; a negative one forgets its task",
        reference="Editing Models with Task Arithmetic, Ilharco et al., ICLR 2023",
        url="https://arxiv.org/abs/2212.04089", weights=FREE_SUM, needs=("base",), by_entry=True)
def task_arithmetic(tensors: Tensors) -> torch.Tensor:
    """theta_0 + sum_t w_t tau_t with free weights, written as (1 - sum_t w_t) theta_0 + sum_t w_t theta_t so that one
    model of weight 1 comes out bit for bit (Ilharco et al., ICLR 2023)."""
    return add_weighted((1 - sum(tensors.weights)) * tensors.theta_0, tensors.thetas, tensors.weights)
