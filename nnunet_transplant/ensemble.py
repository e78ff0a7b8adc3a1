"""The ensemble of the models that are merged, as a teacher: what one merged model should say, without any labels."""
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nnunet_transplant.device import forward_only, memory_left
from nnunet_transplant.experts import CPU, Experts
from nnunet_transplant.heads import JoinedHeads, head_rows
from nnunet_transplant.vectors import added_up
from nnunet_transplant.volumes import IGNORED, Patch


class Teacher:
    """The ensemble as a network. Holds the networks of all models, and in `room` bytes what they said of patches: steps
    ask about the same ones again and again."""

    def __init__(self, experts: Experts, room: int) -> None:
        self.experts, self.room = experts, room
        self.networks = [experts.network(model) for model in range(len(experts.models))]
        self._said: dict[int, torch.Tensor] = {}  # by the identity of the patch

    def __call__(self, patches: Sequence[Patch]) -> torch.Tensor:
        """The logits (patches, rows, *patch_size), in half precision: of models with the same labels the mean, as
        nnU-Net's ensemble; of tasks their scores joined as their heads are."""
        return torch.stack([self._of(patch) for patch in patches])

    def _of(self, patch: Patch) -> torch.Tensor:
        if id(patch) in self._said:
            return self._said[id(patch)].to(self.experts.device)
        logits = self._say(patch)
        if self.room >= logits.nbytes:
            self.room -= logits.nbytes
            self._said[id(patch)] = logits.cpu()
        return logits

    def _say(self, patch: Patch) -> torch.Tensor:
        images, joined = self.experts.images([patch]), self.experts.joined
        with forward_only(self.experts.device):
            if joined.rows is None:
                logits = (network(images).float() / len(self.networks) for network in self.networks)
                return added_up(logits)[0].half()
            total = images.new_zeros(1, len(joined.rows) + joined.softmax, *images.shape[2:])
            for model, network in enumerate(self.networks):
                add_scores(total, network(images).float(), joined, model)
            return total[0].half()


def teacher_of(experts: Experts) -> Teacher:
    """The one that all steps ask."""
    return experts.once("teacher", lambda: Teacher(experts, teacher_room()))


def teacher_room() -> int:
    """Bytes."""
    return memory_left(CPU) // 4


def teacher_passes(experts: Experts, visits: int) -> float:
    """How many passes of a network it takes a teacher to be asked so many times about patches, each as often as the
    others."""
    patches = len(experts.patches)
    rows = len(experts.dataset_json["labels"])
    kept = min(teacher_room() // (2 * rows * math.prod(experts.configuration.patch_size)), patches)
    asked = visits / patches  # of each
    return len(experts.models) * (kept * min(asked, 1) + (patches - kept) * asked)


def ensemble_logits(experts: Experts) -> Iterator[torch.Tensor]:
    """What the teacher says of every patch in turn, (rows, *patch_size)."""
    teacher = teacher_of(experts)
    for patch in experts.bar(experts.patches, "ensemble"):
        yield teacher([patch])[0]


def add_scores(total: torch.Tensor, logits: torch.Tensor, joined: JoinedHeads, model: int) -> None:
    """Add what one model's logits (batch, rows, *size) say of its structures to the joined ones, in place."""
    for index, rows in enumerate(joined.rows or (), start=int(joined.softmax)):
        for owner, row in rows:
            if owner == model:
                score = logits[:, row] - logits[:, 0] if joined.against_background else logits[:, row]
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


def dice_loss(logits: torch.Tensor, target: torch.Tensor, regions: bool, power: int) -> torch.Tensor:
    """1 - Dice of probabilities, in a form that is 0 only where both are the same. With power 2 sum (p - q)^2 / sum
    (p^2 + q^2) (V-Net, Milletari et al., 3DV 2016), which is smooth, and finds a structure that the merge has lost.
    With power 1 sum |p - q| / sum (p + q) (Dice semimetric loss, Wang et al., MICCAI 2023), which is nearer to the Dice
    of labels. The sum over the structures that the target shows in a patch: a small one, which hardly counts in a mean
    over voxels, counts as much as a large one, whatever is beside it. The mean over patches.

    Both are logits (batch, rows, *size).
    """
    if regions:
        said, true, shown = logits.sigmoid(), target.sigmoid(), (target > 0).flatten(2).any(2)
    else:
        said, true = logits.softmax(1)[:, 1:], target.softmax(1)[:, 1:]
        rows = target.argmax(1).flatten(1)
        shown = torch.zeros(target.shape[:2], dtype=torch.bool, device=target.device).scatter_(1, rows, True)[:, 1:]
    apart, mine, theirs = ((each ** power).flatten(2).sum(2) for each in ((said - true).abs(), said, true))
    return (apart / (mine + theirs).clamp(min=1e-8) * shown).sum(1).mean()
