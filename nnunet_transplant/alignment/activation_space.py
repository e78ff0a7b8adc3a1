"""How alike units are by what they do: correlations of their activations on the same patches, all models side by side.
"""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nnunet_transplant.alignment.graph import Run
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weight_space import correlation

CHUNK = 1 << 15  # voxels at a time


class Moments:
    """Sums over voxels of the units of all models: shifted by the first patch's means, in float64."""

    def __init__(self) -> None:
        self.shift: torch.Tensor | None = None
        self.count = 0

    def add(self, values: Sequence[torch.Tensor], axis: int) -> None:
        """values: of each model, with its units along an axis."""
        rows = [value.movedim(axis, 0).flatten(1) for value in values]
        voxels = rows[0].shape[1]
        if self.shift is None:
            self.shift = torch.cat([row.mean(1) for row in rows])
            self.first = torch.zeros_like(self.shift, dtype=torch.float64)
            self.second = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64, device=rows[0].device)
        for start in range(0, voxels, CHUNK):
            part = torch.cat([row[:, start:start + CHUNK] for row in rows])
            part -= self.shift[:, None]
            self.first += part.sum(1)
            self.second += part @ part.T
        self.count += voxels

    def correlation(self) -> np.ndarray:
        """Pearson's, of all units of all models: (N * D, N * D)."""
        covariance = self.second - self.first[:, None] * self.first / self.count
        variance = covariance.diagonal()
        return correlation(covariance.cpu(), variance.cpu(), variance.cpu())


def activation_similarity(spec: Spec, program: Any, networks: Sequence[Mapping[str, torch.Tensor]],
                          images: Iterator[torch.Tensor]) -> dict[str, np.ndarray]:
    """Group -> Pearson correlation over all voxels of the units of all models, (N * D, N * D): of a residual stream the
    mean over the values it is read from.

    program: the graph of `spec`, traced for inputs of the images' shape (1, channels, ...).
    """
    run = Run(program)
    taps: dict[str, list[tuple[str, int]]] = {}
    for group in spec.groups.values():
        for tap in group.taps:
            taps.setdefault(tap.node, []).append((group.name, tap.axis))
    moments = {(group, node): Moments() for node, at in taps.items() for group, _ in at}
    with torch.no_grad():
        for image in images:
            for node, values in run(networks, image):
                for name, axis in taps.get(node.name, ()):
                    moments[name, node.name].add([value[node] for value in values], axis)
    found: dict[str, list[np.ndarray]] = {}
    for (name, _), sums in moments.items():
        found.setdefault(name, []).append(sums.correlation())
    return {name: np.sum(each, axis=0) / len(each) for name, each in found.items()}
