"""Least squares layer by layer on the merged model's own inputs: every convolution in turn gets the kernel that brings
what it makes nearest to the mean of what the models, aligned before, make there.

RegMean fits each layer to the inputs that the models see; the merged model, in which the layers before are merged too,
sees others. Here a layer corrects what those before it did not reach. With the rows X of the merged model's inputs
(im2col) and the models' mean outputs Y, both without their mean in each patch,
W = (X^T X + r I)^-1 (X^T Y + r W_0), W_0 the weighted mean of the kernels, scaled to fit best: what the volumes do not
tell stays as it was. Where a norm follows, Y is taken behind it; an instance norm divides by another number in every
patch, which the kernel cannot know, so Y is multiplied by what the models' norms divided by. The norm's scale and shift
are then those of least squares.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import fx, nn

from nnunet_transplant.alignment.graph import Node, Run, exported, input_shape, meta_network, tensor_names
from nnunet_transplant.architecture import Network
from nnunet_transplant.device import forward_only
from nnunet_transplant.experts import Experts
from nnunet_transplant.methods.linear import average
from nnunet_transplant.methods.registry import CONVEX, method
from nnunet_transplant.methods.regmean import Positions, choose, windows_of
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.steps import Range, Seed
from nnunet_transplant.vectors import TINY, TaskVectors, Tensors, added_up

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)
_TRANSPOSED = (torch.ops.aten.conv_transpose2d.input, torch.ops.aten.conv_transpose3d.input)
_INSTANCE = (torch.ops.aten.instance_norm.default,)
_NORMS = (*_INSTANCE, torch.ops.aten.batch_norm.default)


@dataclass(frozen=True)
class Layer:
    """A convolution in the graph, and the norm that follows it, if one does."""
    node: Node
    norm: Node | None
    weight: str
    bias: str | None
    scale: str | None   # of the norm
    shift: str | None
    mean: str | None    # running statistics
    variance: str | None

    @property
    def by_instance(self) -> bool:
        return self.norm is not None and self.norm.target in _INSTANCE

    @property
    def transposed(self) -> bool:
        return self.node.target in _TRANSPOSED


def layers(program: Any, names: list[str]) -> list[Layer]:
    """The convolutions whose kernel is among the names, in the order of the graph."""
    names_of = tensor_names(program)

    def name(node: Any) -> str | None:
        return names_of.get(node.name) if isinstance(node, fx.Node) else None
    found = []
    for node in program.graph.nodes:
        if node.target not in (*_CONVOLUTIONS, *_TRANSPOSED) or name(node.args[1]) not in names or not _plain(node):
            continue
        norm = next((user for user in node.users if user.target in _NORMS), None)
        of_norm = [None] * 4 if norm is None else [name(argument) for argument in norm.args[1:5]]
        found.append(Layer(node, norm, names_of[node.args[1].name], name(node.args[2]) if len(node.args) > 2 else None,
                           *of_norm))
    return found


def _plain(node: Node) -> bool:
    """Neither dilated nor in groups; a transposed one has its kernel as its stride."""
    if node.target in _TRANSPOSED:
        return list(node.args[3]) == list(node.args[1].meta["val"].shape[2:])
    given = node.args[5:7]
    dilation, groups = given[0] if given else [1], given[1] if len(given) > 1 else 1
    return set(dilation) == {1} and groups == 1


@method("refit", "least squares layer by layer on the merged model's own inputs, to the models' mean outputs",
        reference="this package; after RegMean, Jin et al., ICLR 2023", url="https://arxiv.org/abs/2212.09849",
        weights=CONVEX, needs=("volumes",), passes=lambda experts, settings: (  # half of all networks for each layer
            0.5 * (len(experts.models) + 1) * len(experts.patches) * kernels(experts.models[0])))
def refit(vectors: TaskVectors, experts: Experts,
          ridge: Annotated[float, "how much the mean of the kernels counts, in mean variances of an input",
                           Range(1e-6, 1e6)] = 0.1,
          positions: Positions = 1024, seed: Seed = 0) -> Callable[[Tensors], torch.Tensor]:
    """What was fitted; the weighted mean of everything else."""
    first = experts.models[0]
    program = exported(meta_network(first, experts.trainer), input_shape(first))
    device = experts.device
    models = [{name: tensor.float().to(device) for name, tensor in tensors.items()} for tensors in experts.tensors]
    merged = {name: added_up(weight * model[name] for weight, model in zip(vectors.weights, models, strict=True))
              for name in vectors.names}
    # the merged heads have the rows of all tasks; what they say is not looked at
    network = {**models[0], **merged}
    run = Run(program)
    found: dict[str, torch.Tensor] = {}
    for layer in experts.bar(layers(program, vectors.names), "layers"):
        sums = LeastSquares(network[layer.weight], layer.transposed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for patch in experts.patches:
                with forward_only(experts.device):
                    inputs, outputs, spreads = look(run, layer, [*models, network], experts.images([patch]))
                target, spread = (added_up(weight * each for weight, each in zip(vectors.weights, values, strict=True))
                                  for values in (outputs, spreads))
                sums.add(*rows(layer, inputs, target, positions, generator), spread)
        found |= solve(layer, sums, network, ridge)
        network |= found
    fitted = {name: tensor.cpu() for name, tensor in found.items()}

    def merge(tensors: Tensors) -> torch.Tensor:
        return fitted[tensors.name] if tensors.name in fitted else average(tensors)
    return merge


def kernels(model: TrainedModel) -> int:
    return sum(len(model.layout.shapes[name]) > 3 for name in model.layout.body)


def look(run: Run, layer: Layer, networks: Sequence[Network],
         image: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """What a layer reads in the last of the networks; what it makes in each of the others, behind the norm, and what an
    instance norm divides its units by, 1 without one."""
    inputs, spreads = torch.empty(0), [torch.empty(0)]  # found before the loop ends
    for node, values in run(networks, image):
        if node is layer.node:
            inputs = values[-1][node.args[0]].float()
            made = [value[node][0].flatten(1).float() for value in values[:-1]]
            spreads = [each.std(1, correction=0) if layer.by_instance else torch.ones_like(each[:, 0])
                       for each in made]
        if node is (layer.norm or layer.node):
            return inputs, [value[node].float() for value in values[:-1]], spreads
    raise AssertionError(f"{layer.node} is not in the graph")


def rows(layer: Layer, inputs: torch.Tensor, target: torch.Tensor, positions: int,
         generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the inputs (positions, inputs) and of what should become of them (positions, outputs), of one patch."""
    weight = layer.node.args[1].meta["val"]
    kernel, stride, padding = weight.shape[2:], *_geometry(layer.node)
    if layer.transposed:
        windows = inputs[0][(..., *[None] * len(kernel))]
        outputs = windows_of(target[0], kernel, kernel)
    else:
        padded = nn.functional.pad(inputs[0], [pad for pad in reversed(padding) for _ in (0, 1)])
        windows, outputs = windows_of(padded, kernel, stride), target[0][(..., *[None] * len(kernel))]
    size = windows.shape[1:1 + len(kernel)]
    chosen = torch.unravel_index(choose(size.numel(), positions, generator), size)
    at: tuple[Any, ...] = (slice(None), *(index.to(inputs.device) for index in chosen))
    return windows[at].transpose(0, 1).flatten(1), outputs[at].transpose(0, 1).flatten(1)


def _geometry(node: Node) -> tuple[list[int], list[int]]:
    """Stride and padding."""
    dims = node.args[1].meta["val"].dim() - 2
    stride = list(node.args[3]) if len(node.args) > 3 else [1] * dims
    return stride, list(node.args[4]) if len(node.args) > 4 else [0] * dims


class LeastSquares:
    """X^T X and X^T Y of one layer, patch by patch, without the means of each patch; and the means of all."""

    def __init__(self, weight: torch.Tensor, transposed: bool) -> None:
        self.prior = weight.flatten(1) if transposed else weight.flatten(1).T  # (inputs, outputs)
        inputs, outputs = self.prior.shape
        self.gram, self.right = weight.new_zeros(inputs, inputs), weight.new_zeros(inputs, outputs)
        self.normed = weight.new_zeros(inputs, outputs)  # X^T Y where each patch's X is divided by its spread
        self.mean_x, self.mean_y, self.spread = (weight.new_zeros(n) for n in (inputs, outputs, outputs))
        self.between = weight.new_zeros(inputs, inputs)  # of the patches' means, for running statistics
        self.count = self.patches = 0

    def add(self, x: torch.Tensor, y: torch.Tensor, spread: torch.Tensor) -> None:
        """Rows of one patch, and what the models' norms divide each output by there."""
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, spread = x - mean_x, spread.repeat_interleave(y.shape[1] // len(spread)).clamp(min=TINY)
        products = x.T @ (y - mean_y)
        self.gram.addmm_(x.T, x)
        self.right += products * spread
        self.normed += products / spread
        self.spread += len(x) * spread.square()
        self.mean_x += mean_x
        self.mean_y += mean_y
        self.between.addr_(mean_x, mean_x, alpha=len(x))
        self.count += len(x)
        self.patches += 1

    def kernel(self, ridge: float) -> torch.Tensor:
        """(inputs, outputs)."""
        fit = (self.prior * self.right).sum(0) / (self.prior * (self.gram @ self.prior)).sum(0).clamp(min=TINY)
        prior = self.prior * fit
        amount = ridge * self.gram.diagonal().mean() + TINY
        system = self.gram + amount * torch.eye(len(self.gram), device=self.gram.device)
        return torch.linalg.solve(system, self.right + amount * prior)


def solve(layer: Layer, sums: LeastSquares, network: Network, ridge: float) -> dict[str, torch.Tensor]:
    """The layer's new tensors."""
    kernel = sums.kernel(ridge)
    made = (kernel * (sums.gram @ kernel)).sum(0).clamp(min=TINY)
    if layer.by_instance:  # as large as the models' kernels: the norm adds its eps to what it divides by
        kernel = kernel / (made / sums.spread).sqrt()
    weight = network[layer.weight]
    found = {layer.weight: (kernel if layer.transposed else kernel.T).reshape(weight.shape)}
    mean_y, mean_x = sums.mean_y / sums.patches, sums.mean_x / sums.patches
    if layer.norm is None:
        if layer.bias is not None:
            shift = mean_y - mean_x @ kernel
            found[layer.bias] = shift.reshape(len(network[layer.bias]), -1).mean(1)
        return found
    if layer.bias is not None:
        found[layer.bias] = torch.zeros_like(network[layer.bias])
    if layer.by_instance:
        # the new kernel has its own spread in every patch, here taken to be the models'
        scale = (kernel * sums.normed).sum(0) / sums.count
    else:
        total = sums.gram + sums.between - sums.count * torch.outer(mean_x, mean_x)
        variance = (kernel * (total @ kernel)).sum(0).clamp(min=TINY) / sums.count
        if layer.mean is not None and layer.variance is not None:
            found[layer.mean], found[layer.variance] = mean_x @ kernel, variance
        scale = (kernel * sums.right).sum(0) / made * variance.sqrt()
    if layer.scale is not None and layer.shift is not None:
        found[layer.scale], found[layer.shift] = scale, mean_y
    return found
