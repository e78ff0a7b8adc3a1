"""Matching whole networks: copies with their units in another order are found out, and what is found is the best."""
import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from permuted import (
    HEADS,
    LABELS,
    assert_close,
    attention,
    canonical,
    image_of,
    logits,
    network_of,
    noisy,
    permuted,
    plans_of,
    shuffles,
    spec_of,
    tensors_of,
)

from nnunet_transplant.alignment import dual
from nnunet_transplant.alignment.activation_space import activation_similarity
from nnunet_transplant.alignment.dual import Matching, Solver, match, matched_similarity, matcher, zipper
from nnunet_transplant.alignment.graph import exported
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weight_space import WeightSimilarity, canonical_scale, identity, moved

KINDS = ("plain3d", "plain2d", "residual3d", "residual2d", "batch3d")
SOLVERS = {"align to the first": matcher(False), "align to the mean": matcher(True), "zip": zipper(0.5, 0.125)}
# Whether a method looks at how alike units of two models, by number, are.
LOOKS_AT = {"align to the first": lambda one, other: one == 0 < other,
            "align to the mean": lambda one, other: one < other, "zip": lambda one, other: one <= other}
Networks = Sequence[dict[str, torch.Tensor]]


@cache
def spec(kind: str) -> Spec:
    return HEADS if kind == "heads" else spec_of(plans_of(kind))


@cache
def original(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    plans = plans_of(kind)
    return tensors_of(network_of(plans, seed=seed), canonical(plans))


@cache
def program(kind: str) -> object:
    plans = plans_of(kind)
    return exported(network_of(plans).to("meta"), image_of(plans).shape)


def activations(kind: str, networks: Networks) -> dict[str, np.ndarray]:
    plans = plans_of(kind)
    return activation_similarity(spec(kind), program(kind), networks, (image_of(plans, seed) for seed in range(3)))


def matching(kind: str, networks: Networks, solver: Solver, alpha: float, **options: object) -> Matching:
    return match(spec(kind), networks, solver, alpha, activations(kind, networks) if alpha < 1 else None, **options)


def merged(kind: str, networks: Networks, found: Matching) -> dict[str, torch.Tensor]:
    each = [moved(network, spec(kind), found.assignments, n) for n, network in enumerate(networks)]
    return {name: sum(network[name].double() for network in each).to(each[0][name].dtype) / len(each)
            if each[0][name].is_floating_point() else each[0][name] for name in each[0]}


def says(kind: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    plans = plans_of(kind)
    return logits(plans, LABELS, tensors, image_of(plans))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("how", SOLVERS)
def test_a_copy_in_another_order_is_found_out(kind: str, alpha: float, how: str) -> None:
    """Exact or with noise, from either side; merging the exact one with the original gives the original."""
    order = shuffles(spec(kind), 1)  # unit i of the copy was unit order[i]
    copy = permuted(original(kind), spec(kind), 1)
    for noise, swapped in itertools.product((0.0, 0.05), (False, True)):
        networks = [original(kind), noisy(copy, noise, 2)]
        found = matching(kind, networks[::-1] if swapped else networks, SOLVERS[how], alpha)
        for name, assignment in found.assignments.items():
            first, second = assignment[::-1] if swapped else assignment
            np.testing.assert_array_equal(second, first[order[name]])
            assert sorted(first) == list(range(len(first)))
        assert (found.similarity > 0.999) if noise == 0 else (0.9 < found.similarity < 0.9999)
        if noise == 0:
            assert_close(says(kind, merged(kind, networks[::-1] if swapped else networks, found)),
                         says(kind, original(kind)))


@pytest.mark.parametrize("how", SOLVERS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_and_identical_units_do_no_harm(how: str, alpha: float) -> None:
    """They are matched anyhow, among themselves. (Not by a zip of activations alone, in which a dead unit is less alike
    to another than units of half a correlation are.)"""
    kind = "plain2d"
    model = {name: tensor.clone() for name, tensor in original(kind).items()}
    for part in ("0.weight", "0.bias", "1.weight", "1.bias"):
        tensor = model[f"decoder.encoder.stages.2.0.convs.0.all_modules.{part}"]
        tensor[5] = tensor[11]
        if (how, alpha) != ("zip", 0.0):
            tensor[[3, 9]] = 0
            model[f"decoder.stages.1.convs.0.all_modules.{part}"][2] = 0
    networks = [model, permuted(model, spec(kind), 1)]
    assert_close(says(kind, merged(kind, networks, matching(kind, networks, SOLVERS[how], alpha))), says(kind, model))


@pytest.mark.parametrize("kind", ["plain2d", "residual2d"])
@pytest.mark.parametrize("pearson", [True, False])
def test_git_re_basin_finds_it_from_the_identity(kind: str, pearson: bool) -> None:
    order = shuffles(spec(kind), 1)
    found = match(spec(kind), [original(kind), permuted(original(kind), spec(kind), 1)], matcher(False), 1.0,
                  pearson=pearson, patience=1)
    for name, (first, second) in found.assignments.items():
        np.testing.assert_array_equal(first, np.arange(len(first)))
        np.testing.assert_array_equal(second, order[name])


@pytest.mark.parametrize("how", SOLVERS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_many_copies_in_any_order(how: str, alpha: float) -> None:
    """With a decay, units that are alike may come before the third of three that are the same."""
    kind = "plain2d"
    solve = zipper(1.0, 0.125) if how == "zip" else SOLVERS[how]
    copies = [original(kind), *(permuted(original(kind), spec(kind), seed) for seed in (1, 2, 3))]
    expected = says(kind, original(kind))
    for order in ((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)):
        networks = [copies[i] for i in order]
        assert_close(says(kind, merged(kind, networks, matching(kind, networks, solve, alpha))), expected)


@pytest.mark.parametrize("how", SOLVERS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_either_order_of_two_different_models_gives_one_function(how: str, alpha: float) -> None:
    """The units of the merged network stand in another order, no more; from the activations' match on, all is
    symmetric."""
    kind = "plain2d"
    networks = [original(kind, 0), noisy(permuted(original(kind), spec(kind), 1), 0.6, 3)]
    one, other = (merged(kind, each, matching(kind, each, SOLVERS[how], alpha)) for each in (networks, networks[::-1]))
    assert_close(says(kind, one), says(kind, other))


def test_heads_of_an_attention_are_matched_block_by_block() -> None:
    order = shuffles(HEADS, 4)
    model = attention(0)
    networks = [model, permuted(model, HEADS, 4)]
    for solve in SOLVERS.values():
        for pearson in (True, False):
            found = match(HEADS, networks, solve, 1.0, pearson=pearson)
            for name, (first, second) in found.assignments.items():
                np.testing.assert_array_equal(second, first[order[name]])
            result = merged("heads", networks, found)
            back = moved(model, HEADS, {name: each[:1] for name, each in found.assignments.items()}, 0)
            for name, tensor in result.items():
                torch.testing.assert_close(tensor, back[name], rtol=1e-6, atol=1e-7)


def test_blocks_of_different_models_stay_together() -> None:
    """Whatever is matched: blocks of three units stay blocks, and queries and keys move with them."""
    networks = [attention(seed) for seed in range(3)]
    for solve in SOLVERS.values():
        found = match(HEADS, networks, solve, 1.0).assignments["values"]
        for assignment in found:
            assert sorted(set(assignment[:3] // 3) | set(assignment[3:] // 3)) == [0, 1]
            assert len(set(assignment[:3] // 3)) == len(set(assignment[3:] // 3)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is best

def plain_mean_similarity(kind: str, networks: Networks, state: dict[str, np.ndarray], alpha: float,
                          seen: dict[str, np.ndarray] | None, how: str) -> float:
    """The mean over groups, each as often as it has units, of the mean over the pairs of units that are matched."""
    weights = WeightSimilarity(spec(kind), networks)
    total = count = 0
    for name, group in spec(kind).groups.items():
        pairs = []
        every = itertools.product(range(len(networks)), repeat=2)
        by_weights = weights.between(name, list(every), state).reshape(len(networks), group.size, len(networks), -1)
        for one, other in itertools.product(range(len(networks)), repeat=2):
            if not LOOKS_AT[how](one, other):
                continue
            similarity = alpha * by_weights[one, :, other]
            if seen is not None:
                side_by_side = seen[name].reshape(len(networks), group.size, len(networks), -1)
                similarity += (1 - alpha) * side_by_side[one, :, other]
            pairs += [similarity[i, j] for i, j in itertools.product(range(group.size), repeat=2)
                      if state[name][one, i] == state[name][other, j] and (one != other or i < j)]
        total += group.size * sum(pairs) / len(pairs)
        count += group.size
    return total / count


@pytest.mark.parametrize("how", SOLVERS)
@pytest.mark.parametrize("alpha", [0.25, 0.75, 1.0])
def test_the_mean_similarity_never_falls_below_that_of_the_start(how: str, alpha: float) -> None:
    """Of networks that have nothing in common; and it is what it says it is."""
    kind = "plain2d"
    networks = [original(kind, seed) for seed in range(3)]
    seen = activations(kind, networks) if alpha < 1 else None
    start = identity(spec(kind), 3) if alpha == 1 else {
        name: SOLVERS[how].solve(seen[name], 3, 1).reshape(3, -1) for name in spec(kind).groups}
    found = match(spec(kind), networks, SOLVERS[how], alpha, seen)
    assert found.similarity == pytest.approx(
        plain_mean_similarity(kind, networks, found.assignments, alpha, seen, how))
    assert found.similarity >= plain_mean_similarity(kind, networks, start, alpha, seen, how)
    assert found.sweeps > 0 and set(found.assignments) == set(spec(kind).groups)


@pytest.mark.parametrize("how", SOLVERS)
def test_activations_alone_are_matched_in_one_go(how: str) -> None:
    """MuDSC, Eq. 5."""
    kind = "residual2d"
    networks = [original(kind, seed) for seed in range(2)]
    seen = activations(kind, networks)
    found = match(spec(kind), networks, SOLVERS[how], 0.0, seen)
    assert found.sweeps == 0
    for name, assignment in found.assignments.items():
        np.testing.assert_array_equal(assignment.ravel(), SOLVERS[how].solve(seen[name], 2, 1))


def test_no_two_units_would_rather_change_places() -> None:
    """Git Re-Basin of two networks that have nothing in common ends where no group alone could be matched better."""
    kind = "plain2d"
    networks = [original(kind, 0), original(kind, 1)]
    found = match(spec(kind), networks, matcher(False), 1.0, pearson=False, patience=1)
    weights = WeightSimilarity(spec(kind), networks)
    for name, (first, second) in found.assignments.items():
        similarity = weights.between(name, [(0, 1)], found.assignments, pearson=False)[:len(first), len(first):]
        matched = similarity[np.argsort(first), np.argsort(second)]
        for i, j in itertools.combinations(range(len(first)), 2):
            a, b = np.argsort(first)[[i, j]]
            c, d = np.argsort(second)[[i, j]]
            assert matched[i] + matched[j] >= similarity[a, d] + similarity[b, c] - 1e-5


def test_skipped_tensors_do_not_move_anything() -> None:
    """Of networks that have nothing in common, so that a little is enough to match other units."""
    kind = "plain2d"
    networks = [original(kind, 0), original(kind, 1)]
    heads = frozenset(name for name in networks[0] if "seg_layers" in name)
    rng = np.random.default_rng(7)
    other = [networks[0], networks[1] | {name: torch.from_numpy(rng.normal(size=networks[1][name].shape)).float()
                                         for name in heads}]
    for solver in SOLVERS.values():
        one, two = (match(spec(kind), each, solver, 1.0, skip=heads).assignments for each in (networks, other))
        assert all(np.array_equal(one[name], two[name]) for name in one)
        three = match(spec(kind), other, solver, 1.0).assignments
        assert not all(np.array_equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("how", SOLVERS)
def test_the_same_seed_finds_the_same(how: str) -> None:
    kind = "plain2d"
    networks = [original(kind, seed) for seed in range(2)]
    runs = [match(spec(kind), networks, SOLVERS[how], 1.0, seed=seed) for seed in (0, 0, 1)]
    for name, assignment in runs[0].assignments.items():
        np.testing.assert_array_equal(runs[1].assignments[name], assignment)
    assert runs[0].similarity == runs[1].similarity and runs[0].sweeps == runs[1].sweeps


def test_inputs_stay_as_they_are() -> None:
    kind = "batch3d"
    networks = [dict(original(kind, seed)) for seed in range(2)]
    before = [{name: tensor.clone() for name, tensor in network.items()} for network in networks]
    seen = activations(kind, networks)
    copies = {name: matrix.copy() for name, matrix in seen.items()}
    found = match(spec(kind), networks, zipper(0.5, 0.125), 0.5, seen)
    merged(kind, networks, found)
    assert all(torch.equal(tensor, network[name]) for network, same in zip(networks, before, strict=True)
               for name, tensor in same.items())
    assert all(np.array_equal(seen[name], copies[name]) for name in seen)


def test_matched_similarity_is_the_mean_over_pairs() -> None:
    similarity = np.random.default_rng(5).normal(size=(9, 9))
    similarity += similarity.T
    assignment = np.array([[0, 1, 1], [2, 0, 1], [0, 0, 2]])
    own, second = [similarity[1, 2]], [similarity[0, 4], similarity[1, 5], similarity[2, 5]]
    third = [similarity[0, 6], similarity[0, 7]]
    for pairs, expected in (([(0, 1)], second), ([(0, 0), (0, 1)], own + second), ([(0, 1), (0, 2)], second + third)):
        assert matched_similarity(similarity, assignment, pairs) == pytest.approx(np.mean(expected))
    assert matched_similarity(similarity, np.arange(9).reshape(3, 3), [(0, 1), (0, 2), (1, 2)]) == 0


@pytest.mark.parametrize("how", SOLVERS)
def test_pairs_of_models_that_are_looked_at(how: str) -> None:
    pairs = {pair for pair in itertools.product(range(3), repeat=2) if LOOKS_AT[how](*pair)}
    assert set(SOLVERS[how].pairs(3)) == pairs


@pytest.mark.parametrize("how", SOLVERS)
def test_what_a_method_does_not_look_at_changes_nothing(how: str) -> None:
    rng = np.random.default_rng(6)
    similarity = rng.normal(size=(3, 4, 3, 4))
    other = rng.normal(size=(3, 4, 3, 4))
    for matrix in (similarity, other):
        for one, two in itertools.combinations_with_replacement(range(3), 2):
            matrix[two, :, one] = matrix[one, :, two].T
            matrix[one, :, one] = (matrix[one, :, one] + matrix[one, :, one].T) / 2
    for one, two in SOLVERS[how].pairs(3):
        other[one, :, two] = similarity[one, :, two]
        other[two, :, one] = similarity[two, :, one]
    for blocks in (1, 2):
        np.testing.assert_array_equal(*(SOLVERS[how].solve(matrix.reshape(12, 12), 3, blocks)
                                        for matrix in (similarity, other)))


@pytest.mark.parametrize("kind", ["plain2d", "residual3d"])
def test_git_re_basin_never_loses_of_its_objective(kind: str) -> None:
    """The sum over all tensors of the inner products of both models, each tensor once, of unrelated networks: every
    assignment is the best for its group, so that one sweep more is never worse."""
    networks = [original(kind), original(kind, 1)]
    reached = []
    with pytest.MonkeyPatch.context() as patch:
        for sweeps in range(4):
            patch.setattr(dual, "MOST_SWEEPS", sweeps)
            found = match(spec(kind), networks, matcher(False), 1.0, pearson=False, patience=9)
            scaled = [canonical_scale(network, spec(kind)) for network in networks]
            other = moved(scaled[1], spec(kind), found.assignments, 1)
            counted = {segment.tensor for group in spec(kind).groups.values() for segment in group.segments
                       if segment.counts}
            reached.append(sum(float((scaled[0][name].double() * other[name].double()).sum()) for name in counted))
    assert reached == sorted(reached) and reached[0] < reached[1] < reached[-1]
