"""Small networks to merge and the definitions that tests of several families of methods share."""
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nnunet_transplant.methods import METHODS, Method
from nnunet_transplant.methods.apply import merge_tensors
from nnunet_transplant.recipe import Recipe

Network = dict[str, torch.Tensor]

DATA_FREE = [name for name, method in METHODS.items() if not method.looks]

# Vectors, matrices, kernels of 2d and 3d convolutions; one entry and none in every rank.
SHAPES = [(), (1,), (2,), (5,), (0,), (1, 1), (4, 6), (6, 4), (1, 7), (7, 1), (0, 3), (3, 0), (3, 2, 3, 3),
          (1, 1, 1, 1), (4, 2, 3, 3, 3), (2, 5, 1, 1, 1), (0, 2, 3, 3, 3)]


def tensors(shape: Sequence[int], count: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """theta_0 and models near it."""
    generator = torch.Generator().manual_seed(seed)
    theta_0 = torch.randn(shape, generator=generator)
    return theta_0, [theta_0 + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]


def networks(count: int, shapes: Sequence[Sequence[int]] = SHAPES, seed: int = 0) -> tuple[Network, list[Network]]:
    """theta_0 and models near it with one tensor of each shape."""
    theta_0, thetas = {}, [{} for _ in range(count)]
    for index, shape in enumerate(shapes):
        theta_0[str(index)], models = tensors(shape, count, 1000 * seed + index)
        for theta, model in zip(thetas, models, strict=True):
            theta[str(index)] = model
    return theta_0, thetas


def merge_networks(name: str, theta_0: Network | None, thetas: Sequence[Network],
                   weights: Sequence[float] | None = None, **given: object) -> Network:
    method = METHODS[name]
    settings = Recipe(name, parameters=given).settings()[name]
    return merge_tensors(method, settings, method.weights(weights, len(thetas)), theta_0, thetas).result


def merge(name: str, theta_0: torch.Tensor, thetas: Sequence[torch.Tensor], weights: Sequence[float] | None = None,
          **given: object) -> torch.Tensor:
    """The method on networks of one tensor."""
    return merge_networks(name, {"a": theta_0}, [{"a": theta} for theta in thetas], weights, **given)["a"]


def models_for(method: Method, count: int = 3) -> int:
    """`count` models, or as many as the method merges."""
    return min(count, method.max_models or count)


def has_seed(method: Method) -> bool:
    return any(parameter.name == "seed" for parameter in method.parameters)


def extremes(method: Method) -> Iterator[dict[str, object]]:
    """The defaults, every parameter at each end of what is allowed, and all of them at their lowest and highest."""
    ends = {parameter.name: list(parameter.choices) if parameter.range is None else
            [parameter.kind(parameter.range.low),
             parameter.kind(parameter.range.high if parameter.kind is float else 50)]
            for parameter in method.parameters}
    yield {}
    for name, values in ends.items():
        yield from ({name: value} for value in values)
    for end in (0, -1):
        yield {name: values[end] for name, values in ends.items()}


def numpy_taus(theta_0: torch.Tensor, thetas: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Task vectors, subtracted in float32 as models are stored, then in float64 for definitions."""
    return [(theta - theta_0).double().numpy() for theta in thetas]


def plain_disjoint_mean(taus: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Entry by entry: elect the sign of the weighted sum, average what has that sign (TIES, Algorithm 1)."""
    merged = []
    for entries in zip(*(tau.ravel().tolist() for tau in taus), strict=True):
        total = sum(w * entry for w, entry in zip(weights, entries, strict=True))
        agreeing = [(w, entry) for w, entry in zip(weights, entries, strict=True) if entry * total > 0]
        weight = sum(w for w, _ in agreeing)
        merged.append(sum(w * entry for w, entry in agreeing) / weight if weight else 0.0)
    return np.array(merged).reshape(taus[0].shape)
