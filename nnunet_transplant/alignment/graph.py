"""The graph of a network's operations, as `torch.export` traces it, and running several networks through one graph."""
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from nnunet_transplant.errors import TransplantError


def trace(network: nn.Module, shape: Sequence[int]) -> Any:
    """The `torch.export` program of a network in eval mode, for inputs of this shape (1, channels, ...); nothing is
    allocated. Raises TransplantError for what cannot be traced."""
    network = network.to("meta").eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
            return torch.export.export(network, (torch.zeros(*shape, device="meta"),), strict=False)
    except Exception as error:  # torch.export meets what it cannot trace with any exception
        raise TransplantError(f"the network cannot be traced ({type(error).__name__}: {str(error)[:200]})") from error


def tensor_names(program: Any) -> dict[str, str]:
    """Node -> the tensor of the network that it stands for."""
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def untrained_heads(program: Any) -> frozenset[str]:
    """The tensors of the lowest head under deep supervision, which nnU-Net's loss gives no weight: of several outputs
    the last."""
    outputs = list(next(node for node in program.graph.nodes if node.op == "output").all_input_nodes)
    names = tensor_names(program)
    return frozenset(names[node.name] for node in outputs[-1].all_input_nodes if node.name in names) \
        if len(outputs) > 1 else frozenset()


class Run:
    """Several networks of one graph run on one input each, operation by operation beside each other. Memory is that of
    running all of them."""

    def __init__(self, program: Any) -> None:
        self.program, self.names = program, tensor_names(program)
        last = {node: user for user in program.graph.nodes for node in user.all_input_nodes}  # the last user of each
        self.unused_after: dict[fx.Node, list[fx.Node]] = {}
        for node, user in last.items():
            self.unused_after.setdefault(user, []).append(node)

    def __call__(self, networks: Sequence[Mapping[str, torch.Tensor]],
                 image: torch.Tensor) -> Iterator[tuple[fx.Node, list[torch.Tensor]]]:
        """Every operation in order and its value in each network, as soon as it is made (later ones may overwrite it).
        image: (1, channels, ...)."""
        values: list[dict[fx.Node, Any]] = [{} for _ in networks]
        for node in self.program.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder" and not node.users:  # another name of a tied tensor
                continue
            for value, network in zip(values, networks, strict=True):
                value[node] = self.compute(node, value, network, image)
            if node.op == "call_function":
                yield node, [value[node] for value in values]
            for value in values:
                for unused in self.unused_after.get(node, ()):
                    del value[unused]

    def compute(self, node: fx.Node, values: Mapping[fx.Node, Any], network: Mapping[str, torch.Tensor],
                image: torch.Tensor) -> Any:
        if node.op == "placeholder":
            name = self.names.get(node.name)
            if name is None:
                return image
            return network[name] if name in network else self.program.constants[name].to(image.device)
        return node.target(*fx.node.map_arg(node.args, values.__getitem__),
                           **fx.node.map_arg(node.kwargs, values.__getitem__))
