"""What merging methods work on: the tensors of several models beside those of their base, read only when needed."""
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Tensors:
    """One tensor of the network, or a block of its entries, from the base and from each model: float32, one shape."""
    name: str
    theta_0: torch.Tensor | None   # None where the method needs no base
    thetas: Sequence[torch.Tensor]
    weights: Sequence[float]       # one for each model
    start: int = 0                 # index of the block's first entry in the whole tensor

    @cached_property
    def taus(self) -> list[torch.Tensor]:
        """The task vectors tau_t = theta_t - theta_0."""
        return [theta - self.theta_0 for theta in self.thetas]


@dataclass(frozen=True)
class TaskVectors:
    """Several models and their base, by the names of their tensors, as maps of files or in memory."""
    theta_0: Mapping[str, torch.Tensor] | None
    thetas: Sequence[Mapping[str, torch.Tensor]]
    weights: Sequence[float]

    @property
    def names(self) -> list[str]:
        return list(self.thetas[0])

    def block(self, name: str, start: int = 0, stop: int | None = None) -> Tensors:
        """A tensor, or the entries start to stop of the flattened tensor."""
        def part(network: Mapping[str, torch.Tensor]) -> torch.Tensor:
            tensor = network[name]
            return (tensor if stop is None else tensor.reshape(-1)[start:stop]).float()
        base = None if self.theta_0 is None else part(self.theta_0)
        return Tensors(name, base, [part(theta) for theta in self.thetas], self.weights, start)

    def tau(self, model: int) -> Iterator[torch.Tensor]:
        """The task vector of one model, tensor by tensor."""
        for name, theta in self.thetas[model].items():
            yield theta.float() - self.theta_0[name].float()

    def flat_tau(self, model: int) -> np.ndarray:
        """The task vector of one model as one vector of all its entries, float32."""
        vector = np.empty(sum(tensor.numel() for tensor in self.thetas[model].values()), np.float32)
        start = 0
        for tau in self.tau(model):
            vector[start:start + tau.numel()] = tau.reshape(-1).numpy()
            start += tau.numel()
        return vector


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order, on as many threads as torch has; inside, torch has one thread: sums of
    floats come out the same on any number of cores."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)


def kth_largest(values: np.ndarray, k: int) -> float:
    """The k-th largest of a vector's entries, exactly; 0 where there are none.

    In long vectors a sample finds an interval that holds it, so that only the few entries inside are sorted.
    """
    size = values.size
    if size == 0:
        return 0.0
    if size > 1 << 18:
        sample = np.sort(values[::size >> 14])
        rank, margin = (1 - k / size) * sample.size, 4 * sample.size ** 0.5
        low = sample[max(0, int(rank - margin))]
        high = sample[min(sample.size - 1, int(rank + margin))]
        inside = values[(values >= low) & (values <= high)]
        k_inside = k - int(np.count_nonzero(values > high))
        if 1 <= k_inside <= inside.size:
            values, k = inside, k_inside
    return float(np.partition(values, values.size - k)[values.size - k])


def kept(density: float, size: int) -> int:
    """How many of `size` entries a density keeps: at least one."""
    return max(1, round(density * size))
