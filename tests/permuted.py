"""Networks whose units stand in another order: other weights, the same function."""
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from factory import dataset_json, random_network, small_plans, write_model

from nnunet_transplant.alignment.spec import Group, Segment, Spec, permute
from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.architecture import build_network, layout

LABELS = {"background": 0, "one": 1, "two": 2}
Network = Mapping[str, torch.Tensor]

# Two heads of an attention of three units each, queries and keys in one tensor, one behind the other, on a residual
# stream: the values' blocks change places, with them queries and keys, which keep their order.
HEADS = Spec({"values": Group("values", 6, (
    Segment("v", 0), Segment("out", 1, reads=True), Segment("v_bias", 0),
    Segment("qk", 0, 0, rigid=True), Segment("qk", 0, 6, rigid=True), Segment("q_bias", 0, rigid=True)), blocks=2),
    "stream": Group("stream", 4, (Segment("embed", 0), Segment("out", 0), Segment("v", 1, reads=True),
                                  Segment("qk", 1, reads=True)))})


def attention(seed: int) -> dict[str, torch.Tensor]:
    """Random weights for HEADS."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (4, 5), "v": (6, 4), "out": (4, 6), "v_bias": (6,), "qk": (12, 4), "q_bias": (6,)}
    return {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}


def plans_of(kind: str) -> dict:
    """Plans of a small network: plain3d, plain2d, residual3d, residual2d or, with batch norms, batch3d."""
    dim = int(kind[-2])
    plans = small_plans(dim, kind.startswith("residual"))
    if kind.startswith("batch"):
        arch = next(iter(plans["configurations"].values()))["architecture"]["arch_kwargs"]
        arch["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{dim}d"
    return plans


def network_of(plans: dict, labels: dict = LABELS, seed: int = 0) -> torch.nn.Module:
    """A random network in eval mode; batch norms have running statistics of their own."""
    network = random_network(plans, dataset_json(labels), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator) + name.endswith("running_var"))
            buffer.abs_() if name.endswith("running_var") else buffer
    return network


def canonical(plans: dict, labels: dict = LABELS) -> dict[str, str]:
    return layout(plans, next(iter(plans["configurations"])), dataset_json(labels)).canonical


def tensors_of(network: torch.nn.Module, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """By canonical name, as copies."""
    state = network.state_dict()
    return {name: state[name].clone() for name in state if names[name] == name}


def spec_of(plans: dict, labels: dict = LABELS) -> Spec:
    return _spec(json.dumps([plans, labels]))


@cache
def _spec(described: str) -> Spec:
    plans, labels = json.loads(described)
    name, configuration = next(iter(plans["configurations"].items()))
    with torch.device("meta"):
        network = build_network(plans, name, dataset_json(labels))
    return derive(network, (1, 1, *[8] * len(configuration["patch_size"])))


def shuffles(spec: Spec, seed: int) -> dict[str, np.ndarray]:
    """Of every group a random permutation that keeps its blocks together."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, group in spec.groups.items():
        size = group.size // group.blocks
        found[name] = np.concatenate([size * block + rng.permutation(size) for block in rng.permutation(group.blocks)])
    return found


def permuted(tensors: Network, spec: Spec, seed: int) -> dict[str, torch.Tensor]:
    """The same function."""
    return permute(tensors, spec, shuffles(spec, seed))


def noisy(tensors: Network, part: float, seed: int) -> dict[str, torch.Tensor]:
    """Every tensor with noise of `part` of its own size."""
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + part * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def write(folder: Path, plans: dict, tensors: Network, labels: dict = LABELS, **more: object) -> Path:
    """A model folder of these tensors, by canonical name."""
    change = {name: tensors[to] for name, to in canonical(plans, labels).items()}
    return write_model(folder, labels, plans=plans, change=change, **more)


def logits(plans: dict, labels: dict, state: Network, image: torch.Tensor) -> torch.Tensor:
    """(1, rows, ...) of a full state dict, or of tensors by canonical name."""
    names = canonical(plans, labels)
    network = build_network(plans, next(iter(plans["configurations"])), dataset_json(labels), deep_supervision=False)
    network.load_state_dict({name: state[to] for name, to in names.items()})
    with torch.no_grad():
        return network.eval()(image)


def image_of(plans: dict, seed: int = 5) -> torch.Tensor:
    size = next(iter(plans["configurations"].values()))["patch_size"]
    return torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor, part: float = 1e-4) -> None:
    """Equal up to `part` of the largest entry."""
    assert float((found - expected).abs().max()) <= part * float(expected.abs().max())
