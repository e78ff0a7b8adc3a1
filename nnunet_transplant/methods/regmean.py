"""RegMean: the linear layer whose outputs are nearest to every model's on its own inputs, in closed form.

A layer is a matrix W of shape (inputs, outputs) that maps rows of inputs X: a convolution the neighbourhoods of its
input (im2col, inputs = in x kernel), a transposed convolution whose kernel is its stride single voxels (outputs = out x
kernel). W = (sum_t w_t G_t)^-1 sum_t w_t G_t W_t with G_t = X_t^T X_t, its entries off the diagonal times a factor (the
paper's alpha).
"""
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, cast

import torch
from torch import nn

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.device import forward_only, memory_left
from nnunet_transplant.experts import Experts
from nnunet_transplant.methods.linear import average
from nnunet_transplant.methods.registry import CONVEX, method
from nnunet_transplant.steps import Range, Seed
from nnunet_transplant.vectors import TaskVectors, Tensors

MEMORY = 0.25  # share of what the device has left for Gram matrices; for more layers the patches pass again
FEWEST = 1 << 14  # rows that layers with few inputs take, too
BLOCK = 1024  # inputs of which Gram matrices are made at a time: those on one side of the diagonal

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d
Positions = Annotated[int, "voxels that a layer takes of each patch, at most", Range(1, 2 ** 31 - 1)]


@method("regmean", "closed-form least squares: each layer nearest to every model's outputs on its own inputs",
        reference="Dataless Knowledge Fusion by Merging Weights of Language Models, Jin et al., ICLR 2023",
        url="https://arxiv.org/abs/2212.09849", weights=CONVEX, needs=("volumes",),
        passes=lambda experts, settings: 1.75 * len(experts.models) * len(experts.patches))  # and the Gram matrices
def regmean(vectors: TaskVectors, experts: Experts,
            off_diagonal: Annotated[float, "factor of the Gram matrices' entries off the diagonal, the paper's alpha",
                                    Range(0.0, 1.0)] = 0.9,
            positions: Positions = 1024,
            rows: Annotated[int, "voxels of all patches that a layer takes for each number that it reads, at most (but "
                            f"{FEWEST})", Range(1, 2 ** 31 - 1)] = 1,
            seed: Seed = 0) -> Callable[[Tensors], torch.Tensor]:
    """The solution for kernels, the weighted mean for everything else."""
    layers = {name: cast(Convolution, module) for name, module in module_weights(experts.network(0)).items()
              if name in vectors.names and is_linear(module)}
    budget = int(MEMORY * memory_left(experts.device))
    parts = list(groups(layers, budget))
    keep = len(parts) == 1 and len(vectors.thetas) * sum(map(gram_size, layers.values())) <= budget
    solved: dict[str, torch.Tensor] = {}
    for names in parts:
        sums = {name: Sums(as_matrix(layers[name].weight, layers[name])) for name in names}
        for model, weight in enumerate(vectors.weights):
            look = partial(grams, experts, model, names, positions, rows, seed)
            seen = experts.kept("grams", [model], [positions, rows, seed], look) if keep else look()
            for name, gram in seen.items():
                theta = vectors.thetas[model][name].float().to(experts.device)
                sums[name].add(gram.to(experts.device), as_matrix(theta, layers[name]), weight, off_diagonal)
        for name in experts.bar(names, "solving for the layers"):
            solved[name] = as_kernel(sums.pop(name).solution(), layers[name]).cpu()

    def merge(tensors: Tensors) -> torch.Tensor:
        return solved[tensors.name] if tensors.name in solved else average(tensors)
    return merge


def module_weights(network: nn.Module) -> dict[str, nn.Module]:
    """Canonical tensor name -> the module whose `weight` it is."""
    canonical = canonical_names(network)
    return {canonical[f"{name}.weight"]: module for name, module in network.named_modules()
            if f"{name}.weight" in canonical}


def is_linear(module: nn.Module) -> bool:
    if not isinstance(module, Convolution) or module.groups != 1 or set(module.dilation) != {1}:
        return False
    return not module.transposed or module.kernel_size == module.stride


def as_matrix(weight: torch.Tensor, layer: Convolution) -> torch.Tensor:
    """The kernel as (inputs, outputs)."""
    weight = weight.detach()
    return weight.flatten(1) if layer.transposed else weight.flatten(1).T


def as_kernel(matrix: torch.Tensor, layer: Convolution) -> torch.Tensor:
    return (matrix if layer.transposed else matrix.T).reshape(layer.weight.shape)


def gram_size(layer: Convolution) -> int:
    """Bytes of a layer's Gram matrix."""
    return 4 * len(as_matrix(layer.weight, layer)) ** 2


def groups(layers: Mapping[str, Convolution], budget: int) -> Iterator[list[str]]:
    """The layers, so many at a time that their Gram matrices keep to the budget (one at least)."""
    group: list[str] = []
    used = 0
    for name, layer in layers.items():
        size = gram_size(layer)
        if group and used + size > budget:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


class Sums:
    """sum_t w_t G_t and sum_t w_t G_t W_t of one layer, model by model."""

    def __init__(self, matrix: torch.Tensor) -> None:
        inputs, outputs = matrix.shape
        self.gram, self.right = matrix.new_zeros(inputs, inputs), matrix.new_zeros(inputs, outputs)
        self.mean = torch.zeros_like(self.right)  # for inputs that are always zero

    def add(self, gram: torch.Tensor, matrix: torch.Tensor, weight: float, off_diagonal: float) -> None:
        diagonal = gram.diagonal()
        self.gram.add_(gram, alpha=weight * off_diagonal)
        self.gram.diagonal().add_(diagonal, alpha=weight * (1 - off_diagonal))
        self.right.addmm_(gram, matrix, alpha=weight * off_diagonal)
        self.right.add_(diagonal[:, None] * matrix, alpha=weight * (1 - off_diagonal))
        self.mean.add_(matrix, alpha=weight)

    def solution(self) -> torch.Tensor:
        """Once: its memory is that of the matrix."""
        system = self.gram
        seen = system.diagonal() > 0
        scale = torch.where(seen, system.diagonal(), 1.0).rsqrt()  # unit diagonal: as well-conditioned as it gets
        system.mul_(scale).mul_(scale[:, None])
        system.diagonal().copy_(torch.where(seen, 1.0 + 1e-6, 1.0))
        right = scale[:, None] * self.right
        factor, failed = torch.linalg.cholesky_ex(system)
        solved = torch.linalg.solve(system, right) if failed else torch.cholesky_solve(right, factor)
        return torch.where(seen[:, None], scale[:, None] * solved, self.mean)


def grams(experts: Experts, model: int, names: Iterable[str], positions: int, rows_each: int,
          seed: int) -> dict[str, torch.Tensor]:
    """X^T X of layers by name, of what they see when one model runs on all patches. Each layer takes some of its output
    voxels of every patch, drawn at random: at most `positions`, and of all patches `rows_each` for each of its inputs,
    or FEWEST. More tell it nothing new and cost more than the network."""
    network = experts.network(model)
    modules = module_weights(network)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, layer: Convolution) -> None:
        size = len(as_matrix(layer.weight, layer))
        gram = found[name] = torch.zeros(size, size, device=experts.device)

        most = min(positions, math.ceil(max(rows_each * size, FEWEST) / len(experts.patches)))

        def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            add_products(gram, input_rows(cast(Convolution, layer), inputs[0], most, generator).float())
        layer.register_forward_pre_hook(hook)

    for name in names:
        watch(name, cast(Convolution, modules[name]))
    with forward_only(experts.device):
        for patch in experts.bar(experts.patches, f"layer inputs of model {model + 1}"):
            network(experts.images([patch]))
    for gram in found.values():
        mirror(gram)
    return found


def add_products(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """gram += rows^T rows, on the diagonal and above: half of the work. `mirror` makes the rest."""
    for start in range(0, len(gram), BLOCK):
        gram[start:start + BLOCK, start:].addmm_(rows[:, start:start + BLOCK].T, rows[:, start:])


def mirror(gram: torch.Tensor) -> None:
    for start in range(0, len(gram), BLOCK):
        gram[start + BLOCK:, start:start + BLOCK] = gram[start:start + BLOCK, start + BLOCK:].T


def input_rows(layer: Convolution, inputs: torch.Tensor, positions: int, generator: torch.Generator) -> torch.Tensor:
    """What the layer's matrix is multiplied with: (positions, inputs), of one patch."""
    if layer.transposed:
        rows = inputs[0].flatten(1).T
        return rows[choose(len(rows), positions, generator)]
    padded = nn.functional.pad(inputs[0], [pad for pad in reversed(cast(tuple, layer.padding)) for _ in (0, 1)])
    windows = windows_of(padded, layer.kernel_size, layer.stride)
    output = windows.shape[1:padded.dim()]
    chosen = torch.unravel_index(choose(output.numel(), positions, generator), output)
    at: tuple[Any, ...] = (slice(None), *(index.to(inputs.device) for index in chosen))
    rows = windows[at]  # (channels, positions, *kernel)
    return rows.transpose(0, 1).flatten(1)


def windows_of(volume: torch.Tensor, kernel: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """(channels, *size) -> (channels, *output, *kernel), a view: what a kernel sees at each of its places."""
    for axis, (size, step) in enumerate(zip(kernel, stride, strict=True), start=1):
        volume = volume.unfold(axis, size, step)
    return volume


def choose(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """All of `size` indices, or `count` of them at random."""
    return torch.arange(size) if size <= count else torch.randperm(size, generator=generator)[:count]
