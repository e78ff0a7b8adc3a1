"""Which axes of which tensors share one permutation of units, derived from the graph that `torch.export` traces.

Every entry along an axis of a tensor is a slot, and every value in the graph carries the slots that its entries come
from. An operation that meets two values entry by entry (a sum, a norm's scale) ties their slots; a contraction (a
convolution, a linear layer) ties the slots of its input to those that its weight reads, and gives out those that its
weight makes. Slots tied to each other are one unit. Units may change places with each other, they are a group, if they
lie in the same tensors and are treated alike: the same operations, the same constants.
"""
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn
from torch.export import ExportedProgram

from nnunet_transplant.alignment.graph import tensor_names, trace
from nnunet_transplant.errors import TransplantError

FIXED = -1  # the slot of what is no unit: the image, constants, what is left when all units are summed up


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
    """The spec of a network, which is put in eval mode, for inputs of this shape (1, channels, ...).

    Raises TransplantError that names what in the network cannot be followed.
    """
    tracer = _Tracer(trace(network, shape))
    tracer.run()
    return Spec(tracer.groups(), tracer.program)


@dataclass(eq=False)
class _Weight:
    """A parameter or buffer, and the slots of its axes, or of its entries where it is used as a value."""
    name: str
    shape: tuple[int, ...]
    is_parameter: bool
    axes: dict[int, np.ndarray] = field(default_factory=dict)
    entries: np.ndarray | None = None
    reads: set[int] = field(default_factory=set)    # axes
    free: list[bool] = field(default_factory=list)  # for every use as a layer's weight: whether a norm follows
    idle: list[bool] = field(default_factory=list)  # for every use as its bias: the same


_Place = tuple[_Weight, int, int]  # axis, index


class _Tracer:
    """Walks through the graph. A value is an int64 tensor of slots, of the value's shape: an expanded view along the
    axes on which it is the same, so that memory does not grow with the number of voxels. A constant is FIXED, and
    differs along the axes on which it is no expanded view."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program, parameters, state = program, program.graph_signature.inputs_to_parameters, program.state_dict
        self.weights = {node: _Weight(name, tuple(state[name].shape), node in parameters)
                        for node, name in tensor_names(program).items() if name in state}
        self.values: dict[fx.Node, Any] = {}
        self.slots = 0
        self.ties: list[np.ndarray] = []                      # (2, n): slots
        self.marks: list[tuple[np.ndarray, np.ndarray]] = []  # of one operation: slots, and the mark of each
        self.blocks: list[np.ndarray] = []                    # (blocks, n): slots
        self.heads: list[tuple] = []                          # queries, keys, values (heads, n): slots; the node
        self.made: list[tuple[Tap, np.ndarray]] = []          # the values that layers make, and those they read
        self.read: list[tuple[Tap, np.ndarray]] = []

    def run(self) -> None:
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                value = self.values[node] = self.call(node)
                if isinstance(value, torch.Tensor):
                    self.mark(_thin(value).numpy(), 0)
            elif node.op == "output":
                for value in map(self.value, node.all_input_nodes):  # each of its units has a meaning of its own
                    slots = _thin(value).numpy().ravel()
                    self.mark(slots, np.arange(len(slots)))
            elif node.op != "placeholder":
                raise TransplantError(f"alignment cannot follow {node.op} {node.target} of the network")
            elif node.name not in self.weights:
                self.values[node] = _constant(node)

    def call(self, node: fx.Node) -> Any:
        kind, value = _kind(node), node.meta["val"]
        if kind == "getitem":
            return self.values[node.args[0]][node.args[1]]
        if kind in _REARRANGING:
            return node.target(*fx.node.map_arg(node.args, self.value), **node.kwargs)
        if isinstance(value, torch.Tensor) and all(
                other in self.values and bool((_thin(self.values[other]) == FIXED).all())
                for other in node.all_input_nodes):
            return _constant(node)  # whatever it is, it is made of constants
        if kind in _ENTRY_BY_ENTRY:
            return self.entry_by_entry(node)
        if kind in _RESAMPLING:
            return self.by_unit(node, 1)
        match kind:
            case "conv1d" | "conv2d" | "conv3d":
                return self.contract(node, 0, 1, _argument(node, 6, "groups", 1))
            case "conv_transpose1d" | "conv_transpose2d" | "conv_transpose3d":
                return self.contract(node, 1, 1, _argument(node, 6, "groups", 1))
            case "linear":
                return self.contract(node, 0, value.dim() - 1)
            case "instance_norm" | "batch_norm" | "prelu":
                return self.by_unit(node, 1, node.args[1:5])
            case "layer_norm" if len(node.args[1]) == 1:
                return self.by_unit(node, value.dim() - 1, node.args[2:4])
            case "group_norm":
                return self.group_norm(node)
            case "mean" | "sum" | "amax":
                return self.reduction(node)
            case "cat" | "stack":
                return self.joined(node, kind == "stack")
            case "scaled_dot_product_attention" if _argument(node, 3, "attn_mask", None) is None:
                return self.attention(node)
            case "type_as":
                return self.value(node.args[0])
            case "_assert_tensor_metadata":
                return None
        raise TransplantError(f"alignment cannot follow {node.target} in {_where(node)}")

    def value(self, node: fx.Node) -> torch.Tensor:
        """The slots of a value; a parameter used as one has slots for its entries."""
        if node in self.values:
            return self.values[node]
        weight = self.weights[node.name]
        long = [axis for axis, size in enumerate(weight.shape) if size > 1]
        if not long or not weight.is_parameter:
            return _constant(node)
        if len(long) == 1:
            return torch.from_numpy(self.axis(weight, long[0])).reshape(weight.shape)
        if weight.entries is None:
            weight.entries = self.new(math.prod(weight.shape)).reshape(weight.shape)
        return torch.from_numpy(weight.entries)

    def weight(self, node: fx.Node, user: fx.Node) -> _Weight:
        if node.name not in self.weights:
            raise TransplantError(f"alignment cannot follow {_where(user)}: it computes weights")
        return self.weights[node.name]

    def axis(self, weight: _Weight, axis: int) -> np.ndarray:
        if weight.shape[axis] == 1:  # nothing to change places with: it may meet all units of another
            return np.array([FIXED])
        if axis not in weight.axes:
            weight.axes[axis] = self.new(weight.shape[axis])
        return weight.axes[axis]

    def new(self, count: int) -> np.ndarray:
        self.slots += count
        return np.arange(self.slots - count, self.slots)

    # -- what meets --------------------------------------------------------------------------------------------------

    def mark(self, slots: np.ndarray, marks: np.ndarray | int) -> None:
        """Note what an operation says of units: they are alike if they have the same marks of the same operations."""
        units = slots != FIXED
        self.marks.append((slots[units], np.broadcast_to(marks, slots.shape)[units]))

    def tie(self, one: np.ndarray | torch.Tensor, other: np.ndarray | torch.Tensor) -> None:
        """Two values, of shapes that broadcast, meet entry by entry."""
        one, other = np.asarray(one), np.asarray(other)
        here, there = np.broadcast_arrays(one, other)
        both = (here != FIXED) & (there != FIXED) & (here != there)
        self.ties.append(np.stack([here[both], there[both]]))
        for units, constant in ((one, other), (other, one)):
            # Units that meet different entries of a constant are not alike. Where it differs along voxels or tokens
            # only, an axis on which the units are the same, all of them meet all of it.
            if (constant == FIXED).any():
                same = tuple(axis for axis in range(units.ndim) if units.shape[axis] == 1)
                meets = (constant == FIXED).any(axis=same, keepdims=True)
                self.mark(np.where(meets, units, FIXED), np.arange(meets.size).reshape(meets.shape))

    def along(self, value: torch.Tensor, axis: int) -> np.ndarray:
        """The slots along an axis; all those at one place on it are tied, for one entry of a weight meets them."""
        rows = _thin(value).movedim(axis, -1)
        rows = rows.expand(*rows.shape[:-1], value.shape[axis]).reshape(-1, value.shape[axis])
        units = rows.amax(0)
        self.tie(units[None], rows)
        return units.numpy()

    def entry_by_entry(self, node: fx.Node) -> torch.Tensor:
        operands = [self.value(argument) for argument in node.args if isinstance(argument, fx.Node)]
        values = sorted((_thin(value) for value in torch.broadcast_tensors(*operands)),
                        key=lambda value: (bool((value == FIXED).any()), value.numel()))
        result = values[0]  # tied slots stand for each other: the smallest value that is all units will do
        for other in values[1:]:
            self.tie(result, other)
            if bool((result == FIXED).any()):
                result = torch.where(result == FIXED, other, result)
        return result.expand(node.meta["val"].shape)

    def by_unit(self, node: fx.Node, axis: int, weights: Sequence[fx.Node | None] = ()) -> torch.Tensor:
        """Each unit for itself, as norms and pooling do, with its own entry of each weight."""
        units = self.along(self.value(node.args[0]), axis)
        for weight in weights:
            if weight is not None:
                self.tie(units, self.axis(self.weight(weight, node), 0))
        return _spread(units, axis, node)

    def contract(self, node: fx.Node, makes: int, channel: int, groups: int = 1) -> torch.Tensor:
        """A weight whose axis `makes` makes the units on axis `channel` from those there that its other axis reads."""
        weight, bias = self.weight(node.args[1], node), _argument(node, 2, "bias", None)
        units, made = self.along(self.value(node.args[0]), channel), self.axis(weight, makes)
        self.made.append((Tap(node.name, channel), made))
        if groups == 1:
            self.tie(units, self.axis(weight, 1 - makes))
            weight.reads.add(1 - makes)
            self.tap(node.args[0], channel, units)
        elif groups == len(units) == len(made):  # depthwise: every unit by itself
            self.tie(units, made)
        else:
            raise TransplantError(f"alignment cannot follow {_where(node)}: a convolution in {groups} groups")
        weight.free.append(_meets_norm(node))
        if bias is not None:
            bias = self.weight(bias, node)
            self.tie(made, self.axis(bias, 0))
            bias.idle.append(_meets_norm(node))
        return _spread(made, channel, node)

    def group_norm(self, node: fx.Node) -> torch.Tensor:
        result = self.by_unit(node, 1, node.args[2:4])
        if not _norms_units(node):
            self.blocks.append(self.along(result, 1).reshape(node.args[1], -1))
        return result

    def attention(self, node: fx.Node) -> torch.Tensor:
        """Of queries, keys and values (batch, heads, tokens, n)."""
        (heads, size), *more = {(each.meta["val"].shape[1], each.meta["val"].shape[3]) for each in node.args[:3]}
        if more:
            raise TransplantError(f"alignment cannot follow {_where(node)}: queries, keys and values differ in size")
        slots = [self.along(self.value(each).transpose(1, 2).flatten(2), 2).reshape(heads, size)
                 for each in node.args[:3]]
        self.heads.append((*slots, node))
        self.blocks.append(slots[2])
        return torch.from_numpy(slots[2])[None, :, None].expand(node.meta["val"].shape)

    def reduction(self, node: fx.Node) -> torch.Tensor:
        """Over voxels a unit stays itself; over all units nothing is left of them."""
        value = self.value(node.args[0])
        axes = [axis % value.dim() for axis in _argument(node, 1, "dim", None) or range(value.dim())]
        thin = _thin(value)
        result = thin.amax(axes, keepdim=True)
        if not bool((thin == result).all()):
            others = [axis for axis in range(value.dim()) if axis not in axes]
            if others and not bool((thin == thin.amax(others, keepdim=True)).all()):
                raise TransplantError(f"alignment cannot follow {_where(node)}: it sums up some of the units")
            result = torch.full_like(result, FIXED)
        return result.expand([1 if axis in axes else size for axis, size in enumerate(value.shape)]).reshape(
            node.meta["val"].shape)

    def joined(self, node: fx.Node, stacked: bool) -> torch.Tensor:
        shape = node.meta["val"].shape
        axis = _argument(node, 1, "dim", 0) % len(shape)
        parts = [self.value(part).unsqueeze(axis) if stacked else self.value(part) for part in node.args[0]]
        thin = [_thin(part) for part in parts if part.numel()]
        if thin[0].shape[axis] == 1 and all(torch.equal(part, thin[0]) and (part != FIXED).all() for part in thin):
            return thin[0].expand(shape)  # tokens put together again: the same units everywhere
        for other in range(len(shape)):
            if other != axis and all(part.stride(other) == 0 for part in parts):
                parts = [part.narrow(other, 0, 1) for part in parts]
        return torch.cat(parts, axis).expand(shape)

    def tap(self, node: fx.Node, channel: int, units: np.ndarray) -> None:
        """Note the values that are read: as they were made, before pooling or concatenation."""
        kind = _kind(node)
        if kind == "cat" and _argument(node, 1, "dim", 0) % node.meta["val"].dim() == channel:
            for part in node.args[0]:
                size = part.meta["val"].shape[channel]
                self.tap(part, channel, units[:size])
                units = units[size:]
        elif kind in _CARRY:
            self.tap(node.args[0], channel, units)
        elif node.op == "call_function":
            self.read.append((Tap(node.name, channel), units))

    # -- what was found ----------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, Group]:
        unit_of = self.units()
        places = self.places(unit_of)
        marks = self.marks_of_units(unit_of)
        read, heads, rigid = defaultdict(list), {}, set()
        for tap, slots in self.read:
            read[_units(unit_of, slots)].append(tap)
        made = {_units(unit_of, slots): [tap] for tap, slots in self.made}  # where no value read is theirs alone
        taps = made | read
        for queries, keys, values, node in self.heads:
            heads[_units(unit_of, values)] = queries, keys, node
            rigid |= {*_units(unit_of, queries), *_units(unit_of, keys)}
        blocks = [[set(row) for row in unit_of[slots].tolist()] for slots in self.blocks]
        alike = defaultdict(list)
        for unit, at in places.items():
            alike[tuple((weight, axis) for weight, axis, _ in at), marks.get(unit)].append(unit)
        found = {}
        for units in map(tuple, alike.values()):
            at = places[units[0]]
            reads = {axis in weight.reads for weight, axis, _ in at}
            if len(units) == 1 or len(reads) == 1 or not rigid.isdisjoint(units):
                continue
            segments = [_segment(weight, axis, [places[unit][i][2] for unit in units])
                        for i, (weight, axis, _) in enumerate(at)]
            first = next((s for s in segments if s.counts and not s.reads), segments[0])
            segments.sort(key=lambda segment: segment is not first)
            whole = self.program.state_dict[first.tensor].shape[first.axis] == len(units)
            name = first.tensor.removesuffix(".weight")
            name += "" if whole else f"[{first.start}:{first.start + len(units)}]"
            if units in heads:
                *both, node = heads[units]
                segments += dict.fromkeys(segment for slots in both
                                          for segment in _rigid(unit_of[slots], places, marks, node))
            found[name] = Group(name, len(units), tuple(segments), tuple(dict.fromkeys(taps[units])),
                                _block_count(units, blocks, name))
        return found

    def units(self) -> np.ndarray:
        """Slot -> its unit: what is tied together is one."""
        here, there = np.concatenate([*self.ties, np.zeros((2, 0), int)], axis=1)
        graph = coo_array((np.ones(len(here)), (here, there)), shape=(self.slots,) * 2)
        count, unit_of = connected_components(graph, directed=False)
        return np.append(unit_of, count)  # the last is that of FIXED

    def places(self, unit_of: np.ndarray) -> dict[int, list[_Place]]:
        """Unit -> its places, in the order of the weights."""
        places = defaultdict(list)
        for weight in self.weights.values():
            axes = {axis: unit_of[slots] for axis, slots in weight.axes.items()}
            if weight.entries is not None:
                entries = unit_of[weight.entries]
                for axis in range(entries.ndim):
                    rows = np.moveaxis(entries, axis, -1).reshape(-1, entries.shape[axis])
                    if (rows == rows[0]).all():
                        axes[axis] = rows[0]
                if weight.axes or not axes:  # also the weight of a layer, or its units lie on no axis: they stay
                    for slots in (weight.entries.ravel(), *weight.axes.values()):
                        self.mark(slots, np.arange(len(slots)))
            for axis, units in axes.items():
                for index, unit in enumerate(units.tolist()):
                    places[unit].append((weight, axis, index))
        return places

    def marks_of_units(self, unit_of: np.ndarray) -> dict[int, tuple[int, ...]]:
        """Unit -> all its marks, in numbers that no two operations share."""
        ends = np.cumsum([marks.max(initial=-1) + 1 for _, marks in self.marks])
        pairs = [unit_of[slots] * ends[-1] + end - 1 - marks
                 for (slots, marks), end in zip(self.marks, ends, strict=True)]
        units, marks = np.divmod(np.unique(np.concatenate(pairs)), ends[-1])
        starts = np.flatnonzero(np.diff(units, prepend=-1)).tolist()
        return {int(units[start]): tuple(marks[start:stop].tolist())
                for start, stop in zip(starts, [*starts[1:], len(units)], strict=True)}


def _units(unit_of: np.ndarray, slots: np.ndarray) -> tuple[int, ...]:
    return tuple(unit_of[slots.ravel()].tolist())


def _segment(weight: _Weight, axis: int, indices: Sequence[int], rigid: bool = False) -> Segment:
    start, reads = indices[0], axis in weight.reads
    if list(indices) != list(range(start, start + len(indices))):
        raise TransplantError(f"alignment cannot follow: the units of {weight.name} lie scattered")
    return Segment(weight.name, axis, start, reads, weight.is_parameter and not (weight.idle and all(weight.idle)),
                   bool(weight.free) and all(weight.free) and not reads, rigid)


def _rigid(units: np.ndarray, places: Mapping[int, list[_Place]], marks: Mapping[int, tuple[int, ...]],
           node: fx.Node) -> Iterator[Segment]:
    """Of queries or keys (heads, n), which move by whole heads: every head must be like the first."""
    heads = [[([(weight, axis, index - head * len(row)) for weight, axis, index in places[unit]], marks.get(unit))
              for unit in row] for head, row in enumerate(units.tolist())]
    if heads.count(heads[0]) < len(heads):
        raise TransplantError(f"alignment cannot follow {_where(node)}: its heads differ")
    indices = defaultdict(set)
    for unit in units.ravel().tolist():
        for weight, axis, index in places[unit]:
            indices[weight, axis].add(index)
    for (weight, axis), lie in indices.items():
        yield _segment(weight, axis, sorted(lie), rigid=True)


def _block_count(units: tuple[int, ...], divisions: Sequence[Sequence[set[int]]], name: str) -> int:
    """Into how many blocks group norms and attentions divide a group: 1 where all of it lies in one."""
    counts = set()
    for rows in divisions:
        mine = list({frozenset(row): row for row in rows if not row.isdisjoint(units)}.values())
        if mine and not mine[0].issuperset(units):
            size = len(units) // len(mine)
            if mine != [set(units[start:start + size]) for start in range(0, len(units), size)]:
                counts.add(None)
            counts.add(len(mine))
    if len(counts) > 1:
        raise TransplantError(f"alignment cannot follow: the units of {name} are divided into groups in several ways")
    return counts.pop() if counts else 1


def _thin(value: torch.Tensor) -> torch.Tensor:
    """The value with size 1 along the axes on which it is an expanded view."""
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]


def _spread(units: np.ndarray, axis: int, node: fx.Node) -> torch.Tensor:
    """The value of a node whose units lie along an axis."""
    shape = node.meta["val"].shape
    return torch.from_numpy(units).reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _constant(node: fx.Node) -> torch.Tensor:
    return torch.full(tuple(node.meta["val"].shape), FIXED)


def _norms_units(node: fx.Node) -> bool:
    """Whether it takes away each unit's own scale and shift."""
    return _kind(node) in ("instance_norm", "batch_norm") or (
        _kind(node) == "group_norm" and node.args[1] == node.meta["val"].shape[1])


def _meets_norm(node: fx.Node) -> bool:
    """Whether all that becomes of a value is that a norm takes away each unit's scale and shift."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if _norms_units(node):
            return True
        if _kind(node) not in _DROPOUT:
            break
    return False


def _kind(node: fx.Node) -> str:
    """The name of a node's operation: "add" for aten.add_.Tensor."""
    return getattr(node.target, "__name__", str(node.target)).split(".")[0].rstrip("_")


def _where(node: fx.Node) -> str:
    """The module of the network that a node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return (next(reversed(stack.values()))[0] if stack else "") or "the network"


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# ---------------------------------------------------------------------------------------------------------------------
# What the operations do

_DROPOUT = {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
_RESAMPLING = {f"{how}{dim}d" for dim in (1, 2, 3)
             for how in ("avg_pool", "max_pool", "adaptive_avg_pool", "upsample_nearest")
             } | {"upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"}
_CARRY = _DROPOUT | _RESAMPLING | {"alias", "clone", "contiguous", "detach"}
_ENTRY_BY_ENTRY = _DROPOUT | {
    "add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "neg", "abs", "exp", "sigmoid", "tanh", "relu",
    "leaky_relu", "elu", "gelu", "silu", "mish", "hardtanh", "hardsigmoid", "hardswish", "celu", "selu", "softplus",
    "relu6", "clamp", "maximum", "minimum", "to", "clone", "contiguous", "alias", "detach"}
_REARRANGING = {"view", "reshape", "permute", "transpose", "flatten", "unflatten", "slice", "select", "unbind", "chunk",
               "split", "split_with_sizes", "expand", "expand_as", "squeeze", "unsqueeze", "narrow", "movedim",
               "repeat", "t", "_unsafe_view", "unfold"}


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
