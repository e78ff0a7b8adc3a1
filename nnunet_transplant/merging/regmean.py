"""RegMean: the linear layer whose outputs are nearest to every model's on its own inputs, in closed form.

A layer is a matrix W of shape (inputs, outputs) that maps rows of inputs X: a convolution the neighbourhoods of its
input (im2col, inputs = in x kernel), a transposed convolution whose kernel is its stride single voxels (outputs = out x
kernel). W = (sum_t w_t X_t^T X_t)^-1 sum_t w_t X_t^T X_t W_t, the entries of X^T X off the diagonal times a factor
(the paper's alpha).
"""
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from nnunet_transplant.merging.calibration import Calibration, module_weights
from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import SEED, SHARES, Method, Parameter, register
from nnunet_transplant.merging.vectors import TaskVectors, Tensors

BUDGET = 2 << 30  # bytes of Gram matrices at a time; for more layers the patches pass through the networks again

Convolution = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


def solutions(vectors: TaskVectors, calibration: Calibration, off_diagonal: float, positions: int,
              seed: int) -> dict[str, torch.Tensor]:
    """The merged kernels of all convolutions, by tensor name."""
    layers = {name: module for name, module in module_weights(calibration.network(0)).items()
              if name in vectors.names and is_linear(module)}
    merged = {}
    for group in groups(layers):
        sums = {name: Sums(as_matrix(layers[name]), calibration.device) for name in group}
        for model, weight in enumerate(vectors.weights):
            add_model(sums, calibration, model, weight, positions, seed)
        for name in group:
            merged[name] = as_kernel(sums.pop(name).solve(off_diagonal), layers[name]).cpu()
    return merged


def is_linear(module: nn.Module) -> bool:
    if not isinstance(module, Convolution) or module.groups != 1 or set(module.dilation) != {1}:
        return False
    return not module.transposed or module.kernel_size == module.stride


def as_matrix(layer: Convolution) -> torch.Tensor:
    """The kernel as (inputs, outputs)."""
    weight = layer.weight.detach()
    return weight.flatten(1) if layer.transposed else weight.flatten(1).T


def as_kernel(matrix: torch.Tensor, layer: Convolution) -> torch.Tensor:
    return (matrix if layer.transposed else matrix.T).reshape(layer.weight.shape)


def groups(layers: dict[str, Convolution]) -> Iterator[list[str]]:
    """The layers, so many at a time that their Gram matrices keep to the budget (one at least)."""
    group, used = [], 0
    for name, layer in layers.items():
        size = 4 * len(as_matrix(layer)) ** 2
        if group and used + size > BUDGET:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


class Sums:
    """sum_t w_t X_t^T X_t and sum_t w_t X_t^T X_t W_t of one layer, gathered batch by batch."""

    def __init__(self, matrix: torch.Tensor, device: torch.device) -> None:
        inputs, outputs = matrix.shape
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.right = torch.zeros(inputs, outputs, device=device)           # of the whole Gram matrices
        self.right_diagonal = torch.zeros(inputs, outputs, device=device)  # of their diagonals alone
        self.mean = torch.zeros(inputs, outputs, device=device)            # for inputs that are always zero

    def add(self, rows: torch.Tensor, matrix: torch.Tensor, weight: float) -> None:
        self.gram.addmm_(rows.T, rows, alpha=weight)
        self.right.addmm_(rows.T, rows @ matrix, alpha=weight)
        self.right_diagonal.addcmul_(rows.square().sum(0)[:, None], matrix, value=weight)

    def solve(self, off_diagonal: float) -> torch.Tensor:
        diagonal = self.gram.diagonal()
        right = torch.lerp(self.right_diagonal, self.right, off_diagonal)
        seen = diagonal > 0
        scale = torch.where(seen, diagonal, 1.0).rsqrt()  # unit diagonal: as well-conditioned as it gets
        system = self.gram * off_diagonal * scale * scale[:, None]
        system.diagonal().copy_(torch.where(seen, 1.0 + 1e-6, 1.0))
        solution = scale[:, None] * torch.linalg.solve(system, scale[:, None] * right)
        return torch.where(seen[:, None], solution, self.mean)


def add_model(sums: dict[str, Sums], calibration: Calibration, model: int, weight: float, positions: int,
              seed: int) -> None:
    """Run one model on all patches and add what the layers see. Each layer takes at most `positions` of its output
    voxels of every patch, drawn at random."""
    network = calibration.network(model)
    modules = module_weights(network)
    generator = torch.Generator().manual_seed(seed)
    matrices = {name: as_matrix(modules[name]) for name in sums}

    def watch(name: str) -> nn.modules.module.RemovableHandle:
        def hook(layer: Convolution, inputs: Sequence[torch.Tensor]) -> None:
            sums[name].add(input_rows(layer, inputs[0], positions, generator), matrices[name], weight)
        return modules[name].register_forward_pre_hook(hook)

    for name in sums:
        watch(name)
        sums[name].mean.add_(matrices[name], alpha=weight)
    with torch.no_grad():
        for patch in calibration.bar(calibration.patches, f"layer inputs of model {model + 1}"):
            network(calibration.images([patch]))


def input_rows(layer: Convolution, inputs: torch.Tensor, positions: int, generator: torch.Generator) -> torch.Tensor:
    """What the layer's matrix is multiplied with: (positions, inputs), of one patch."""
    if layer.transposed:
        rows = inputs[0].flatten(1).T
        return rows[choose(len(rows), positions, generator)]
    padded = nn.functional.pad(inputs[0], [pad for pad in reversed(layer.padding) for _ in (0, 1)])
    windows = windows_of(padded, layer.kernel_size, layer.stride)
    output = windows.shape[1:padded.dim()]
    chosen = torch.unravel_index(choose(output.numel(), positions, generator), output)
    rows = windows[(slice(None), *(index.to(inputs.device) for index in chosen))]  # (channels, positions, *kernel)
    return rows.transpose(0, 1).flatten(1)


def windows_of(volume: torch.Tensor, kernel: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """(channels, *size) -> (channels, *output, *kernel), a view: what a kernel sees at each of its places."""
    for axis, (size, step) in enumerate(zip(kernel, stride, strict=True), start=1):
        volume = volume.unfold(axis, size, step)
    return volume


def choose(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """All of `size` indices, or `count` of them at random."""
    return torch.arange(size) if size <= count else torch.randperm(size, generator=generator)[:count]


def regmean(tensors: Tensors, state: dict[str, torch.Tensor], **_: float) -> torch.Tensor:
    """The solution for kernels, the weighted mean for everything else."""
    return state[tensors.name] if tensors.name in state else average(tensors)


register(Method(
    name="regmean", summary="closed-form least squares: each layer nearest to every model's outputs on its own inputs",
    reference="Dataless Knowledge Fusion by Merging Weights of Language Models, Jin et al., ICLR 2023",
    merge=regmean, prepare=solutions, weights_rule=SHARES, needs_base=False, needs_data="volumes",
    parameters=(Parameter("off_diagonal", 0.9, "factor of the Gram matrices' entries off the diagonal, the paper's "
                                           "alpha", 0.0, 1.0),
                Parameter("positions", 1024, "voxels that a layer takes of each patch, at most", 1, 2 ** 31 - 1),
                SEED)))
