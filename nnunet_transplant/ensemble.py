"""The ensemble of the models that are merged, as a teacher: what one merged model should say, without any labels."""
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nnunet_transplant.experts import Experts
from nnunet_transplant.heads import JoinedHeads, head_rows
from nnunet_transplant.vectors import added_up
from nnunet_transplant.volumes import IGNORED


def ensemble_logits(experts: Experts) -> Iterator[torch.Tensor]:
    """The logits (rows, *patch_size) of the ensemble for every patch in turn, in half precision: of models with the
    same labels the mean, as nnU-Net's ensemble; of tasks their scores joined as their heads are. Holds the networks of
    all models, which are smaller than the logits of many patches."""
    networks = [experts.network(model) for model in range(len(experts.models))]
    for patch in experts.bar(experts.patches, "ensemble"):
        images = experts.images([patch])
        with torch.no_grad():
            yield added_up(part_of(network(images)[0], experts.joined, model, len(networks))
                           for model, network in enumerate(networks)).half()


def part_of(logits: torch.Tensor, joined: JoinedHeads, model: int, models: int) -> torch.Tensor:
    """What one model adds to the ensemble's logits."""
    if joined.rows is None:
        return logits / models
    part = logits.new_zeros(len(joined.rows) + joined.softmax, *logits.shape[1:])
    for index, rows in enumerate(joined.rows, start=int(joined.softmax)):
        for owner, row in rows:
            if owner == model:
                score = logits[row] - logits[0] if joined.softmax else logits[row]
                part[index] += score / len(rows)
    return part


def labels_of(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """(batch, rows, *size) -> (batch, structures, *size) of 0 and 1."""
    if regions:
        return logits > 0
    return nn.functional.one_hot(logits.argmax(1), logits.shape[1])[..., 1:].movedim(-1, 1) > 0


def agreement(experts: Experts, network: nn.Module, targets: Sequence[torch.Tensor]) -> float:
    """Mean Dice over the structures of a network's labels with `targets`, one (structures, *patch_size) for each patch,
    over the voxels of all patches; IGNORED where nothing counts."""
    both = sizes = torch.zeros(len(targets[0]), dtype=torch.int64)
    with torch.no_grad():
        for patch, target in zip(experts.patches, targets, strict=True):
            found = labels_of(network(experts.images([patch])), experts.regions)[0].cpu()
            counted = target != IGNORED
            both = both + (found & (target == 1)).flatten(1).sum(1)
            sizes = sizes + (found & counted).flatten(1).sum(1) + (target == 1).flatten(1).sum(1)
    return float(torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0).mean())


def ensemble_targets(experts: Experts) -> list[torch.Tensor]:
    return [labels_of(logits[None].float(), experts.regions)[0].to("cpu", torch.int8)
            for logits in ensemble_logits(experts)]


def reference_targets(experts: Experts) -> list[torch.Tensor]:
    """From the label maps of the cases. Raises TransplantError where there are none."""
    rows = list(head_rows(experts.plans, experts.dataset_json).values())
    targets = []
    for patch in experts.patches:
        target = experts.targets([patch])[0].cpu()
        if not experts.regions:
            target = torch.stack([torch.where(target == IGNORED, IGNORED, (target == row).long()) for row in rows])
        targets.append(target)
    return targets


def divergence(logits: torch.Tensor, target: torch.Tensor, regions: bool) -> torch.Tensor:
    """KL(target || logits) in nats, the mean over voxels (and regions); both are logits (batch, rows, *size)."""
    if regions:
        probability = target.sigmoid()
        cross = nn.functional.binary_cross_entropy_with_logits(logits, probability)
        return cross - nn.functional.binary_cross_entropy_with_logits(target, probability)
    return nn.functional.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none",
                                log_target=True).sum(1).mean()
