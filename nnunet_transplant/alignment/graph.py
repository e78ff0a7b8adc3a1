"""The graph of a network's operations, as `torch.export` traces it, and running several networks through one graph."""
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import fx, nn

from nnunet_transplant.architecture import build_network, changes_network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.nnunet import nnUNetTrainer

Node = Any  # torch.fx.Node, whose arguments torch types as everything that they might be


def exported(network: nn.Module, shape: Sequence[int]) -> Any:
    """The `torch.export` program of a network, which is put in eval mode, for inputs of this shape (1, channels, ...).

    Nothing is computed: the network may be on the meta device, but then so are the program's constants.
    Raises TransplantError that names the module that cannot be traced.
    """
    image = torch.zeros(*shape, device=next(network.parameters()).device)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
            return torch.export.export(network.eval(), (image,), strict=False)
    except Exception as error:  # torch.export meets what it cannot trace with any exception
        names = {id(module): name for name, module in network.named_modules()}
        calls = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        where = next((names[module] for module in reversed(calls) if module in names), "") or "the network"
        what = [*str(error).strip().splitlines(), ""][0]
        raise TransplantError(f"alignment cannot trace {where} ({type(error).__name__}: {what[:200]})") from error


def meta_network(model: TrainedModel, trainer: type[nnUNetTrainer]) -> nn.Module:
    """A model's network, heads of deep supervision included, without its weights: on the meta device, unless a trainer
    builds it, for it may hold constants that it computes when it is made (Primus its positions)."""
    with torch.device("cpu" if changes_network(trainer) else "meta"):
        return build_network(model.plans, model.configuration, model.dataset_json, trainer)


def input_shape(model: TrainedModel, smallest: bool = False) -> tuple[int, ...]:
    """(1, channels, *patch_size); a small input where the network takes any: two voxels an axis at the bottom (an
    instance norm wants more than one)."""
    plans = PlansManager(model.plans)
    configuration = plans.get_configuration(model.configuration)
    size = configuration.patch_size
    strides = configuration.network_arch_init_kwargs.get("strides")
    if smallest and strides is not None:
        size = (2 * torch.tensor(strides).prod(0)).tolist()
    return 1, determine_num_input_channels(plans, configuration, model.dataset_json), *size


def tensor_names(program: Any) -> dict[str, str]:
    """Node -> the tensor of the network that it stands for."""
    signature = program.graph_signature
    return {**signature.inputs_to_parameters, **signature.inputs_to_buffers}


def lowest_head(program: Any) -> frozenset[str]:
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
        self.unused_after: dict[Node, list[Node]] = {}
        for node, user in last.items():
            self.unused_after.setdefault(user, []).append(node)

    def __call__(self, networks: Sequence[Mapping[str, torch.Tensor]],
                 image: torch.Tensor) -> Iterator[tuple[Node, list[dict[Node, Any]]]]:
        """Every operation in order, and in each network the values that are still in use, its own and its inputs'
        among them (later operations may overwrite them). image: (1, channels, ...)."""
        values: list[dict[Node, Any]] = [{} for _ in networks]
        for node in self.program.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder" and not node.users:  # another name of a tied tensor
                continue
            for value, network in zip(values, networks, strict=True):
                value[node] = self.compute(node, value, network, image)
            if node.op == "call_function":
                yield node, values
            for value in values:
                for unused in self.unused_after.get(node, ()):
                    del value[unused]

    def compute(self, node: Node, values: Mapping[Node, Any], network: Mapping[str, torch.Tensor],
                image: torch.Tensor) -> Any:
        if node.op == "placeholder":
            name = self.names.get(node.name)
            if name is None:
                return image
            return network[name] if name in network else self.program.constants[name].to(image.device)
        return node.target(*fx.node.map_arg(node.args, values.__getitem__),
                           **fx.node.map_arg(node.kwargs, values.__getitem__))
