"""The ensemble of the models that are merged, as a teacher: what one merged model should say, without any labels."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import JoinedHeads, head_rows
from nnunet_transplant.labels import has_regions
from nnunet_transplant.merging.calibration import IGNORED, Calibration, Patch


def ensemble_logits(calibration: Calibration, joined: JoinedHeads, what: str) -> Iterator[torch.Tensor]:
    """The logits (rows, *patch_size) of the ensemble for every patch in turn, in half precision: of models with the
    same labels the mean, as nnU-Net's ensemble; of tasks their scores joined as their heads are. Holds the networks of
    all models, which are smaller than the logits of many patches."""
    networks = [calibration.network(model) for model in range(len(calibration.models))]
    for patch in calibration.bar(calibration.patches, what):
        images = calibration.images([patch])
        with torch.no_grad():
            total = sum(part_of(network(images)[0], joined, model, len(networks))
                        for model, network in enumerate(networks))
        yield total.half()


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


def agreement(calibration: Calibration, network: nn.Module, targets: Sequence[torch.Tensor]) -> float:
    """Mean Dice over the structures of a network's labels with `targets`, one (structures, *patch_size) for each patch,
    over the voxels of all patches; IGNORED where nothing counts."""
    regions = has_regions(calibration.dataset_json["labels"])
    both = sizes = 0
    with torch.no_grad():
        for patch, target in zip(calibration.patches, targets, strict=True):
            found = labels_of(network(calibration.images([patch])), regions)[0].cpu()
            counted = target != IGNORED
            both += (found & (target == 1)).flatten(1).sum(1)
            sizes += (found & counted).flatten(1).sum(1) + (target == 1).flatten(1).sum(1)
    return float(torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0).mean())


def ensemble_targets(calibration: Calibration, joined: JoinedHeads) -> list[torch.Tensor]:
    regions = has_regions(calibration.dataset_json["labels"])
    return [labels_of(logits[None].float(), regions)[0].to("cpu", torch.int8)
            for logits in ensemble_logits(calibration, joined, "ensemble")]


def reference_targets(calibration: Calibration) -> list[torch.Tensor]:
    """From the label maps of the cases. Raises TransplantError where there are none."""
    rows = list(head_rows(calibration.models[0].plans, calibration.dataset_json).values())
    targets = []
    for patch in calibration.patches:
        target = calibration.targets([patch])[0].cpu()
        if not has_regions(calibration.dataset_json["labels"]):
            target = torch.stack([torch.where(target == IGNORED, IGNORED, (target == row).long()) for row in rows])
        targets.append(target)
    return targets


@dataclass(frozen=True)
class Lesson:
    """What the ensemble says of some voxels of a patch."""
    patch: Patch
    voxels: torch.Tensor  # indices into the patch, flattened
    logits: torch.Tensor  # (rows, voxels), half precision


def ensemble_lessons(calibration: Calibration, joined: JoinedHeads, seed: int = 0,
                     positions: int = 4096) -> list[Lesson]:
    """positions: voxels taken of each patch at most, half of them where the ensemble is not sure of background."""
    regions = has_regions(calibration.dataset_json["labels"])
    generator = torch.Generator().manual_seed(seed)
    lessons = []
    for patch, target in zip(calibration.patches, ensemble_logits(calibration, joined, "ensemble"), strict=True):
        logits = target.flatten(1)
        probability = logits.float().sigmoid().amax(0) if regions else 1 - logits.float().softmax(0)[0]
        voxels = _half_from(probability > 0.01, positions, generator)
        lessons.append(Lesson(patch, voxels, logits[:, voxels]))
    return lessons


def teach_head(calibration: Calibration, network: nn.Module, lessons: Sequence[Lesson]) -> nn.Module:
    """Fit the head of full resolution of a merged network, in place, to what the ensemble says: the logistic regression
    of its probabilities on what the head reads, a convex problem without step sizes (L-BFGS). No labels.

    Returns the head. Raises TransplantError for a network whose output no single layer makes.
    """
    regions = has_regions(calibration.dataset_json["labels"])
    size = calibration.configuration.batch_size
    head = output_layer(network, calibration.images([lessons[0].patch]))
    read: list[torch.Tensor] = []

    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0].flatten(2))
    features = []
    with torch.no_grad(), _hook(head, look):
        for start in calibration.bar(range(0, len(lessons), size), "fitting the head"):
            batch = lessons[start:start + size]
            network(calibration.images([lesson.patch for lesson in batch]))
            features += [of_patch[:, lesson.voxels] for lesson, of_patch in zip(batch, read.pop(), strict=True)]
    inputs = torch.cat(features, 1)
    target = torch.cat([lesson.logits for lesson in lessons], 1).float()[None]
    inputs = torch.cat([inputs, torch.full_like(inputs[:1], head.bias is not None)])
    bias = torch.zeros(len(target[0]), device=target.device) if head.bias is None else head.bias.detach()
    weight = torch.cat([head.weight.detach().flatten(1), bias[:, None]], 1).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = divergence((weight @ inputs)[None], target, regions)
        loss.backward()
        return loss
    optimizer.step(closure)
    with torch.no_grad():
        head.weight.copy_(weight[:, :-1].reshape(head.weight.shape))
        if head.bias is not None:
            head.bias.copy_(weight[:, -1])
    return head


def fit_head(calibration: Calibration, joined: JoinedHeads, merged: dict[str, torch.Tensor], seed: int = 0,
             positions: int = 4096) -> dict[str, torch.Tensor]:
    """The merged tensors with the head of full resolution fitted to the ensemble. See `ensemble_lessons` and
    `teach_head`."""
    network = calibration.merged_network(merged)
    head = teach_head(calibration, network, ensemble_lessons(calibration, joined, seed, positions))
    canonical = {id(tensor): name for name, tensor in network.named_parameters(remove_duplicate=False)}
    return merged | {canonical[id(tensor)]: tensor.detach().cpu().to(merged[canonical[id(tensor)]].dtype)
                     for tensor in head.parameters()}


def output_layer(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """The convolution of single voxels whose output is the network's. Raises TransplantError where there is none."""
    made: list[tuple[nn.Module, torch.Tensor]] = []
    hooks = [module.register_forward_hook(lambda module, _, output: made.append((module, output)))
             for module in network.modules()
             if isinstance(module, (nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}]
    with torch.no_grad():
        result = network(images)
    found = next((module for module, output in made if output is result), None)
    for hook in hooks:
        hook.remove()
    if found is None:
        raise TransplantError("--fit_head needs a network that ends in a convolution of single voxels")
    return found


@contextmanager
def _hook(module: nn.Module, function: Callable) -> Iterator[None]:
    handle = module.register_forward_pre_hook(function)
    try:
        yield
    finally:
        handle.remove()


def _half_from(wanted: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of at most `count` entries: half of them where wanted, the others anywhere."""
    anywhere = torch.randperm(len(wanted), generator=generator)[:count // 2].to(wanted.device)
    there = wanted.nonzero()[:, 0]
    return torch.cat([anywhere, there[torch.randperm(len(there), generator=generator)[:count // 2].to(there.device)]])


def polish(calibration: Calibration, joined: JoinedHeads, merged: dict[str, torch.Tensor], steps: int, lr: float,
           seed: int = 0) -> dict[str, torch.Tensor]:
    """The merged tensors after some steps of AdamW that pull what the model says towards the ensemble: the mean over
    voxels of the Kullback-Leibler divergence from the ensemble's probabilities. No labels, no augmentation.

    Raises TransplantError where the weights become NaN or Inf.
    """
    teacher = [logits.cpu() for logits in ensemble_logits(calibration, joined, "ensemble")]
    regions = has_regions(calibration.dataset_json["labels"])
    network = calibration.merged_network(merged).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for chosen in calibration.bar(list(_batches(len(teacher), calibration.configuration.batch_size, steps, seed)),
                                  "polishing"):
        target = torch.stack([teacher[i] for i in chosen]).float().to(calibration.device)
        loss = divergence(network(calibration.images([calibration.patches[i] for i in chosen])), target, regions)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 12)  # as nnU-Net
        optimizer.step()
        schedule.step()
    canonical = canonical_names(network)
    polished = {canonical[name]: tensor.detach().cpu().to(merged[canonical[name]].dtype)
                for name, tensor in network.state_dict().items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in polished.values()):
        raise TransplantError("polishing diverged: give a smaller -polish_lr")
    return merged | polished


def divergence(logits: torch.Tensor, target: torch.Tensor, regions: bool) -> torch.Tensor:
    """KL(target || logits) in nats, the mean over voxels (and regions); both are logits (batch, rows, *size)."""
    if regions:
        probability = target.sigmoid()
        cross = nn.functional.binary_cross_entropy_with_logits(logits, probability)
        return cross - nn.functional.binary_cross_entropy_with_logits(target, probability)
    return nn.functional.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="none",
                                log_target=True).sum(1).mean()


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """So many batches of patches, each patch once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        del queue[:size]
