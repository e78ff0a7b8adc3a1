"""The ensemble of the models that are merged, as a teacher: what one merged model should say, without any labels."""
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nnunet_transplant.device import forward_only
from nnunet_transplant.experts import Experts
from nnunet_transplant.heads import JoinedHeads, head_rows
from nnunet_transplant.vectors import added_up
from nnunet_transplant.volumes import IGNORED, Patch


class Teacher:
    """The ensemble as a network. Holds the networks of all models, which are smaller than the logits of many
    patches."""

    def __init__(self, experts: Experts) -> None:
        self.experts = experts
        self.networks = [experts.network(model) for model in range(len(experts.models))]

    def __call__(self, patches: Sequence[Patch]) -> torch.Tensor:
        """The logits (patches, rows, *patch_size), in half precision: of models with the same labels the mean, as
        nnU-Net's ensemble; of tasks their scores joined as their heads are."""
        images, joined = self.experts.images(patches), self.experts.joined
        with forward_only(self.experts.device):
            if joined.rows is None:
                return added_up(network(images).float() / len(self.networks) for network in self.networks).half()
            total = images.new_zeros(len(images), len(joined.rows) + joined.softmax, *images.shape[2:])
            for model, network in enumerate(self.networks):
                add_scores(total, network(images).float(), joined, model)
            return total.half()


def ensemble_logits(experts: Experts) -> Iterator[torch.Tensor]:
    """What the teacher says of every patch in turn, (rows, *patch_size)."""
    teacher = Teacher(experts)
    for patch in experts.bar(experts.patches, "ensemble"):
        yield teacher([patch])[0]


def add_scores(total: torch.Tensor, logits: torch.Tensor, joined: JoinedHeads, model: int) -> None:
    """Add what one model's logits (batch, rows, *size) say of its structures to the joined ones, in place."""
    for index, rows in enumerate(joined.rows or (), start=int(joined.softmax)):
        for owner, row in rows:
            if owner == model:
                score = logits[:, row] - logits[:, 0] if joined.softmax else logits[:, row]
                total[:, index] += score / len(rows)


def labels_of(logits: torch.Tensor, regions: bool) -> torch.Tensor:
    """Of a batch (batch, rows, *size) what its labels are, in few bytes: (batch, *size), the row of each voxel, or of
    regions (batch, rows, *size), bool."""
    if regions:
        return logits > 0
    rows = logits.argmax(1)
    return rows.to(torch.uint8 if logits.shape[1] <= 256 else torch.int16)


def agreement(experts: Experts, network: nn.Module, targets: Sequence[torch.Tensor]) -> float:
    """Mean Dice over the structures of a network's labels with `targets`, one for each patch, over the voxels of all
    patches. A target is as `labels_of` and `Experts.targets` make it: rows, or of regions 0 and 1; IGNORED where
    nothing counts."""
    rows = list(head_rows(experts.plans, experts.dataset_json).values())
    both = sizes = torch.zeros(len(rows), dtype=torch.int64)
    with forward_only(experts.device):
        for patch, target in zip(experts.patches, targets, strict=True):
            found = labels_of(network(experts.images([patch])), experts.regions)[0].cpu()
            if experts.regions:
                counted = target != IGNORED
                both = both + (found & (target == 1)).flatten(1).sum(1)
                sizes = sizes + (found & counted).flatten(1).sum(1) + (target == 1).flatten(1).sum(1)
            else:
                most = max(rows) + 1
                said, true = found.flatten().long(), target.flatten().long()
                said, true = said[true != IGNORED], true[true != IGNORED]
                pairs = torch.bincount(true * most + said, minlength=most * most).reshape(most, most)
                both = both + pairs.diagonal()[rows]
                sizes = sizes + pairs.sum(0)[rows] + pairs.sum(1)[rows]
    return float(torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0).mean())


def ensemble_targets(experts: Experts) -> list[torch.Tensor]:
    """The ensemble's labels of every patch."""
    return [labels_of(logits[None].float(), experts.regions)[0].cpu() for logits in ensemble_logits(experts)]


def reference_targets(experts: Experts) -> list[torch.Tensor]:
    """The label maps of the cases, of every patch. Raises TransplantError where there are none."""
    return [experts.targets([patch])[0].to("cpu", torch.int16) for patch in experts.patches]


def divergence(logits: torch.Tensor, target: torch.Tensor, regions: bool) -> torch.Tensor:
    """KL(target || logits) in nats, the mean over voxels (and regions); both are logits (batch, rows, *size)."""
    if regions:
        probability = target.sigmoid()
        cross = nn.functional.binary_cross_entropy_with_logits(logits, probability)
        return cross - nn.functional.binary_cross_entropy_with_logits(target, probability)
    return nn.functional.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none",
                                log_target=True).sum(1).mean()
