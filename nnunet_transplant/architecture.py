"""The networks that nnU-Net builds from plans: their tensors by name, which of them are one and the same, which are
heads."""
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import math
import pydoc
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.nnunet import nnUNetTrainer

Network = Mapping[str, torch.Tensor]  # tensors by canonical name


@dataclass(frozen=True)
class Layout:
    """The tensors of a network. nnU-Net's state dict names the same tensor up to four times (`encoder.*` and
    `decoder.encoder.*`, `conv` and `all_modules.0`): each tensor goes by the last of its names, the one that counts
    when a state dict is loaded."""
    shapes: dict[str, tuple[int, ...]]  # every name of the state dict, in its order
    canonical: dict[str, str]           # every name -> the last name of the same tensor
    heads: frozenset[str]               # canonical names of the segmentation heads
    # every other layer as it prints itself: strides, nonlinearities and the like are in no tensor
    modules: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The canonical names, one for each tensor, in the order of the state dict."""
        return [name for name in self.shapes if self.canonical[name] == name]

    @property
    def body(self) -> list[str]:
        """The canonical names of everything but the heads: what theta_0 and tau consist of."""
        return [name for name in self.names if name not in self.heads]


def bare(network: nn.Module) -> nn.Module:
    """The network without what DDP and torch.compile wrap around it, so that tensors have their plain names."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def canonical_names(network: nn.Module) -> dict[str, str]:
    """Every name in the state dict -> the last name of the same tensor, found by identity."""
    named = [*bare(network).named_parameters(remove_duplicate=False), *bare(network).named_buffers(
        remove_duplicate=False)]
    objects = {name: id(tensor) for name, tensor in named}
    names = list(bare(network).state_dict(keep_vars=True))  # without buffers that are not saved
    last = {objects[name]: name for name in names}
    return {name: last[objects[name]] for name in names}


def canonical_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by its canonical name."""
    canonical = canonical_names(network)
    return {canonical[name]: parameter for name, parameter in bare(network).named_parameters(remove_duplicate=False)}


def find_trainer(trainer_name: str) -> type[nnUNetTrainer]:
    """The trainer class nnU-Net finds by this name. Raises TransplantError where it finds none."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # nnU-Net narrates its search,
            warnings.simplefilter("ignore")  # and imports on it what torch finds outdated
            return recursive_find_trainer_class_by_name(trainer_name)
    except (RuntimeError, AssertionError, TypeError) as error:  # the last two: it finds something else of this name
        raise TransplantError(f"nnU-Net does not find the trainer '{trainer_name}', which builds this network: add its "
                              "folder to nnUNet_extTrainer") from error


def changes_network(trainer: type[nnUNetTrainer]) -> bool:
    """Whether the trainer builds another network than the one in the plans."""
    return trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture


def build_network(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any],
                  trainer: type[nnUNetTrainer] = nnUNetTrainer, num_heads: int | None = None,
                  deep_supervision: bool = True) -> nn.Module:
    """The network of a trained model, with `num_heads` output channels (default: as many as its labels need)."""
    manager = PlansManager(plans)
    config = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, config, dataset_json)
    if num_heads is None:
        num_heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    build = trainer.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(manager, config, channels, num_heads, deep_supervision)
    return build(config.network_arch_class_name, config.network_arch_init_kwargs,
                 config.network_arch_init_kwargs_req_import, channels, num_heads, deep_supervision)


# Where the classes that plans name may come from. nnU-Net imports and calls whatever they name, with arguments from the
# plans: without this, a plans.json runs code as a pickle does.
_NETWORKS = "dynamic_network_architectures."
_LAYERS = tuple(f"torch.nn.modules.{module}" for module in (
    "conv", "batchnorm", "instancenorm", "normalization", "dropout", "activation", "linear"))


def check_plans(plans: dict, configuration: str) -> None:
    """Raise TransplantError for plans that name other classes than networks and layers, or whose numbers are out of
    this world. Raises anything for plans that nnU-Net cannot read."""
    values = [plans["configurations"]]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
        if (isinstance(value, list) and len(value) > 1000) or (isinstance(value, int) and value > 10**6):
            raise TransplantError("the plans describe a network of a size out of this world")
    config = PlansManager(plans).get_configuration(configuration)
    kwargs = config.network_arch_init_kwargs
    layers = [kwargs[key] for key in config.network_arch_init_kwargs_req_import if kwargs[key] is not None]
    for name in (config.network_arch_class_name, *layers):
        known = name.startswith((_NETWORKS, "torch.nn."))
        found = pydoc.locate(name) if known else None
        # an unknown network is looked for by its last name, among dynamic_network_architectures' own
        moved = known and found is None and name not in layers
        if not moved and not (isinstance(found, type) and issubclass(found, nn.Module)
                              and found.__module__.startswith((_NETWORKS, *_LAYERS))):
            raise TransplantError(f"the plans ask for {name[:80]}, which is no network or layer of nnU-Net's and can "
                                  "run code. If you trust their origin, pass --trust_checkpoints")


@contextlib.contextmanager
def _at_most(layers: float) -> Iterator[None]:
    """Stop building a network of more layers than this: plans can ask for any number."""
    count = itertools.count()

    def stop(*_: object) -> None:
        if next(count) > layers:
            raise TransplantError("the plans describe a larger network than the checkpoint holds")
    hook = nn.modules.module.register_module_module_registration_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def layout(plans: dict, configuration: str, dataset_json: dict, trainer: type[nnUNetTrainer] = nnUNetTrainer,
           tensors: float = math.inf) -> Layout:
    """The tensors of a model's network, without allocating them.

    Heads are found, not listed: the tensors whose shape depends on the number of classes.
    tensors: how many the state dict has; TransplantError for a network that would have far more.
    """
    num_heads = PlansManager(plans).get_label_manager(dataset_json).num_segmentation_heads
    channels = determine_num_input_channels(PlansManager(plans), PlansManager(plans).get_configuration(configuration),
                                            dataset_json)
    described = json.dumps([plans, configuration, num_heads, channels], sort_keys=True, default=str)
    key = trainer.__module__, trainer.__qualname__, hashlib.sha256(described.encode()).hexdigest()
    if key not in _LAYOUTS:
        if len(_LAYOUTS) >= 16:
            _LAYOUTS.clear()
        with torch.device("meta"), _at_most(10 * tensors + 1000):
            network = build_network(plans, configuration, dataset_json, trainer)
            one_more = build_network(plans, configuration, dataset_json, trainer, num_heads + 1)
        canonical = canonical_names(network)
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        other = {name: tuple(tensor.shape) for name, tensor in one_more.state_dict().items()}
        heads = frozenset(canonical[name] for name in shapes if shapes[name] != other[name])
        of_heads = {name.rpartition(".")[0] for name in shapes if canonical[name] in heads}
        modules = {name: re.sub(r",? ?inplace=\w+", "", str(module)) for name, module in network.named_modules()
                   if name not in of_heads and not any(module.children()) and not isinstance(module, _DROPOUT)}
        _LAYOUTS[key] = Layout(shapes, canonical, heads, modules)
    return _LAYOUTS[key]


_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)  # does nothing when the network predicts
_LAYOUTS: dict[tuple[str, str, str], Layout] = {}  # of the networks seen: the folds of a model share one
