"""How alike units are by what they do: correlations of their activations on the same patches, all models side by side.
"""
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weights import correlation

CHUNK = 1 << 15  # voxels at a time


def lockstep(program: Any, networks: Sequence[Mapping[str, torch.Tensor]], image: torch.Tensor,
             wanted: set[str]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Run several networks of one graph on one patch (1, channels, ...), operation by operation beside each other, and
    give the values of the wanted nodes as they are made. Memory is that of running all of them."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    last = {node: user for user in program.graph.nodes for node in user.all_input_nodes}  # the last user of each
    done: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        done.setdefault(user, []).append(node)
    values: list[dict[fx.Node, Any]] = [{} for _ in networks]
    for node in program.graph.nodes:
        if node.op == "output":
            return
        if node.op == "placeholder" and not node.users:  # another name of a tied tensor
            continue
        for value, network in zip(values, networks, strict=True):
            if node.op == "placeholder":
                name = names.get(node.name)
                value[node] = image if name is None else network[name] if name in network \
                    else program.constants[name].to(image.device)
            else:
                value[node] = node.target(*fx.node.map_arg(node.args, value.__getitem__),
                                          **fx.node.map_arg(node.kwargs, value.__getitem__))
        if node.name in wanted:
            yield node.name, [value[node] for value in values]
        for value in values:
            for unused in done.get(node, ()):
                del value[unused]


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
    taps = {(group.name, tap.node): tap.axis for group in spec.groups.values() for tap in group.taps}
    moments = {key: Moments() for key in taps}
    wanted = {node for _, node in taps}
    with torch.no_grad():
        for image in images:
            for node, values in lockstep(program, networks, image, wanted):
                for (group, at), axis in taps.items():
                    if at == node:
                        moments[group, at].add(values, axis)
    found: dict[str, list[np.ndarray]] = {}
    for (group, _), sums in moments.items():
        found.setdefault(group, []).append(sums.correlation())
    return {group: sum(each) / len(each) for group, each in found.items()}
