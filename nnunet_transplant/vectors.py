"""What merging methods work on: the tensors of several models beside those of their base, read only when needed."""
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from nnunet_transplant.architecture import Network

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Tensors:
    """One tensor of the network, or a block of its entries, from the base and from each model: float32, one shape."""
    name: str
    base: torch.Tensor | None      # theta_0, where the method needs it
    thetas: Sequence[torch.Tensor]
    weights: Sequence[float]       # one for each model
    start: int = 0                 # index of the block's first entry in the whole tensor

    @property
    def theta_0(self) -> torch.Tensor:
        assert self.base is not None, "the method does not declare that it needs the base"
        return self.base

    @cached_property
    def taus(self) -> list[torch.Tensor]:
        """The task vectors tau_t = theta_t - theta_0."""
        return [theta - self.theta_0 for theta in self.thetas]


@dataclass(frozen=True)
class TaskVectors:
    """Several models and their base, by the names of their tensors, as maps of files or in memory."""
    base: Network | None  # theta_0, where the method needs it
    thetas: Sequence[Network]
    weights: Sequence[float]

    @property
    def theta_0(self) -> Network:
        assert self.base is not None, "the method does not declare that it needs the base"
        return self.base

    @property
    def names(self) -> list[str]:
        return list(self.thetas[0])

    def block(self, name: str, start: int = 0, stop: int | None = None) -> Tensors:
        """A tensor, or the entries start to stop of the flattened tensor."""
        def part(network: Network) -> torch.Tensor:
            tensor = network[name]
            return (tensor if stop is None else tensor.reshape(-1)[start:stop]).float()
        base = None if self.base is None else part(self.base)
        return Tensors(name, base, [part(theta) for theta in self.thetas], self.weights, start)

    def blocks(self) -> Iterator[Tensors]:
        """Every entry of every tensor, so many at a time that they stay in the cache."""
        for name, tensor in self.thetas[0].items():
            for start, stop in blocks(tensor.numel()):
                yield self.block(name, start, stop)

    def tau(self, model: int) -> Iterator[torch.Tensor]:
        """The task vector of one model, tensor by tensor."""
        for name, theta in self.thetas[model].items():
            yield theta.float() - self.theta_0[name].float()


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order, on as many threads as torch has; inside, torch has one thread: sums of
    floats come out the same on any number of cores."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)


def is_finite(tensor: torch.Tensor) -> bool:
    """A sum is NaN or Inf if an entry is, and costs less than looking at each; in float64 it does not overflow."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor.sum(dtype=torch.float64)))


TINY = 1e-30  # keeps 0 / 0 at 0
BLOCK = 1 << 18  # entries; what is made of a block stays in the cache


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of every block of a tensor of so many entries."""
    for start in range(0, size, BLOCK):
        yield start, min(start + BLOCK, size)


def kth_largest(values: np.ndarray, k: int) -> float:
    """The k-th largest of a vector's entries, exactly; 0 where there are none."""
    return kth_largest_of_parts(lambda: (values[start:stop] for start, stop in blocks(values.size)), values.size, k)


def kth_largest_magnitude(vectors: TaskVectors, model: int, k: int) -> float:
    """The k-th largest |tau| of a model's whole task vector, exactly, and without a copy of the vector."""
    theta_0, theta = ([network[name].reshape(-1) for name in vectors.names]
                      for network in (vectors.theta_0, vectors.thetas[model]))

    def magnitudes() -> Iterator[np.ndarray]:
        for base, tensor in zip(theta_0, theta, strict=True):
            for start, stop in blocks(tensor.numel()):
                yield (tensor[start:stop].float() - base[start:stop].float()).abs_().numpy()
    return kth_largest_of_parts(magnitudes, sum(tensor.numel() for tensor in theta), k)


def kth_largest_of_parts(parts: Callable[[], Iterator[np.ndarray]], size: int, k: int) -> float:
    """The k-th largest of `size` entries that come in parts, exactly; the parts are asked for several times. Of long
    vectors every 64th entry finds an interval that holds the k-th largest, and only the entries inside it
    are sorted; if it does not hold it after all, everything is."""
    if size == 0:
        return 0.0
    if size > 1 << 18:
        sample = np.sort(np.concatenate([part[::64] for part in parts()]))
        rank, margin = (1 - k / size) * sample.size, 4 * sample.size ** 0.5
        low = sample[max(0, int(rank - margin))]
        high = sample[min(sample.size - 1, int(rank + margin))]
        above, inside = 0, []
        for part in parts():
            not_above = part <= high
            above += part.size - int(np.count_nonzero(not_above))
            inside.append(part[not_above & (part >= low)])
        found = np.concatenate(inside)
        if 1 <= k - above <= found.size:
            return _partitioned(found, k - above)
    return _partitioned(np.concatenate(list(parts())), k)


def _partitioned(values: np.ndarray, k: int) -> float:
    return float(np.partition(values, values.size - k)[values.size - k])


def kept(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: at least one."""
    return max(1, round(density * size))


def add_weighted(total: torch.Tensor, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """total + sum_t w_t tensor_t, in place."""
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total


def added_up(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """sum_t tensor_t, in a new tensor."""
    tensors = iter(tensors)
    return functools.reduce(torch.add, tensors, 0 + next(tensors))


def weighted_sum(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """sum_t w_t tensor_t. One tensor of weight 1 comes out bit for bit."""
    return add_weighted(weights[0] * tensors[0], tensors[1:], weights[1:])


def keep_from(tau: torch.Tensor, smallest: float) -> torch.Tensor:
    """tau with its entries below `smallest` in magnitude set to zero."""
    below = float(np.nextafter(np.float32(smallest), np.float32(0)))
    return torch.nn.functional.hardshrink(tau, below)  # a tenth of the time of torch.where


def where_one(mask: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Entry by entry `one` where mask is 1.0, `other` where it is 0.0."""
    return torch.lerp(other, one, mask)  # exact at both ends


def at_least(tensor: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """1.0 where tensor >= limit, else 0.0: floats, which torch computes with much faster than with bools."""
    return torch.ge(tensor, limit, out=torch.empty_like(tensor))
