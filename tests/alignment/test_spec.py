"""The permutation spec on every architecture that nnU-Net builds: permuted as it says, a network gives the same output;
with any one axis left out it does not."""
from collections import Counter

import numpy as np
import pytest
import torch
from architectures import CASES, CHANNELS, CLASSES, PRESETS, TOLERANCE, permuted

from nnunet_transplant.alignment.graph import tensor_names
from nnunet_transplant.alignment.spec import permute


@pytest.mark.parametrize("name", CASES)
def test_permuted_by_the_spec_the_output_is_the_same(name: str) -> None:
    case = permuted(name)
    assert case.change(permute(case.tensors, case.spec, case.orders)) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name not in PRESETS])
def test_with_any_one_axis_left_out_it_is_not(name: str) -> None:
    case = permuted(name)
    for group in case.spec.groups.values():
        for segment in group.segments:
            change = case.change(case.moved(group, [other for other in group.segments if other is not segment]))
            assert (change < TOLERANCE) == (case.instance and not segment.counts), (group.name, segment, change)


@pytest.mark.parametrize("name", PRESETS)
def test_with_any_one_axis_left_out_it_is_not_in_large_networks(name: str) -> None:
    """To leave one out changes as much as to move it alone: how much, to first order, a gradient tells for all."""
    case = permuted(name)
    generator = torch.Generator().manual_seed(0)
    weighted = [output * torch.randn(output.shape, generator=generator) for output in case.outputs()]
    sum(output.sum() for output in weighted).backward()
    size = float(sum(output.detach().abs().sum() for output in weighted))
    for group in case.spec.groups.values():
        for segment in group.segments:
            moved = case.moved(group, [segment])[segment.tensor] - case.tensors[segment.tensor]
            change = abs(float((moved * case.own[segment.tensor].grad).sum())) / size
            assert (change < 1e-12) == (not segment.counts), (group.name, segment, change)


@pytest.mark.parametrize("name", CASES)
def test_every_axis_is_accounted_for(name: str) -> None:
    case = permuted(name)
    groups = case.spec.groups.values()
    places = Counter((segment.tensor, segment.axis, segment.start + index)
                     for group in groups for segment in group.segments for index in range(group.size))
    assert set(places.values()) == {1}
    assert {tensor for tensor, _, _ in places} <= set(case.tensors)  # the last names of tied tensors
    covered = Counter((tensor, axis) for tensor, axis, _ in places)
    program = case.spec.program
    names = tensor_names(program)
    for tensor in {names[node.name] for node in program.graph.nodes if node.users and node.name in names
                   } & set(case.tensors):
        shape = case.tensors[tensor].shape
        axes = range(2) if tensor.endswith("weight") and len(shape) > 1 else range(len(shape))[:1]
        for axis in axes:
            assert shape[axis] - covered[tensor, axis] in (0, 1, CHANNELS, CLASSES), (tensor, axis)
    for group in groups:
        assert group.size % group.blocks == 0 and len(group.segments) > 1 and group.taps
        for tap in group.taps:
            node = next(node for node in program.graph.nodes if node.name == tap.node)
            assert node.meta["val"].shape[tap.axis] == group.size
    lines = case.spec.text().splitlines()
    assert len(lines) == len(groups) + sum(len(group.segments) for group in groups)
    assert len({line for line in lines if line.startswith(" ")}) == len(lines) - len(groups)


@pytest.mark.parametrize("name", CASES)
def test_back_again_it_has_the_same_bits(name: str) -> None:
    case = permuted(name)
    there = permute(case.tensors, case.spec, case.orders)
    back = permute(there, case.spec, {group: np.argsort(order) for group, order in case.orders.items()})
    assert all(torch.equal(back[tensor], case.tensors[tensor]) for tensor in case.tensors)
    moved = {segment.tensor for group in case.spec.groups.values() for segment in group.segments}
    assert {tensor for tensor in there if not torch.equal(there[tensor], case.tensors[tensor])} == moved
