"""Where units lie in the weights of a traced network, and as what segments and blocks a spec says it."""
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from nnunet_transplant.alignment.operations import module_of
from nnunet_transplant.alignment.spec import Segment
from nnunet_transplant.errors import TransplantError


@dataclass(eq=False)
class Weight:
    """A parameter or buffer, and the slots of its axes, or of its entries where it is used as a value."""
    name: str
    shape: tuple[int, ...]
    is_parameter: bool
    axes: dict[int, np.ndarray] = field(default_factory=dict)
    entries: np.ndarray | None = None
    reads: set[int] = field(default_factory=set)    # axes
    free: list[bool] = field(default_factory=list)  # for every use as a layer's weight: whether a norm follows
    idle: list[bool] = field(default_factory=list)  # for every use as its bias: the same


Place = tuple[Weight, int, int]  # axis, index


def segment_at(weight: Weight, axis: int, indices: Sequence[int], rigid: bool = False) -> Segment:
    start, reads = indices[0], axis in weight.reads
    if list(indices) != list(range(start, start + len(indices))):
        raise TransplantError(f"alignment cannot follow: the units of {weight.name} lie scattered")
    return Segment(weight.name, axis, start, reads, weight.is_parameter and not (weight.idle and all(weight.idle)),
                   bool(weight.free) and all(weight.free) and not reads, rigid)


def rigid_segments(units: np.ndarray, places: Mapping[int, list[Place]], marks: Mapping[int, tuple[int, ...]],
                   node: fx.Node) -> Iterator[Segment]:
    """Of queries or keys (heads, n), which move by whole heads: every head must be like the first."""
    heads = [[([(weight, axis, index - head * len(row)) for weight, axis, index in places[unit]], marks.get(unit))
              for unit in row] for head, row in enumerate(units.tolist())]
    if heads.count(heads[0]) < len(heads):
        raise TransplantError(f"alignment cannot follow {module_of(node)}: its heads differ")
    indices = defaultdict(set)
    for unit in units.ravel().tolist():
        for weight, axis, index in places[unit]:
            indices[weight, axis].add(index)
    for (weight, axis), lie in indices.items():
        yield segment_at(weight, axis, sorted(lie), rigid=True)


def block_count(units: tuple[int, ...], divisions: Sequence[Sequence[set[int]]], name: str) -> int:
    """Into how many blocks group norms and attentions divide a group: 1 where all of it lies in one."""
    counts: set[int | None] = set()
    for rows in divisions:
        mine = list({frozenset(row): row for row in rows if not row.isdisjoint(units)}.values())
        if mine and not mine[0].issuperset(units):
            size = len(units) // len(mine)
            if mine != [set(units[start:start + size]) for start in range(0, len(units), size)]:
                counts.add(None)
            counts.add(len(mine))
    if len(counts) > 1:
        raise TransplantError(f"alignment cannot follow: the units of {name} are divided into groups in several ways")
    return counts.pop() or 1 if counts else 1
