"""Fisher-weighted averaging: each weight counts as much as the model's predictions depend on it."""
from collections.abc import Callable, Collection
from functools import partial
from typing import Annotated, Literal

import torch
from torch import nn

from nnunet_transplant.architecture import canonical_parameters
from nnunet_transplant.device import with_gradients
from nnunet_transplant.experts import Experts
from nnunet_transplant.labels import has_regions
from nnunet_transplant.methods.linear import average
from nnunet_transplant.methods.registry import CONVEX, method
from nnunet_transplant.steps import Seed
from nnunet_transplant.vectors import TaskVectors, Tensors
from nnunet_transplant.volumes import IGNORED

FLOOR = 1e-6  # of a model's mean Fisher value: where nothing depends on a weight, the models are averaged

Fisher = dict[str, torch.Tensor]


@method("fisher", "mean of the models weighted entry by entry by their diagonal Fisher information",
        reference="Merging Models with Fisher-Weighted Averaging, Matena and Raffel, NeurIPS 2022",
        url="https://arxiv.org/abs/2111.09832", weights=CONVEX, needs=("volumes",),
        passes=lambda experts, settings: 3 * len(experts.models) * len(experts.patches),  # back, too
        labels_when=("labels", "dataset"))
def fisher(vectors: TaskVectors, experts: Experts,
           labels: Annotated[Literal["model", "dataset"], "whose labels: drawn from each model's own predictions, or "
                             "the dataset's"] = "model",
           seed: Seed = 0) -> Callable[[Tensors], torch.Tensor]:
    """sum_t w_t F_t theta_t / sum_t w_t F_t, entry by entry."""
    information = [experts.kept("fisher", [model], [labels, seed],
                                partial(diagonal, experts, model, vectors.names, labels, seed))
                   for model in range(len(vectors.thetas))]

    def merge(tensors: Tensors) -> torch.Tensor:
        if tensors.name not in information[0]:  # running statistics
            return average(tensors)
        merged, total = torch.zeros_like(tensors.thetas[0]), torch.zeros_like(tensors.thetas[0])
        for theta, weight, of_model in zip(tensors.thetas, tensors.weights, information, strict=True):
            counts = weight * (of_model[tensors.name] + FLOOR)
            merged.addcmul_(counts, theta)
            total.add_(counts)
        return merged.div_(total)
    return merge


def diagonal(experts: Experts, model: int, names: Collection[str], labels: str, seed: int) -> Fisher:
    """The diagonal Fisher information of a model, by tensor name, scaled to mean 1: the mean over patches of the
    squared gradient of the log-likelihood (mean over voxels) of labels drawn from the model's own predictions, or with
    labels "dataset" of the dataset's."""
    network = experts.network(model)
    dataset_json = experts.models[model].dataset_json
    regions = has_regions(dataset_json["labels"])
    parameters = {name: parameter.requires_grad_() for name, parameter in canonical_parameters(network).items()
                  if name in names}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator(experts.device).manual_seed(seed)
    for patch in experts.bar(experts.patches, f"Fisher information of model {model + 1}"):
        with with_gradients(experts.device):
            logits = network(experts.images([patch]))
        logits = logits.float()
        target = sampled(logits.detach(), regions, generator) if labels == "model" \
            else experts.targets([patch], dataset_json)
        network.zero_grad()
        log_likelihood(logits, target, regions).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:  # the heads of deep supervision take no part
                total[name].addcmul_(parameter.grad, parameter.grad)
    mean = sum(float(fisher.cpu().double().sum()) for fisher in total.values()) / sum(map(torch.numel, total.values()))
    return {name: (fisher / max(mean, 1e-30)).cpu() for name, fisher in total.items()}


def sampled(logits: torch.Tensor, regions: bool, generator: torch.Generator) -> torch.Tensor:
    """Labels drawn voxel by voxel from what the network predicts."""
    if regions:
        return torch.bernoulli(logits.sigmoid(), generator=generator).long()
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(1) / noise).argmax(1)  # the Gumbel-max trick


def log_likelihood(logits: torch.Tensor, target: torch.Tensor, regions: bool) -> torch.Tensor:
    """Mean over the voxels that are not ignored; a voxel of regions is the sum of its regions."""
    if not regions:
        return -nn.functional.cross_entropy(logits, target, ignore_index=IGNORED)
    counted = (target != IGNORED).float()
    each = nn.functional.binary_cross_entropy_with_logits(logits, target.float().clamp(min=0), reduction="none")
    return -(each * counted).sum() / counted[:, 0].sum().clamp(min=1)
