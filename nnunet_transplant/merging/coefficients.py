"""Coefficients found by gradient descent, the base and the task vectors frozen: AdaMerging without labels, learned
coefficients with them."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_transplant.architecture import canonical_parameters
from nnunet_transplant.heads import head_rows
from nnunet_transplant.labels import has_regions
from nnunet_transplant.merging.calibration import IGNORED, Calibration, Patch
from nnunet_transplant.merging.registry import SEED, Method, Parameter, WeightsRule, any_weights, register
from nnunet_transplant.merging.vectors import TaskVectors, Tensors, add_weighted

START = 0.3

Coefficients = dict[str, torch.Tensor]  # tensor name -> (models,); all the same object with one for each task
Loss = Callable[[torch.Tensor, Sequence[Patch]], torch.Tensor]


def descend(vectors: TaskVectors, calibration: Calibration, loss: Loss, per: str, iterations: int, lr: float,
            seed: int) -> Coefficients:
    """Coefficients lambda that minimise the mean of loss(logits, patches) for theta_0 + sum_t lambda_t tau_t, by Adam
    from the weights. Each step takes a batch of the plans' size; every second patch has a structure where one of the
    models sees one.

    The gradient of lambda_t is that of the network's weights times tau_t: no second copy of the network is needed.
    """
    network = calibration.merged_network()
    parameters = {name: parameter.requires_grad_() for name, parameter in canonical_parameters(network).items()
                  if name in vectors.names}
    theta_0 = {name: vectors.theta_0[name].float().to(calibration.device) for name in parameters}
    taus = {name: torch.stack([theta[name].float().to(calibration.device) - theta_0[name] for theta in vectors.thetas])
            for name in parameters}
    start = torch.tensor(vectors.weights, dtype=torch.float32)
    shared = start.clone()
    coefficients = {name: start.clone() if per == "tensor" else shared for name in parameters}
    optimizer = torch.optim.Adam(list({id(each): each for each in coefficients.values()}.values()), lr=lr)
    batches = Batches(calibration, seed)
    for _ in calibration.bar(range(iterations), "coefficients"):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(theta_0[name] + torch.tensordot(coefficients[name].to(calibration.device), taus[name],
                                                                1))
        patches = batches.draw()
        network.zero_grad()
        loss(network(calibration.images(patches)), patches).backward()
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

    def __init__(self, calibration: Calibration, seed: int) -> None:
        self.patches = calibration.patches
        self.size = calibration.configuration.batch_size
        self.generator = torch.Generator().manual_seed(seed)
        seen = torch.zeros(len(self.patches), dtype=torch.bool)
        for model in range(len(calibration.models)):
            network = calibration.network(model)
            regions = has_regions(calibration.models[model].dataset_json["labels"])
            with torch.no_grad():
                for index, patch in enumerate(calibration.bar(self.patches, f"structures of model {model + 1}")):
                    logits = network(calibration.images([patch]))
                    seen[index] |= bool(((logits > 0) if regions else (logits.argmax(1) > 0)).any())
        self.with_structure = seen.nonzero()[:, 0] if seen.any() else torch.arange(len(self.patches))

    def draw(self) -> list[Patch]:
        any_patch = torch.randint(len(self.patches), (self.size // 2,), generator=self.generator)
        chosen = torch.randint(len(self.with_structure), (self.size - self.size // 2,), generator=self.generator)
        return [self.patches[index] for index in (*self.with_structure[chosen].tolist(), *any_patch.tolist())]


def adapted(vectors: TaskVectors, calibration: Calibration, **settings: Any) -> Coefficients:
    rows = list(head_rows(calibration.models[0].plans, calibration.dataset_json).values())
    regions = has_regions(calibration.dataset_json["labels"])
    found = descend(vectors, calibration, lambda logits, _: entropy(logits, rows, regions), **settings)
    return noted(found, calibration, settings["per"])


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


def fitted(vectors: TaskVectors, calibration: Calibration, **settings: Any) -> Coefficients:
    calibration.targets(calibration.patches[:1])  # a dataset without the labels is refused before the work
    loss = segmentation_loss(calibration)
    found = descend(vectors, calibration, loss, **settings)
    return noted(found, calibration, settings["per"])


def segmentation_loss(calibration: Calibration, batch_dice: bool | None = None) -> Loss:
    """nnU-Net's own: Dice and cross-entropy, or for regions Dice and binary cross-entropy. Logits of a lower resolution
    than the patches are compared with labels of theirs, as in deep supervision.

    batch_dice: Dice over all patches of a batch together, or of each; as the plans say unless told."""
    regions = has_regions(calibration.dataset_json["labels"])
    batch_dice = calibration.configuration.batch_dice if batch_dice is None else batch_dice
    soft_dice = {"batch_dice": batch_dice, "do_bg": regions, "smooth": 1e-5, "ddp": False}
    dice = MemoryEfficientSoftDiceLoss
    if regions:
        region_loss = DC_and_BCE_loss({}, soft_dice, use_ignore_label=True, dice_class=dice)

        def of_regions(logits: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
            target = _at_size(calibration.targets(patches), logits)
            mask = (target[:, :1] == IGNORED).to(target.dtype)  # nnU-Net wants it as the last channel
            return region_loss(logits, torch.cat([target.clamp(min=0), mask], 1))
        return of_regions
    ignored = 1 + max(head_rows(calibration.models[0].plans, calibration.dataset_json).values())  # nnU-Net's number
    label_loss = DC_and_CE_loss(soft_dice, {}, ignore_label=ignored, dice_class=dice)

    def of_labels(logits: torch.Tensor, patches: Sequence[Patch]) -> torch.Tensor:
        target = _at_size(calibration.targets(patches)[:, None], logits)
        return label_loss(logits, torch.where(target == IGNORED, ignored, target))
    return of_labels


def _at_size(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(batch, channels, *size of the logits), as nnU-Net makes the labels of deep supervision."""
    if target.shape[2:] == logits.shape[2:]:
        return target
    return nn.functional.interpolate(target.float(), logits.shape[2:], mode="nearest-exact").to(target.dtype)


def noted(coefficients: Coefficients, calibration: Calibration, per: str) -> Coefficients:
    """Write what was found into merge.json."""
    if per == "task":
        calibration.found["coefficients"] = next(iter(coefficients.values())).tolist()
    else:
        calibration.found["coefficients"] = {name: each.tolist() for name, each in coefficients.items()}
    return coefficients


def add_scaled(tensors: Tensors, state: Mapping[str, torch.Tensor], **_: object) -> torch.Tensor:
    """theta_0 + sum_t lambda_t tau_t with the coefficients of this tensor."""
    coefficients = state[tensors.name].tolist() if tensors.name in state else tensors.weights
    return add_weighted(tensors.theta_0.clone(), tensors.taus, coefficients)


FROM_START = WeightsRule(f"free, where the search starts, default {START}", any_weights, lambda models: START)
PER = "one coefficient for each task, or for each task and tensor"
STEPS = "steps of gradient descent"

register(Method(
    name="adamerging", summary="coefficients that make the merged model decided about its structures, without labels",
    reference="AdaMerging: Adaptive Model Merging for Multi-Task Learning, Yang et al., ICLR 2024",
    merge=add_scaled, prepare=adapted, weights_rule=FROM_START, needs_data="volumes", by_entry=True,
    parameters=(Parameter("per", "tensor", PER, choices=("task", "tensor")),
                Parameter("iterations", 500, STEPS, 1, 10 ** 6),
                Parameter("lr", 1e-3, "learning rate (Adam)", 0.0, 10.0), SEED)))
register(Method(
    name="learned", summary="coefficients that minimise nnU-Net's loss on labelled volumes",
    reference="Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, Zhang et al., NeurIPS 2024",
    merge=add_scaled, prepare=fitted, weights_rule=FROM_START, needs_data="labels", by_entry=True,
    parameters=(Parameter("per", "tensor", PER, choices=("task", "tensor")),
                Parameter("iterations", 100, STEPS, 1, 10 ** 6),
                Parameter("lr", 1e-2, "learning rate (Adam)", 0.0, 10.0), SEED)))
