"""How alike units are by their weights, and networks with their units moved or merged.

An assignment says for every model which unit of the merged network each of its units becomes: an int array (N, D). A
permutation is an assignment in which every merged unit gets one unit of each model.
"""
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from nnunet_transplant.alignment.spec import Group, Segment, Spec
from nnunet_transplant.architecture import Network

Assignments = dict[str, np.ndarray]  # by group


def restricted(spec: Spec, shared: Collection[str]) -> Spec:
    """Only the groups whose units are made, scaled and shifted by `shared` tensors alone."""
    return replace(spec, groups={name: group for name, group in spec.groups.items() if all(
        segment.reads or segment.tensor in shared for segment in group.segments)})


def identity(spec: Spec, models: int) -> Assignments:
    return {name: np.tile(np.arange(group.size), (models, 1)) for name, group in spec.groups.items()}


def canonical_scale(tensors: Network, spec: Spec) -> dict[str, torch.Tensor]:
    """The weights as matching compares them, float32: where a norm follows, a unit's weights may have any scale, so
    each unit's are scaled to length 1."""
    result = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name, segments in spec.by_tensor().items():
        axes = {segment.axis for _, segment in segments if segment.free}
        if axes and name in result:
            rest = [axis for axis in range(result[name].dim()) if axis not in axes]
            length = result[name].square().sum(rest, keepdim=True).sqrt()
            result[name] = result[name] / torch.where(length > 0, length, 1.0)
    return result


class WeightSimilarity:
    """Similarities of the units of a group between models, from all weights around them (MuDSC, Eq. 6):
    Z_l = W_l P_{l-1} || W_{l+1}^T P_{l+1}, the neighbours as they are matched now.

    skip: tensors that say nothing, such as the heads of different tasks. Inner products are kept until a neighbour
    changes.
    """

    def __init__(self, spec: Spec, networks: Sequence[Network], skip: frozenset[str] = frozenset()) -> None:
        self.spec, self.models = spec, len(networks)
        self.networks = [canonical_scale(network, spec) for network in networks]
        self.around = spec.by_tensor()
        self.segments = {name: [s for s in group.segments if s.counts and s.tensor not in skip
                                and s.tensor in self.networks[0]] for name, group in spec.groups.items()}
        self.means = {(segment.tensor, segment.axis, segment.start): self._mean(group, segment)
                      for name, group in spec.groups.items() for segment in self.segments[name]}
        self.kept: dict[tuple, dict[tuple[int, int], tuple]] = {}

    def _mean(self, group: Group, segment: Segment) -> float:
        """What to subtract from a segment's entries: numbers, one for each unit (a norm's scales, all near 1), are
        compared by how they differ from their mean over all models; weights as they are."""
        values = torch.cat([self._part(network[segment.tensor], group, segment) for network in self.networks])
        return float(values.mean()) if values.shape[1] == 1 else 0.0

    @staticmethod
    def _part(tensor: torch.Tensor, group: Group, segment: Segment) -> torch.Tensor:
        part = tensor.narrow(segment.axis, segment.start, group.size)
        return part.movedim(segment.axis, 0).reshape(group.size, -1)

    def _rows(self, group: Group, segment: Segment, model: int, assignments: Assignments) -> torch.Tensor:
        """(D, features): one segment of Z."""
        tensor = self.networks[model][segment.tensor]
        for other, there in self.around[segment.tensor]:
            if there.axis != segment.axis:
                tensor = move(tensor, other, there, assignments[other.name][model])
        rows = self._part(tensor, group, segment)
        mean = self.means[segment.tensor, segment.axis, segment.start]
        return rows - mean if mean else rows

    def _products(self, group: Group, segment: Segment, pairs: Sequence[tuple[int, int]],
                  assignments: Assignments) -> list[tuple]:
        """For each pair of models, inner products of the rows of both (D, D), the sums of the rows of each, and their
        squares, and their number of features."""
        def neighbours(pair: tuple[int, int]) -> bytes:
            return b"".join(assignments[there.name][list(pair)].tobytes()
                            for there, place in self.around[segment.tensor] if place.axis != segment.axis)

        key = segment.tensor, segment.axis, segment.start
        kept = self.kept.setdefault(key, {})
        stale = [pair for pair in pairs if pair not in kept or kept[pair][0] != neighbours(pair)]
        rows = {n: self._rows(group, segment, n, assignments) for n in sorted({n for pair in stale for n in pair})}
        sums = {n: row.sum(1) for n, row in rows.items()}
        squares = {n: row.square().sum(1) for n, row in rows.items()}
        for one, other in stale:
            product = (rows[one] @ rows[other].T, sums[one], sums[other], squares[one], squares[other],
                       rows[one].shape[1])
            kept[one, other] = neighbours((one, other)), product
        return [kept[pair][1] for pair in pairs]

    def between(self, name: str, pairs: Sequence[tuple[int, int]], assignments: Assignments,
                pearson: bool = True) -> np.ndarray:
        """(N D, N D): similarities of the units of these pairs of models, 0 for other pairs: Pearson correlation of the
        rows of Z, or their inner products."""
        group = self.spec.groups[name]
        parts = [(segment, self._products(group, segment, pairs, assignments)) for segment in self.segments[name]]
        result = np.zeros((self.models, group.size, self.models, group.size))
        for i, (one, other) in enumerate(pairs):
            found = _of_pair(group, [(segment.rigid, products[i]) for segment, products in parts], pearson)
            result[one, :, other] = found
            result[other, :, one] = found.T
        return result.reshape(self.models * group.size, -1)


def _of_pair(group: Group, products: Sequence[tuple[bool, tuple]], pearson: bool) -> np.ndarray:
    """(D, D): the similarities that all segments, rigid ones and others, make together."""
    free = [product for rigid, product in products if not rigid]
    rigid = [_by_blocks(product, group.blocks) for rigid, product in products if rigid]
    result = _similarity(free, pearson)
    if rigid:
        inside = group.size // group.blocks
        blocks = _similarity(rigid, pearson)
        share = len(rigid) / len(products) if pearson else 1 / inside
        result = (1 - share if pearson else 1) * result + share * blocks.repeat(inside, 0).repeat(inside, 1)
    return result


def _similarity(products: Sequence[tuple], pearson: bool) -> np.ndarray:
    dot, sum_one, sum_other, square_one, square_other = (sum(parts) for parts in zip(
        *(product[:5] for product in products), strict=True))
    if not pearson:
        return dot.numpy()
    features = sum(product[5] for product in products)
    covariance = dot - sum_one[:, None] * sum_other / features
    return correlation(covariance, square_one - sum_one ** 2 / features, square_other - sum_other ** 2 / features)


def _by_blocks(product: tuple, blocks: int) -> tuple:
    """Inner products of whole blocks whose units keep their order."""
    dot, *sums, features = product
    inside = len(dot) // blocks
    dot = dot.reshape(blocks, inside, blocks, inside).diagonal(dim1=1, dim2=3).sum(-1)
    return dot, *(each.reshape(blocks, inside).sum(1) for each in sums), features * inside


def correlation(covariance: torch.Tensor, variance_one: torch.Tensor, variance_other: torch.Tensor) -> np.ndarray:
    """Pearson's, 0 where a variance is 0."""
    scales = []
    for variance in (variance_one, variance_other):
        largest = float(variance.max()) if variance.numel() else 0.0
        scales.append(torch.where(variance > 1e-12 * largest, variance.clamp(min=1e-300).rsqrt(), 0.0))
    return (covariance * scales[0][:, None] * scales[1]).clamp(-1, 1).double().numpy()


def move(tensor: torch.Tensor, group: Group, segment: Segment, assignment: np.ndarray) -> torch.Tensor:
    """The tensor with one segment's units put where the assignment (D,) says; units that meet are added up."""
    inside = group.size // group.blocks
    if segment.rigid:
        assignment = assignment[::inside] // inside
        assignment = (assignment[:, None] * inside + np.arange(inside)).ravel()
    identical = np.array_equal(assignment, np.arange(group.size))
    if identical:
        return tensor
    target = torch.arange(tensor.shape[segment.axis])
    target[segment.start:segment.start + group.size] = segment.start + torch.from_numpy(assignment)
    if len(np.unique(assignment)) == group.size:
        return tensor.index_select(segment.axis, torch.argsort(target))
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))  # sums of halves would be rounded each time
    return torch.zeros_like(tensor).index_add_(segment.axis, target, tensor)


def moved(tensors: Network, spec: Spec, assignments: Assignments, model: int) -> dict[str, torch.Tensor]:
    """A model's network in the units of the merged one: the mean of all models' is the merged network, with outputs
    averaged and inputs added up, W' = 1/N sum_n (N M_out,n)^T W_n U_in,n (MuDSC, Eq. 2; ZipIt!).

    Of a permutation it is the same network with its units in another order, type and bits unchanged.
    """
    result = dict(tensors)
    for name, around in spec.by_tensor().items():
        if name not in result:
            continue
        tensor = result[name]
        for group, segment in around:
            if group.name not in assignments:
                continue
            assignment = assignments[group.name]
            tensor = move(tensor, group, segment, assignment[model])
            counts = np.bincount(assignment.ravel(), minlength=group.size)
            # a rigid segment's merged units have one of each model, as its blocks do
            if not segment.reads and not segment.rigid and not (counts == len(assignment)).all():
                factors = torch.ones(tensor.shape[segment.axis])
                factors[segment.start:segment.start + group.size] = torch.from_numpy(
                    len(assignment) / np.maximum(counts, 1)).float()
                shape = [1] * tensor.dim()
                shape[segment.axis] = -1
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factors.reshape(shape)
        result[name] = tensor.to(result[name].dtype)
    return result
