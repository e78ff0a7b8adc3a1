"""How alike units are by what they do: correlations of their activations at the same voxels of the same patches.

One model runs at a time, and of each layer some voxels of a patch are kept: memory is that of one forward pass.
"""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nnunet_transplant.alignment.graph import Run
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weight_space import correlation
from nnunet_transplant.device import forward_only

VOXELS = 1 << 14  # that a layer gives of a patch, at most


class Moments:
    """Sums over voxels of the units of all models: shifted by the first patch's means, in float64 (which not every
    device has)."""

    def __init__(self) -> None:
        self.shift: torch.Tensor | None = None
        self.count = 0

    def add(self, rows: Sequence[torch.Tensor]) -> None:
        """rows: of each model (units, voxels)."""
        if self.shift is None:
            self.shift = torch.cat([row.mean(1) for row in rows])
            self.first = torch.zeros(len(self.shift), dtype=torch.float64)
            self.second = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64)
        part = torch.cat(list(rows)) - self.shift[:, None]
        self.first += part.sum(1).cpu()
        self.second += (part @ part.T).cpu()
        self.count += part.shape[1]

    def correlation(self) -> np.ndarray:
        """Pearson's, of all units of all models: (N * D, N * D)."""
        covariance = self.second - self.first[:, None] * self.first / self.count
        variance = covariance.diagonal()
        return correlation(covariance, variance, variance)


def some(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(units, voxels) with VOXELS of them, at random, or all where they are fewer."""
    if rows.shape[1] <= VOXELS:
        return rows.clone()
    return rows[:, torch.randint(rows.shape[1], (VOXELS,), generator=generator).to(rows.device)]


def activation_similarity(spec: Spec, program: Any, networks: Sequence[Mapping[str, torch.Tensor]],
                          images: Iterator[torch.Tensor]) -> dict[str, np.ndarray]:
    """Group -> Pearson correlation over voxels of the units of all models, (N * D, N * D): of a residual stream the
    mean over the values it is read from. Voxels are drawn at random, the same of all models.

    program: the graph of `spec`, traced for inputs of the images' shape (1, channels, ...).
    """
    run = Run(program)
    taps: dict[str, list[tuple[str, int]]] = {}
    for group in spec.groups.values():
        for tap in group.taps:
            taps.setdefault(tap.node, []).append((group.name, tap.axis))
    moments = {(group, node): Moments() for node, at in taps.items() for group, _ in at}
    for number, image in enumerate(images):
        seen: dict[tuple[str, str], list[torch.Tensor]] = {}
        for network in networks:
            generator = torch.Generator().manual_seed(number)  # the same voxels of every network
            with forward_only(image.device):
                for node, (values,) in run([network], image):
                    for name, axis in taps.get(node.name, ()):
                        rows = values[node].movedim(axis, 0).flatten(1)
                        seen.setdefault((name, node.name), []).append(some(rows, generator).float())
        for place, of_models in seen.items():
            moments[place].add(of_models)
    found: dict[str, list[np.ndarray]] = {}
    for (name, _), sums in moments.items():
        found.setdefault(name, []).append(sums.correlation())
    return {name: np.sum(each, axis=0) / len(each) for name, each in found.items()}
