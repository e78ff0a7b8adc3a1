"""Which axes of which tensors share one permutation of units, derived from the graph that `torch.export` traces.

Every entry along an axis of a tensor is a slot, every value in the graph carries the slot that each of its entries
comes from. An operation that meets two values entry by entry (a sum, a norm's scale) ties their slots; a contraction (a
convolution, a linear layer) ties the slots of its input to those of its weight and makes new units. Slots tied to each
other are one unit; units with the same places in the same tensors may change places with each other: they are a group.
"""
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn

from nnunet_transplant.alignment.graph import trace
from nnunet_transplant.errors import TransplantError

FIXED = -1  # the slot of what is no unit: voxels, input channels, constants


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
    program: Any = field(repr=False, compare=False, default=None)  # of torch.export

    def text(self) -> str:
        """As --show_spec prints it: a line for every group, one for each of its segments."""
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


def derive(network: nn.Module, shape: Sequence[int]) -> Spec:
    """The spec of a network in eval mode, for inputs of this shape (1, channels, ...).

    Raises TransplantError that names what in the network cannot be traced.
    """
    program = trace(network, shape)
    tracer = _Tracer(program)
    tracer.run()
    return Spec(tracer.groups(), program)


@dataclass
class _Weight:
    """A parameter or buffer, and the slots of each of its axes (of its entries, where it is used as a value)."""
    name: str
    shape: tuple[int, ...]
    is_parameter: bool
    axes: dict[int, np.ndarray] = field(default_factory=dict)
    entries: np.ndarray | None = None
    reads: set[int] = field(default_factory=set)
    counts: bool = True
    free: bool = False


class _Tracer:
    """Walks through the graph; a value is an int64 tensor of slots of the value's shape."""

    def __init__(self, program: Any) -> None:
        self.program, signature = program, program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        state = program.state_dict
        self.weights = {node: _Weight(name, tuple(state[name].shape), node in signature.inputs_to_parameters)
                        for node, name in names.items() if name in state}
        self.constants = {node for node in names if names[node] not in state} | set(
            signature.inputs_to_lifted_tensor_constants)
        self.slots = 0
        self.ties: list[np.ndarray] = []
        self.pinned: list[np.ndarray] = []
        self.reading: list[tuple[fx.Node, _Weight, int]] = []
        self.attention: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.blocks: list[np.ndarray] = []          # (blocks, units) of group norms
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name not in self.weights:
                    self.values[node] = torch.full(tuple(node.meta["val"].shape), FIXED)
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            elif node.op == "output":
                for value in _flat(node.args):
                    self.pinned.append(self.value(value).numpy().ravel())
            else:
                raise TransplantError(f"the network cannot be traced: {node.op} {node.target}")

    def call(self, node: fx.Node) -> Any:
        name = node.target.__name__ if callable(node.target) else str(node.target)
        kind = name.split(".")[0].rstrip("_")
        if node.target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]
        if kind in _RULES:
            return _RULES[kind](self, node)
        if kind in _STRUCTURAL:
            return node.target(*self.arguments(node.args), **node.kwargs)
        if kind in _ENTRY_BY_ENTRY:
            return self.entry_by_entry(node)
        raise TransplantError(f"the network does something that alignment cannot follow: {node.target} in "
                              f"{_where(node)}")

    def arguments(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, self.value)

    def value(self, node: fx.Node) -> Any:
        """The slots of a value; a weight used as one gets slots for its entries."""
        if node.name not in self.weights:
            return self.values[node]
        weight = self.weights[node.name]
        long = [axis for axis, size in enumerate(weight.shape) if size > 1]
        if not weight.is_parameter:
            return torch.full(weight.shape, FIXED)
        if len(long) == 1:
            return torch.from_numpy(self.axis(weight, long[0])).reshape(weight.shape)
        if weight.entries is None:
            weight.entries = self.new(math.prod(weight.shape)).reshape(weight.shape)
        return torch.from_numpy(weight.entries)

    def new(self, count: int) -> np.ndarray:
        self.slots += count
        return np.arange(self.slots - count, self.slots)

    def axis(self, weight: _Weight, axis: int) -> np.ndarray:
        if axis not in weight.axes:
            weight.axes[axis] = self.new(weight.shape[axis])
        return weight.axes[axis]

    def tie(self, one: np.ndarray, other: np.ndarray) -> None:
        both = (one != FIXED) & (other != FIXED) & (one != other)
        self.ties.append(np.unique(np.stack([one[both], other[both]]), axis=1))
        # a unit that meets something fixed entry by entry, such as a table of positions, cannot move
        for here, there in ((one, other), (other, one)):
            if here.size and np.ptp(there) > 0:
                self.pinned.append(here[(there == FIXED) & (here != FIXED)])

    def entry_by_entry(self, node: fx.Node) -> torch.Tensor:
        operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
        values = torch.broadcast_tensors(*(self.value(operand) for operand in operands))
        first = values[0]
        for operand, other in zip(operands[1:], values[1:], strict=True):
            self.tie(first.numpy().ravel(), other.numpy().ravel())
            first = torch.where(first == FIXED, other, first)
        for operand, value in zip(operands, values, strict=True):
            self.pin_to_table(operand, value, first)
        return first.contiguous()

    def pin_to_table(self, operand: fx.Node, slots: torch.Tensor, result: torch.Tensor) -> None:
        """Units beside a constant that differs from unit to unit stay where they are."""
        table = operand
        while isinstance(table, fx.Node) and table.op == "call_function" and table.args:
            table = table.args[0]
        buffer = isinstance(table, fx.Node) and table.op == "placeholder" and (
            table.name in self.constants or (table.name in self.weights
                                             and not self.weights[table.name].is_parameter))
        if buffer and math.prod(operand.meta["val"].shape) > 1:
            self.pinned.append(result.numpy().ravel())

    # -- contractions ------------------------------------------------------------------------------------------------

    def contract(self, node: fx.Node, output: int, channel: int, groups: int = 1) -> torch.Tensor:
        """A weight of which axis `output` makes new units from those its other axis reads along axis `channel`."""
        data, weight_node, *rest = node.args
        if weight_node.name not in self.weights:
            raise TransplantError(f"the network computes the weight of {_where(node)}: alignment cannot follow")
        weight = self.weights[weight_node.name]
        bias = self.weights[rest[0].name] if rest and rest[0] is not None else None
        units = self.along(self.value(data), channel, node)
        shape = [1] * len(node.meta["val"].shape)
        size = node.meta["val"].shape[channel]
        shape[channel] = size
        if groups == 1:
            self.tie(units, self.axis(weight, 1 - output))
            weight.reads.add(1 - output)
            self.reading.append((data, weight, 1 - output))
        elif groups == len(units) == size:  # depthwise: every unit by itself
            self.tie(units, self.axis(weight, 0))
        else:
            raise TransplantError(f"{weight.name} is a convolution in {groups} groups: alignment cannot follow")
        made = self.axis(weight, output)
        if bias is not None:
            self.tie(made, self.axis(bias, 0))
        if any(user.target in _NORMS and user.args[0] is node for user in node.users) and len(node.users) == 1:
            weight.free = True
            if bias is not None:
                bias.counts = False
        return torch.from_numpy(made).reshape(shape).expand(tuple(node.meta["val"].shape))

    def along(self, slots: torch.Tensor, axis: int, node: fx.Node) -> np.ndarray:
        """The slots along an axis, which must be the same everywhere else."""
        moved = slots.movedim(axis, -1).reshape(-1, slots.shape[axis])
        if not bool((moved == moved[0]).all()):
            raise TransplantError(f"alignment cannot follow the units that {_where(node)} reads")
        return moved[0].numpy().copy()

    def scale(self, node: fx.Node, units: np.ndarray, *weights: fx.Node | None) -> None:
        """Scale, shift and statistics of a norm."""
        for each in weights:
            if each is not None:
                weight = self.weights[each.name]
                self.tie(units, self.axis(weight, 0))
                weight.counts = weight.is_parameter

    # -- what was found ----------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, Group]:
        unit_of = self.units()
        pinned = set(unit_of[np.concatenate([p[p != FIXED] for p in self.pinned])].tolist())
        places = self.places(unit_of)
        found: dict[str, Group] = {}
        taken: set[int] = set()
        for queries, keys, values in self.attention:
            group = self.heads(unit_of, places, queries, keys, values)
            taken |= {int(unit) for slots in (queries, keys, values) for unit in unit_of[slots.ravel()]}
            found[group.name] = group
        alike: dict[tuple, list[int]] = defaultdict(list)
        for unit, at in places.items():
            if unit not in pinned and unit not in taken:
                alike[tuple((weight.name, axis) for weight, axis, _ in at)].append(unit)
        for units in alike.values():
            group = _group([[places[unit][i] for unit in units] for i in range(len(places[units[0]]))])
            if any(not s.reads for s in group.segments) and any(s.reads for s in group.segments):
                found[group.name] = group
        blocks = self.block_counts(unit_of)
        taps = self.taps(unit_of)
        result = {}
        order = {weight.name: i for i, weight in enumerate(self.weights.values())}
        for group in sorted(found.values(), key=lambda g: order[g.segments[0].tensor]):
            first = int(unit_of[self.slot(group.segments[0])])
            kept = Group(group.name, group.size, group.segments, tuple(taps.get(first, ())),
                         blocks.get(first, group.blocks))
            result[group.name] = kept
        return result

    def units(self) -> np.ndarray:
        """Slot -> its unit: what is tied together is one."""
        ties = np.concatenate([*self.ties, np.zeros((2, 0), int)], axis=1)
        graph = coo_array((np.ones(ties.shape[1]), (ties[0], ties[1])), shape=(self.slots, self.slots))
        return connected_components(graph, directed=False)[1]

    def places(self, unit_of: np.ndarray) -> dict[int, list[tuple[_Weight, int, int]]]:
        """Unit -> its places (tensor, axis, index), in the order of the weights."""
        places = defaultdict(list)
        for weight in self.weights.values():
            axes = {axis: unit_of[slots] for axis, slots in weight.axes.items()}
            if weight.entries is not None:
                entries = unit_of[weight.entries]
                for axis in range(entries.ndim):
                    moved = np.moveaxis(entries, axis, -1).reshape(-1, entries.shape[axis])
                    if len(moved) > 1 and (moved == moved[0]).all():
                        axes[axis] = moved[0]
            for axis, units in axes.items():
                for index, unit in enumerate(units):
                    places[int(unit)].append((weight, axis, index))
        return places

    def heads(self, unit_of: np.ndarray, places: Mapping[int, list], queries: np.ndarray, keys: np.ndarray,
              values: np.ndarray) -> Group:
        """An attention's heads as blocks: their values may change places inside a head, queries and keys not."""
        free = [places[int(unit)] for unit in unit_of[values.ravel()]]
        group = _group([[at[i] for at in free] for i in range(len(free[0]))])
        rigid = []
        for slots in (queries, keys):
            for weight, axis, _ in places[int(unit_of[slots[0, 0]])]:
                indices = np.concatenate([[index for w, a, index in places[int(unit)] if (w, a) == (weight, axis)]
                                          for unit in dict.fromkeys(unit_of[slots.ravel()].tolist())])
                segment = _segment(weight, axis, np.sort(indices), rigid=True)
                if segment not in rigid:
                    rigid.append(segment)
        return Group(group.name, group.size, group.segments + tuple(rigid), (), len(values))

    def slot(self, segment: Segment) -> int:
        weight = next(w for w in self.weights.values() if w.name == segment.tensor)
        slots = weight.axes[segment.axis] if segment.axis in weight.axes else \
            np.moveaxis(weight.entries, segment.axis, -1).reshape(-1, weight.shape[segment.axis])[0]
        return int(slots[segment.start])

    def block_counts(self, unit_of: np.ndarray) -> dict[int, int]:
        """First unit of a group -> in how many blocks a group norm divides it."""
        counts: dict[int, int] = {}
        for slots in self.blocks:
            units = unit_of[slots]
            first = int(units[0, 0])
            if counts.setdefault(first, len(units)) != len(units):
                raise TransplantError("group norms with different numbers of groups share units: alignment cannot "
                                      "follow")
        return counts

    def taps(self, unit_of: np.ndarray) -> dict[int, list[Tap]]:
        """First unit of a group -> the values it is read from: as they were made, before pooling or concatenation."""
        taps = defaultdict(list)
        for node, _, _ in self.reading:
            for source in _sources(node):
                slots = self.value(source)
                axes = [axis for axis in range(slots.ndim) if slots.shape[axis] > 1
                        and bool((slots.narrow(axis, 0, 1) != slots.narrow(axis, 1, 1)).any())]
                if len(axes) == 1:
                    first = int(unit_of[slots.movedim(axes[0], 0).reshape(slots.shape[axes[0]], -1)[0, 0]])
                    tap = Tap(source.name, axes[0])
                    if tap not in taps[first]:
                        taps[first].append(tap)
        return taps


def _group(places: list[list[tuple[_Weight, int, int]]]) -> Group:
    """The group of units of which places[i] lists the i-th place of every unit."""
    segments = [_segment(at[0][0], at[0][1], np.array([index for _, _, index in at])) for at in places]
    makers = [s for s in segments if not s.reads and s.counts]
    first = (makers or segments)[0]
    name = first.tensor.removesuffix(".weight")
    same = [s for s in segments if (s.tensor, s.axis) == (first.tensor, first.axis)]
    if first.start or len(same) > 1:
        name += f"[{first.start}:{first.start + len(places[0])}]"
    return Group(name, len(places[0]), tuple(sorted(segments, key=lambda s: s is not first)))


def _segment(weight: _Weight, axis: int, indices: np.ndarray, rigid: bool = False) -> Segment:
    if not np.array_equal(indices, np.arange(indices[0], indices[0] + len(indices))):
        raise TransplantError(f"the units of {weight.name} lie scattered: alignment cannot follow")
    reads = axis in weight.reads
    return Segment(weight.name, axis, int(indices[0]), reads, weight.counts, weight.free and not reads, rigid)


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a value was only rearranged from."""
    kind = node.target.__name__.split(".")[0] if node.op == "call_function" else ""
    if kind == "cat":
        for part in node.args[0]:
            yield from _sources(part)
    elif kind in _CARRY:
        yield from _sources(node.args[0])
    elif node.op == "call_function":
        yield node


def _flat(arguments: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(arguments, found.append)
    return iter(found)


def _where(node: fx.Node) -> str:
    """The module of the network that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] or "the network" if stack else "the network"


# ---------------------------------------------------------------------------------------------------------------------
# What the operations do

_Rule = Callable[[_Tracer, fx.Node], Any]
_RULES: dict[str, _Rule] = {}


def _rule(*kinds: str) -> Callable[[_Rule], _Rule]:
    def add(rule: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(kinds, rule))
        return rule
    return add


@_rule("conv1d", "conv2d", "conv3d")
def _convolution(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    return tracer.contract(node, 0, 1, _argument(node, 6, "groups", 1))


@_rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    if _argument(node, 6, "groups", 1) != 1:
        raise TransplantError(f"{_where(node)} is a transposed convolution in groups: alignment cannot follow")
    return tracer.contract(node, 1, 1)


@_rule("linear")
def _linear(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    return tracer.contract(node, 0, node.meta["val"].dim() - 1)


@_rule("instance_norm", "batch_norm")
def _channel_norm(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    data, *weights = node.args[:5]
    value = tracer.value(data)
    tracer.scale(node, tracer.along(value, 1, node), *weights)
    return value


@_rule("group_norm")
def _group_norm(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    data, groups, *weights = node.args[:4]
    value = tracer.value(data)
    units = tracer.along(value, 1, node)
    tracer.scale(node, units, *weights)
    if 1 < groups < len(units):
        tracer.blocks.append(units.reshape(groups, -1))
    return value


@_rule("layer_norm")
def _layer_norm(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    data, shape, *weights = node.args[:4]
    if len(shape) != 1:
        raise TransplantError(f"{_where(node)} normalises several axes at once: alignment cannot follow")
    value = tracer.value(data)
    tracer.scale(node, tracer.along(value, value.dim() - 1, node), *weights)
    return value


@_rule("mean", "sum", "amax")
def _reduction(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    """Over voxels a unit stays itself; over units nothing is left of them."""
    value = tracer.value(node.args[0])
    axes = node.args[1] if len(node.args) > 1 and node.args[1] is not None else list(range(value.dim()))
    low, high = value.amin(axes, keepdim=True), value.amax(axes, keepdim=True)
    return torch.where(low == high, low, FIXED).reshape(tuple(node.meta["val"].shape))


@_rule("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool2d",
       "adaptive_avg_pool3d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_trilinear3d",
       "upsample_linear1d", "upsample_nearest1d")
def _resample(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    value, shape = tracer.value(node.args[0]), tuple(node.meta["val"].shape)
    units = tracer.along(value, 1, node)
    return torch.from_numpy(units).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)


@_rule("scaled_dot_product_attention")
def _attention(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    queries, keys, values = (tracer.value(each) for each in node.args[:3])
    heads = []
    for slots in (queries, keys, values):  # (batch, heads, tokens, units)
        moved = slots.transpose(1, 2).flatten(0, 1)
        if not bool((moved == moved[0]).all()):
            raise TransplantError(f"alignment cannot follow the attention of {_where(node)}")
        heads.append(moved[0].numpy().copy())
    tracer.attention.append(tuple(heads))
    return values[:, :, :1].expand(tuple(node.meta["val"].shape))


@_rule("dropout", "alpha_dropout", "feature_dropout")
def _dropout(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    return tracer.value(node.args[0])


@_rule("type_as")
def _type_as(tracer: _Tracer, node: fx.Node) -> torch.Tensor:
    return tracer.value(node.args[0])


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


_STRUCTURAL = {"view", "reshape", "permute", "transpose", "flatten", "unflatten", "cat", "stack", "slice", "select",
               "unbind", "chunk", "split", "split_with_sizes", "expand", "expand_as", "squeeze", "unsqueeze", "clone",
               "contiguous", "alias", "detach", "narrow", "movedim", "repeat", "t", "_unsafe_view", "index_select",
               "unfold"}
_ENTRY_BY_ENTRY = {"add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "neg", "abs", "exp", "sigmoid", "tanh",
                   "relu", "leaky_relu", "elu", "gelu", "silu", "mish", "hardtanh", "hardsigmoid", "hardswish", "celu",
                   "selu", "softplus", "relu6", "clamp", "to", "_to_copy", "maximum", "minimum"}
_CARRY = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "dropout", "alias",
          "clone", "contiguous", "detach", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
          "upsample_trilinear3d"}
_NORMS = {torch.ops.aten.instance_norm.default, torch.ops.aten.batch_norm.default}


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
