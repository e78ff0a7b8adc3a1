"""The permutation spec of a network, derived from the graph that `torch.export` traces.

Every entry along an axis of a tensor is a slot, and every value in the graph carries the slots that its entries come
from. An operation that meets two values entry by entry (a sum, a norm's scale) ties their slots; a contraction (a
convolution, a linear layer) ties the slots of its input to those that its weight reads, and gives out those that its
weight makes. Slots tied to each other are one unit. Units may change places with each other, they are a group, if they
lie in the same tensors and are treated alike: the same operations, the same constants.
"""
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import fx, nn
from torch.export import ExportedProgram

from nnunet_transplant.alignment.graph import Node, exported, tensor_names
from nnunet_transplant.alignment.operations import (
    CARRY,
    ENTRY_BY_ENTRY,
    REARRANGING,
    RESAMPLING,
    argument_of,
    kind_of,
    meets_norm,
    module_of,
    norms_units,
)
from nnunet_transplant.alignment.places import Place, Weight, block_count, rigid_segments, segment_at
from nnunet_transplant.alignment.spec import Group, Spec, Tap
from nnunet_transplant.errors import TransplantError

FIXED = -1  # the slot of what is no unit: the image, constants, what is left when all units are summed up


def derive(network: nn.Module, shape: Sequence[int]) -> Spec:
    """The spec of a network, which is put in eval mode, for inputs of this shape (1, channels, ...).

    Raises TransplantError that names what in the network cannot be followed.
    """
    tracer = _Tracer(exported(network, shape))
    tracer.run()
    return Spec(tracer.groups(), tracer.program)


class _Tracer:
    """Walks through the graph. A value is an int64 tensor of slots, of the value's shape: an expanded view along the
    axes on which it is the same, so that memory does not grow with the number of voxels. A constant is FIXED, and
    differs along the axes on which it is no expanded view."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program, parameters, state = program, program.graph_signature.inputs_to_parameters, program.state_dict
        self.weights = {node: Weight(name, tuple(state[name].shape), node in parameters)
                        for node, name in tensor_names(program).items() if name in state}
        self.values: dict[Node, Any] = {}
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

    def call(self, node: Node) -> Any:
        kind, value = kind_of(node), node.meta["val"]
        if kind == "getitem":
            return self.values[node.args[0]][node.args[1]]
        if kind in REARRANGING:
            return node.target(*fx.node.map_arg(node.args, self.value), **node.kwargs)
        if isinstance(value, torch.Tensor) and all(
                other in self.values and bool((_thin(self.values[other]) == FIXED).all())
                for other in node.all_input_nodes):
            return _constant(node)  # whatever it is, it is made of constants
        if kind in ENTRY_BY_ENTRY:
            return self.entry_by_entry(node)
        if kind in RESAMPLING:
            return self.by_unit(node, 1)
        match kind:
            case "conv1d" | "conv2d" | "conv3d":
                return self.contract(node, 0, 1, argument_of(node, 6, "groups", 1))
            case "conv_transpose1d" | "conv_transpose2d" | "conv_transpose3d":
                return self.contract(node, 1, 1, argument_of(node, 6, "groups", 1))
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
            case "scaled_dot_product_attention" if argument_of(node, 3, "attn_mask", None) is None:
                return self.attention(node)
            case "type_as":
                return self.value(node.args[0])
            case "_assert_tensor_metadata":
                return None
        raise TransplantError(f"alignment cannot follow {node.target} in {module_of(node)}")

    def value(self, node: Node) -> torch.Tensor:
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

    def weight(self, node: Node, user: Node) -> Weight:
        if node.name not in self.weights:
            raise TransplantError(f"alignment cannot follow {module_of(user)}: it computes weights")
        return self.weights[node.name]

    def axis(self, weight: Weight, axis: int) -> np.ndarray:
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

    def entry_by_entry(self, node: Node) -> torch.Tensor:
        operands = [self.value(argument) for argument in node.args if isinstance(argument, fx.Node)]
        values = sorted((_thin(value) for value in torch.broadcast_tensors(*operands)),
                        key=lambda value: (bool((value == FIXED).any()), value.numel()))
        result = values[0]  # tied slots stand for each other: the smallest value that is all units will do
        for other in values[1:]:
            self.tie(result, other)
            if bool((result == FIXED).any()):
                result = torch.where(result == FIXED, other, result)
        return result.expand(node.meta["val"].shape)

    def by_unit(self, node: Node, axis: int, weights: Sequence[Node | None] = ()) -> torch.Tensor:
        """Each unit for itself, as norms and pooling do, with its own entry of each weight."""
        units = self.along(self.value(node.args[0]), axis)
        for weight in weights:
            if weight is not None:
                self.tie(units, self.axis(self.weight(weight, node), 0))
        return _spread(units, axis, node)

    def contract(self, node: Node, makes: int, channel: int, groups: int = 1) -> torch.Tensor:
        """A weight whose axis `makes` makes the units on axis `channel` from those there that its other axis reads."""
        weight, bias = self.weight(node.args[1], node), argument_of(node, 2, "bias", None)
        units, made = self.along(self.value(node.args[0]), channel), self.axis(weight, makes)
        self.made.append((Tap(node.name, channel), made))
        if groups == 1:
            self.tie(units, self.axis(weight, 1 - makes))
            weight.reads.add(1 - makes)
            self.tap(node.args[0], channel, units)
        elif groups == len(units) == len(made):  # depthwise: every unit by itself
            self.tie(units, made)
        else:
            raise TransplantError(f"alignment cannot follow {module_of(node)}: a convolution in {groups} groups")
        weight.free.append(meets_norm(node))
        if bias is not None:
            bias = self.weight(bias, node)
            self.tie(made, self.axis(bias, 0))
            bias.idle.append(meets_norm(node))
        return _spread(made, channel, node)

    def group_norm(self, node: Node) -> torch.Tensor:
        result = self.by_unit(node, 1, node.args[2:4])
        if not norms_units(node):
            self.blocks.append(self.along(result, 1).reshape(node.args[1], -1))
        return result

    def attention(self, node: Node) -> torch.Tensor:
        """Of queries, keys and values (batch, heads, tokens, n)."""
        (heads, size), *more = {(each.meta["val"].shape[1], each.meta["val"].shape[3]) for each in node.args[:3]}
        if more:
            raise TransplantError(f"alignment cannot follow {module_of(node)}: queries, keys and values differ in size")
        slots = [self.along(self.value(each).transpose(1, 2).flatten(2), 2).reshape(heads, size)
                 for each in node.args[:3]]
        self.heads.append((*slots, node))
        self.blocks.append(slots[2])
        return torch.from_numpy(slots[2])[None, :, None].expand(node.meta["val"].shape)

    def reduction(self, node: Node) -> torch.Tensor:
        """Over voxels a unit stays itself; over all units nothing is left of them."""
        value = self.value(node.args[0])
        axes = [axis % value.dim() for axis in argument_of(node, 1, "dim", None) or range(value.dim())]
        thin = _thin(value)
        result = thin.amax(axes, keepdim=True)
        if not bool((thin == result).all()):
            others = [axis for axis in range(value.dim()) if axis not in axes]
            if others and not bool((thin == thin.amax(others, keepdim=True)).all()):
                raise TransplantError(f"alignment cannot follow {module_of(node)}: it sums up some of the units")
            result = torch.full_like(result, FIXED)
        return result.expand([1 if axis in axes else size for axis, size in enumerate(value.shape)]).reshape(
            node.meta["val"].shape)

    def joined(self, node: Node, stacked: bool) -> torch.Tensor:
        shape = node.meta["val"].shape
        axis = argument_of(node, 1, "dim", 0) % len(shape)
        parts = [self.value(part).unsqueeze(axis) if stacked else self.value(part) for part in node.args[0]]
        thin = [_thin(part) for part in parts if part.numel()]
        if thin[0].shape[axis] == 1 and all(torch.equal(part, thin[0]) and (part != FIXED).all() for part in thin):
            return thin[0].expand(shape)  # tokens put together again: the same units everywhere
        for other in range(len(shape)):
            if other != axis and all(part.stride(other) == 0 for part in parts):
                parts = [part.narrow(other, 0, 1) for part in parts]
        return torch.cat(parts, axis).expand(shape)

    def tap(self, node: Node, channel: int, units: np.ndarray) -> None:
        """Note the values that are read: as they were made, before pooling or concatenation."""
        kind = kind_of(node)
        if kind == "cat" and argument_of(node, 1, "dim", 0) % node.meta["val"].dim() == channel:
            for part in node.args[0]:
                size = part.meta["val"].shape[channel]
                self.tap(part, channel, units[:size])
                units = units[size:]
        elif kind in CARRY:
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
            segments = [segment_at(weight, axis, [places[unit][i][2] for unit in units])
                        for i, (weight, axis, _) in enumerate(at)]
            first = next((s for s in segments if s.counts and not s.reads), segments[0])
            segments.sort(key=lambda segment: segment is not first)
            whole = self.program.state_dict[first.tensor].shape[first.axis] == len(units)
            name = first.tensor.removesuffix(".weight")
            name += "" if whole else f"[{first.start}:{first.start + len(units)}]"
            if units in heads:
                *both, node = heads[units]
                segments += dict.fromkeys(segment for slots in both
                                          for segment in rigid_segments(unit_of[slots], places, marks, node))
            found[name] = Group(name, len(units), tuple(segments), tuple(dict.fromkeys(taps[units])),
                                block_count(units, blocks, name))
        return found

    def units(self) -> np.ndarray:
        """Slot -> its unit: what is tied together is one."""
        here, there = np.concatenate([*self.ties, np.zeros((2, 0), int)], axis=1)
        graph = coo_array((np.ones(len(here)), (here, there)), shape=(self.slots,) * 2)
        count, unit_of = connected_components(graph, directed=False)
        return np.append(unit_of, count)  # the last is that of FIXED

    def places(self, unit_of: np.ndarray) -> dict[int, list[Place]]:
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


def _thin(value: torch.Tensor) -> torch.Tensor:
    """The value with size 1 along the axes on which it is an expanded view."""
    return value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]


def _spread(units: np.ndarray, axis: int, node: Node) -> torch.Tensor:
    """The value of a node whose units lie along an axis."""
    shape = node.meta["val"].shape
    return torch.from_numpy(units).reshape([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)


def _constant(node: Node) -> torch.Tensor:
    return torch.full(tuple(node.meta["val"].shape), FIXED)
