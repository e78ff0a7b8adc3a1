"""Coefficients found by gradient descent, the base and the task vectors frozen: AdaMerging without labels, learned
coefficients with them."""
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import nn

from nnunet_transplant.architecture import canonical_parameters
from nnunet_transplant.device import forward_only, with_gradients
from nnunet_transplant.experts import Experts
from nnunet_transplant.heads import head_rows
from nnunet_transplant.labels import has_regions
from nnunet_transplant.loss import Loss, segmentation_loss
from nnunet_transplant.methods.registry import WeightsRule, any_weights, method
from nnunet_transplant.steps import Found, Range, Seed
from nnunet_transplant.vectors import TaskVectors, Tensors, add_weighted
from nnunet_transplant.volumes import Patch

START = 0.3
FROM_START = WeightsRule(f"free, where the search starts, default {START}", any_weights, lambda models: START)

Per = Annotated[Literal["task", "tensor"], "one coefficient for each task, or for each task and tensor"]
Iterations = Annotated[int, "steps of gradient descent", Range(1, 10 ** 6)]
Rate = Annotated[float, "learning rate (Adam)", Range(0.0, 10.0)]

Coefficients = dict[str, torch.Tensor]  # tensor name -> (models,); all the same object with one for each task


def steps_of(experts: Experts, settings: Mapping[str, Any]) -> float:
    return (3 * settings["iterations"] * experts.configuration.batch_size
            + len(experts.models) * len(experts.patches))  # and a look for structures


@method("adamerging", "coefficients that make the merged model decided about its structures, without labels",
        reference="AdaMerging: Adaptive Model Merging for Multi-Task Learning, Yang et al., ICLR 2024",
        url="https://arxiv.org/abs/2310.02575", weights=FROM_START, needs=("base", "volumes"), by_entry=True,
        passes=steps_of)
def adamerging(vectors: TaskVectors, experts: Experts, per: Per = "tensor", iterations: Iterations = 500,
               lr: Rate = 1e-3, seed: Seed = 0) -> Found:
    """theta_0 + sum_t lambda_t tau_t of least `entropy`."""
    rows = list(head_rows(experts.plans, experts.dataset_json).values())
    found = descend(vectors, experts, lambda logits, _: entropy(logits, rows, experts.regions), per, iterations, lr,
                    seed)
    return add_scaled(found, per)


@method("learned", "coefficients that minimise nnU-Net's loss on labelled volumes",
        reference="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, Zhang et al., NeurIPS "
        "2024", url="https://arxiv.org/abs/2407.02880", weights=FROM_START, needs=("base", "labels"), by_entry=True,
        passes=steps_of)
def learned(vectors: TaskVectors, experts: Experts, per: Per = "tensor", iterations: Iterations = 100,
            lr: Rate = 1e-2, seed: Seed = 0) -> Found:
    """theta_0 + sum_t lambda_t tau_t of least `segmentation_loss`."""
    experts.targets(experts.patches[:1])  # a dataset without the labels is refused before the work
    loss = segmentation_loss(experts.plans, experts.dataset_json, experts.configuration.batch_dice, experts.device)
    return add_scaled(descend(vectors, experts, loss, per, iterations, lr, seed), per)


def add_scaled(coefficients: Coefficients, per: str) -> Found:
    """The merge theta_0 + sum_t lambda_t tau_t, with the coefficients for merge.json."""
    def merge(tensors: Tensors) -> torch.Tensor:
        each = coefficients[tensors.name].tolist() if tensors.name in coefficients else tensors.weights
        return add_weighted(tensors.theta_0.clone(), tensors.taus, each)

    said: Any = {name: each.tolist() for name, each in coefficients.items()}
    if per == "task":
        said = next(iter(said.values()))
    return Found(merge, {"coefficients": said})


def descend(vectors: TaskVectors, experts: Experts, loss: Loss, per: str, iterations: int, lr: float,
            seed: int) -> Coefficients:
    """Coefficients lambda that minimise the mean of loss(logits, patches) for theta_0 + sum_t lambda_t tau_t, by Adam
    from the weights. Each step takes a batch of the plans' size; every second patch has a structure where one of the
    models sees one.

    The gradient of lambda_t is that of the network's weights times tau_t: no second copy of the network is needed.
    """
    first = {name: tensor for name, tensor in experts.tensors[0].items() if name not in vectors.names}
    network = experts.merged_network({**first, **experts.heads(vectors.weights), **vectors.theta_0})
    parameters = {name: parameter.requires_grad_() for name, parameter in canonical_parameters(network).items()
                  if name in vectors.names}
    theta_0 = {name: vectors.theta_0[name].float().to(experts.device) for name in parameters}
    taus = {name: torch.stack([theta[name].float().to(experts.device) - theta_0[name] for theta in vectors.thetas])
            for name in parameters}
    start = torch.tensor(vectors.weights, dtype=torch.float32)
    shared = start.clone()
    coefficients = {name: start.clone() if per == "tensor" else shared for name in parameters}
    optimizer = torch.optim.Adam(list({id(each): each for each in coefficients.values()}.values()), lr=lr)
    batches = Batches(experts, seed)
    for _ in experts.bar(range(iterations), "coefficients"):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(theta_0[name] + torch.tensordot(coefficients[name].to(experts.device), taus[name],
                                                                1))
        patches = batches.draw()
        network.zero_grad()
        with with_gradients(experts.device):
            logits = network(experts.images(patches))
        loss(logits.float(), patches).backward()
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                gradient = (taus[name] * parameter.grad).flatten(1).sum(1).cpu()
                each = coefficients[name]
                each.grad = gradient if each.grad is None else each.grad + gradient
        optimizer.step()
    return coefficients


class Batches:
    """Random batches of patches, half of them with a structure that one of the models sees there."""

    def __init__(self, experts: Experts, seed: int) -> None:
        self.patches = experts.patches
        self.size = experts.configuration.batch_size
        self.generator = torch.Generator().manual_seed(seed)
        seen = experts.once("structures", lambda: with_a_structure(experts))
        self.with_structure = seen.nonzero()[:, 0] if seen.any() else torch.arange(len(self.patches))

    def draw(self) -> list[Patch]:
        any_patch = torch.randint(len(self.patches), (self.size // 2,), generator=self.generator)
        chosen = torch.randint(len(self.with_structure), (self.size - self.size // 2,), generator=self.generator)
        return [self.patches[index] for index in (*self.with_structure[chosen].tolist(), *any_patch.tolist())]


def with_a_structure(experts: Experts) -> torch.Tensor:
    """(patches,): whether one of the models sees a structure there."""
    seen = torch.zeros(len(experts.patches), dtype=torch.bool)
    for model in range(len(experts.models)):
        network = experts.network(model)
        regions = has_regions(experts.models[model].dataset_json["labels"])
        with forward_only(experts.device):
            for index, patch in enumerate(experts.bar(experts.patches, f"structures of model {model + 1}")):
                logits = network(experts.images([patch]))
                seen[index] |= bool(((logits > 0) if regions else (logits.argmax(1) > 0)).any())
    return seen


def entropy(logits: torch.Tensor, rows: list[int], regions: bool) -> torch.Tensor:
    """The mean over structures of how undecided the network is about each, foreground against background: the entropy
    of sigmoid(z) (regions) or of sigmoid(z_c - z_0) (softmax), averaged over the voxels with the probability of the
    structure as their weight (not differentiated), so that background, which is most of a volume, does not drown it."""
    scores = logits[:, rows] if regions else logits[:, rows] - logits[:, :1]
    probability = scores.sigmoid()
    undecided = nn.functional.softplus(scores) - probability * scores  # the binary entropy in nats
    weight = probability.detach().transpose(0, 1).flatten(1)
    each = (weight * undecided.transpose(0, 1).flatten(1)).sum(1) / weight.sum(1).clamp(min=1e-6)
    return each.mean()
