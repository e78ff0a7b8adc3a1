"""Which axes of which tensors share one permutation of units, and the same network with its units in another order."""
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.export import ExportedProgram


@dataclass(frozen=True)
class Segment:
    """Where the units of a group lie in one tensor: entries start, start + 1, ... of an axis."""
    tensor: str
    axis: int
    start: int = 0
    reads: bool = False   # a weight that reads the units (its input axis), not one that makes or scales them
    counts: bool = True   # whether it says something of the unit: not a bias before a norm, not a running statistic
    free: bool = False    # each unit's entries may be scaled at will: a norm follows
    rigid: bool = False   # moves with the units' block, keeping the order inside: queries and keys


@dataclass(frozen=True)
class Tap:
    """A value in the graph from which other layers read all of a group's units: its node, and the axis of the units."""
    node: str
    axis: int


@dataclass(frozen=True)
class Group:
    """Units that may change places. With blocks > 1 they lie in so many blocks of consecutive units (attention heads, a
    group norm's groups): inside a block units may change places, and blocks as a whole."""
    name: str
    size: int
    segments: tuple[Segment, ...]
    taps: tuple[Tap, ...] = ()
    blocks: int = 1


@dataclass(frozen=True)
class Spec:
    """The groups of a network by name, and the graph they were found in."""
    groups: dict[str, Group]
    program: ExportedProgram | None = field(repr=False, compare=False, default=None)

    def text(self) -> str:
        """As nnunet_transplant_spec prints it: a line for every group, one for each of its segments."""
        lines = []
        for group in self.groups.values():
            blocks = f" in {group.blocks} blocks" if group.blocks > 1 else ""
            lines.append(f"{group.name}: {group.size} units{blocks}")
            for s in group.segments:
                what = "reads" if s.reads else "rigid" if s.rigid else "makes" if s.counts else "follows"
                lines.append(f"  {what:<8}{s.tensor} axis {s.axis}, {s.start} to {s.start + group.size - 1}")
        return "\n".join(lines)

    def by_tensor(self) -> dict[str, list[tuple[Group, Segment]]]:
        """Tensor -> its segments with their groups."""
        found = defaultdict(list)
        for group in self.groups.values():
            for segment in group.segments:
                found[segment.tensor].append((group, segment))
        return dict(found)


# ---------------------------------------------------------------------------------------------------------------------
# Applying it

def permute(tensors: Mapping[str, torch.Tensor], spec: Spec,
            permutations: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The same network with its units in another order: unit i of a group is unit permutations[group][i] of before.

    Groups that are not named stay as they are. The permutation of a group with blocks keeps its blocks together.
    """
    result = dict(tensors)
    for name, segments in spec.by_tensor().items():
        for group, segment in segments:
            if group.name in permutations and name in result:
                order = torch.from_numpy(segment_order(group, segment, permutations[group.name]))
                whole = torch.arange(result[name].shape[segment.axis])
                whole[segment.start:segment.start + group.size] = segment.start + order
                result[name] = result[name].index_select(segment.axis, whole)
    return result


def segment_order(group: Group, segment: Segment, permutation: np.ndarray) -> np.ndarray:
    """The permutation as a segment follows it: a rigid one only by blocks."""
    if not segment.rigid:
        return np.asarray(permutation)
    inside = group.size // group.blocks
    return (permutation[::inside] // inside * inside)[:, None].repeat(inside, 1).ravel() + np.tile(
        np.arange(inside), group.blocks)
