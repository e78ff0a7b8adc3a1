"""The head fitted to what the experts say: a head was trained on its own network, and reads another one now."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from torch import nn
from tqdm import tqdm

from nnunet_transplant.device import forward_only
from nnunet_transplant.ensemble import dice_loss, divergence, ensemble_logits
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.registry import fit
from nnunet_transplant.steps import Range, Seed

ITERATIONS = 100  # of L-BFGS, at most

Convolution = nn.Conv2d | nn.Conv3d
Lesson = tuple[torch.Tensor, torch.Tensor]  # of a patch: voxels (flattened indices), half logits (rows, voxels)


def lessons_of(experts: Experts, seed: int, positions: int) -> list[Lesson]:
    """What the ensemble says of some voxels of every patch: at most so many positions, half of them where it is not
    sure of background."""
    generator = torch.Generator().manual_seed(seed)
    lessons = []
    for target in ensemble_logits(experts):
        logits = target.flatten(1)
        probability = logits.float().sigmoid().amax(0) if experts.regions else 1 - logits.float().softmax(0)[0]
        voxels = _half_from(probability > 0.01, positions, generator)
        lessons.append((voxels.cpu(), logits[:, voxels].cpu()))
    return lessons


def teach_head(experts: Experts, network: nn.Module, lessons: Sequence[Lesson]) -> Convolution:
    """Fit the head of full resolution of a merged network, in place, to what the ensemble says, from what the head
    reads: down the divergence and the Dice loss of all voxels, without step sizes (L-BFGS). No labels.

    Returns the head. Raises TransplantError for a network whose output no single layer makes.
    """
    head = output_layer(network, experts.images(experts.patches[:1]))
    features: list[torch.Tensor] = []  # of each patch (inputs, voxels)

    def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        voxels = lessons[len(features)][0]
        features.append(inputs[0][0].flatten(1)[:, voxels.to(inputs[0].device)].float())

    with forward_only(experts.device), _hook(head, look):
        for patch in experts.bar(experts.patches, "what the head reads"):
            network(experts.images([patch]))
    inputs = torch.cat(features, 1)
    target = torch.cat([logits for _, logits in lessons], 1).float().to(inputs.device)[None]
    inputs = torch.cat([inputs, torch.full_like(inputs[:1], head.bias is not None)])
    bias = torch.zeros(len(target[0]), device=target.device) if head.bias is None else head.bias.detach()
    weight = torch.cat([head.weight.detach().flatten(1), bias[:, None]], 1).requires_grad_(True)
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    bar = tqdm(desc="fitting the head", unit=" evaluations", delay=3, disable=not experts.progress)

    def closure() -> torch.Tensor:
        bar.update()
        optimizer.zero_grad()
        said = (weight @ inputs)[None]
        loss = divergence(said, target, experts.regions) + dice_loss(said, target, experts.regions, power=2)
        loss.backward()
        return loss
    with bar:
        optimizer.step(closure)
    with torch.no_grad():
        head.weight.copy_(weight[:, :-1].reshape(head.weight.shape))
        if head.bias is not None:
            head.bias.copy_(weight[:, -1])
    return head


@fit("head", "the head of full resolution, without labels: a pass of every model, and half of the merge",
     reference="this package; after Distilling the Knowledge in a Neural Network, Hinton et al., 2015",
     url="https://arxiv.org/abs/1503.02531",
     passes=lambda experts, settings: (len(experts.models) + 1) * len(experts.patches))
def head(merged: dict[str, torch.Tensor], experts: Experts,
         positions: Annotated[int, "voxels taken of each patch, at most", Range(2, 2 ** 31 - 1)] = 4096,
         seed: Seed = 0) -> dict[str, torch.Tensor]:
    """The merged tensors with the head of full resolution fitted to the ensemble. See `lessons_of` and `teach_head`."""
    network = experts.merged_network(merged)
    every = range(len(experts.models))
    lessons = experts.kept("lessons", every, [experts.joined, seed, positions],
                           lambda: lessons_of(experts, seed, positions))
    layer = teach_head(experts, network, lessons)
    canonical = {id(tensor): name for name, tensor in network.named_parameters(remove_duplicate=False)}
    return merged | {canonical[id(tensor)]: tensor.detach().cpu().to(merged[canonical[id(tensor)]].dtype)
                     for tensor in layer.parameters()}


def output_layer(network: nn.Module, images: torch.Tensor) -> Convolution:
    """The convolution of single voxels whose output is the network's. Raises TransplantError where there is none."""
    made: list[tuple[Convolution, torch.Tensor]] = []
    hooks = [module.register_forward_hook(lambda module, _, output: made.append((module, output)))
             for module in network.modules()
             if isinstance(module, (nn.Conv2d, nn.Conv3d)) and set(module.kernel_size) == {1}]
    with forward_only(images.device):
        result = network(images)
    found = next((module for module, output in made if output is result), None)
    for hook in hooks:
        hook.remove()
    if found is None:
        raise TransplantError("-fit head needs a network that ends in a convolution of single voxels")
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
