"""Matching against brute force and a plain ZipIt!, and what must hold whatever the similarities are."""
from itertools import combinations, permutations, product

import numpy as np
import pytest

from nnunet_transplant.alignment.matching import (
    align,
    align_many,
    as_assignment,
    mean_matched,
    merge_matrix,
    unmerge_matrix,
    zip_units,
)

KINDS = [(1, False), (2, False), (3, False), (6, False), (1, True), (2, True), (3, True), (6, True)]  # blocks, rigid


def symmetric(size: int, seed: int, integers: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-3, 4, (size, size)).astype(float) if integers else rng.standard_normal((size, size))
    return (matrix + matrix.T) / 2


def block_permutations(units: int, blocks: int, rigid: bool) -> list[np.ndarray]:
    """All that keep blocks together."""
    size = units // blocks
    inside = [tuple(range(size))] if rigid else list(permutations(range(size)))
    return [np.concatenate([to * size + np.array(order) for to, order in zip(blocks_to, orders, strict=True)])
            for blocks_to in permutations(range(blocks)) for orders in product(inside, repeat=blocks)]


def copies(models: int, units: int, blocks: int, rigid: bool, noise: float, seed: int) -> tuple[np.ndarray, list]:
    """Cosine similarities of models that are permuted copies of one, and where each model's copy of unit i lies."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((units, 60))
    orders, parts = [], []
    for _ in range(models):
        size = units // blocks
        inside = [np.arange(size) if rigid else rng.permutation(size) for _ in range(blocks)]
        order = np.concatenate([to * size + inside[to] for to in rng.permutation(blocks)])
        orders.append(np.argsort(order))
        parts.append(features[order] + noise * rng.standard_normal(features.shape))
    vectors = np.concatenate(parts)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T, [order[np.argsort(orders[0])] for order in orders]


def objective(similarity: np.ndarray, of_models: list[np.ndarray]) -> float:
    units = len(of_models[0])
    return sum(similarity[n * units + of_models[n][i], m * units + of_models[m][i]]
               for n, m in combinations(range(len(of_models)), 2) for i in range(units))


def plain_zip(similarity: np.ndarray, models: int, decay: float, budget: float, keep: int) -> list[int]:
    """ZipIt! from its definition: every pair looked at before every join."""
    count = len(similarity)
    members = {i: [i] for i in range(count)}
    alike = {(i, j): similarity[i, j] for i, j in combinations(range(count), 2)}
    left = [int((count - keep) / models * budget + 1e-4)] * models

    def inside(i: int, j: int) -> set[int]:
        one, other = ({unit // (count // models) for unit in members[k]} for k in (i, j))
        return one & other

    while len(members) > keep:
        over = {pair: sum(left[model] <= 0 for model in inside(*pair)) for pair in combinations(sorted(members), 2)}
        i, j = max((pair for pair in over if over[pair] == min(over.values())),
                   key=lambda pair: (alike[pair], -pair[0], -pair[1]))
        for model in inside(i, j):
            left[model] -= 1
        members[i] += members.pop(j)
        for k in members:
            if k != i:
                alike[min(i, k), max(i, k)] = decay * min(alike[min(i, k), max(i, k)], alike[min(j, k), max(j, k)])
    order = sorted(members, key=lambda i: min(members[i]))
    return [next(n for n, i in enumerate(order) if unit in members[i]) for unit in range(count)]


def together(assignment: np.ndarray) -> np.ndarray:
    return assignment[:, None] == assignment


# align


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(("blocks", "rigid"), KINDS)
def test_align_is_the_best_of_all_permutations(blocks: int, rigid: bool, integers: bool) -> None:
    rng = np.random.default_rng(blocks)
    every = block_permutations(6, blocks, rigid)
    for _ in range(10):
        similarity = rng.integers(-2, 3, (6, 6)).astype(float) if integers else rng.standard_normal((6, 6))
        found = align(similarity, blocks, rigid)
        assert found.dtype == np.int64 and found.tolist() in [p.tolist() for p in every]
        values = [mean_matched(similarity, p) for p in every]
        assert mean_matched(similarity, found) == pytest.approx(max(values), abs=1e-12)
        if integers and blocks in (1, 6):  # of equals, the one that leaves most units in place
            staying = [sum(p == np.arange(6)) for p, value in zip(every, values, strict=True)
                       if value > max(values) - 1e-9]
            assert sum(found == np.arange(6)) == max(staying)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(("blocks", "rigid"), KINDS)
def test_what_cannot_be_told_apart_stays(blocks: int, rigid: bool, scale: float) -> None:
    assert align(np.zeros((6, 6)), blocks, rigid).tolist() == list(range(6))
    assert align(np.full((6, 6), -scale), blocks, rigid).tolist() == list(range(6))
    dominated = scale * (symmetric(6, 0) + 20 * np.eye(6))
    assert align(dominated, blocks, rigid).tolist() == list(range(6))


def test_dead_units_stay() -> None:
    """Also between many that move, and where those that are dead in the two models are not all the same."""
    rng = np.random.default_rng(0)
    units, order = 60, np.arange(60)
    live = np.arange(0, 60, 2)
    order[live] = rng.permutation(live)
    features = rng.standard_normal((units, 30))
    features[1::2] = 0
    assert (align(features @ features[order].T)[order] == np.arange(units)).all()
    features[order[4]], moved = 0, features[order]
    moved[8] = 0
    found = align(features @ moved.T)
    assert (found[1::2] == np.arange(1, 60, 2)).all()


def test_align_needs_a_finite_square_matrix_of_whole_blocks() -> None:
    for shape in ((2, 3), (4,), (0, 0), (2, 2, 2)):
        with pytest.raises(ValueError, match=r"similarity matrix of shape"):
            align(np.zeros(shape))
    for blocks in (0, -1, 4, 7):
        with pytest.raises(ValueError, match=f"{blocks} blocks"):
            align(np.zeros((6, 6)), blocks)
    for value in (np.nan, np.inf, -np.inf):
        similarity = np.zeros((3, 3), np.float32)
        similarity[1, 2] = value
        with pytest.raises(ValueError, match=rf"similarity\[1, 2\] is {value}"):
            align(similarity)
    assert align(np.ones((1, 1))).tolist() == align([[-5]], rigid=True).tolist() == [0]


# align_many


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("models", [1, 2, 3, 5])
@pytest.mark.parametrize(("blocks", "rigid"), [(1, False), (4, False), (12, False), (4, True)])
def test_permuted_copies_are_matched_back(models: int, blocks: int, rigid: bool, noise: float) -> None:
    similarity, orders = copies(models, 12, blocks, rigid, noise, seed=models)
    expected = as_assignment(orders)
    for to_mean in (False, True):
        found = align_many(similarity, models, blocks, rigid, to_mean)
        assert [p.tolist() for p in found] == [order.tolist() for order in orders]
    assert zip_units(similarity, models, 1.0, 0.0, blocks=blocks, rigid=rigid).tolist() == expected.tolist()
    if models == 2:  # pairs only: decay plays no part
        assert zip_units(similarity, models, blocks=blocks, rigid=rigid).tolist() == expected.tolist()


@pytest.mark.parametrize("models", [2, 3, 4])
@pytest.mark.parametrize(("blocks", "rigid"), KINDS)
def test_aligning_to_the_mean_is_never_worse(models: int, blocks: int, rigid: bool) -> None:
    every = block_permutations(6, blocks, rigid)
    better = 0
    for seed in range(8):
        similarity = symmetric(6 * models, seed)
        to_first = align_many(similarity, models, blocks, rigid)
        to_mean = align_many(similarity, models, blocks, rigid, to_mean=True)
        reached = objective(similarity, to_mean)
        assert reached >= objective(similarity, to_first) - 1e-9
        better += reached > objective(similarity, to_first) + 1e-9
        for found in (to_first, to_mean):
            assert found[0].tolist() == list(range(6))
            assert all(p.tolist() in [q.tolist() for q in every] for p in found)
        for n in range(models):  # no model can do better while the others stay
            others = [[*to_mean[:n], p, *to_mean[n + 1:]] for p in every[:100]]
            assert max(objective(similarity, other) for other in others) <= reached + 1e-9
    assert bool(better) == (models > 2 and len(every) > 1)
    assert [p.tolist() for p in align_many(similarity, models, blocks, rigid, to_mean=True, sweeps=0)] == [
        p.tolist() for p in to_first]


def test_two_models_the_other_way_round_are_the_inverse() -> None:
    similarity = symmetric(20, 1)
    swapped = np.roll(np.roll(similarity, 10, 0), 10, 1)
    _, there = align_many(similarity, 2)
    _, back = align_many(swapped, 2)
    assert there[back].tolist() == list(range(10))


@pytest.mark.parametrize("to_mean", [False, True])
def test_the_order_of_a_models_units_does_not_matter(to_mean: bool) -> None:
    similarity, order = symmetric(30, 2), np.arange(30)
    order[10:20] = 10 + np.random.default_rng(0).permutation(10)
    plain = align_many(similarity, 3, to_mean=to_mean)
    permuted = align_many(similarity[np.ix_(order, order)], 3, to_mean=to_mean)
    assert permuted[2].tolist() == plain[2].tolist()
    assert (order[10:20] - 10)[permuted[1]].tolist() == plain[1].tolist()


# zip_units


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize(("models", "units"), [(1, 7), (2, 1), (2, 8), (3, 6), (5, 4)])
def test_zip_is_the_plain_one(models: int, units: int, decay: float, budget: float, integers: bool) -> None:
    for seed, keep in enumerate({1, 2, units // 2 + 1, units, models * units}):
        if keep <= models * units:
            similarity = symmetric(models * units, seed, integers) + 0.3 * (seed % 2)
            unchanged = similarity.copy()
            found = zip_units(similarity, models, decay, budget, keep)
            assert found.dtype == np.int64
            assert found.tolist() == plain_zip(similarity, models, decay, budget, keep)
            assert (similarity == unchanged).all()
    assert (zip_units(similarity, models, decay, budget)
            == zip_units(similarity, models, decay, budget, units)).all()


def test_zip_reaches_any_number_of_units() -> None:
    for models, budget in ((1, 0.0), (2, 0.0), (3, 0.0), (3, 0.125)):
        similarity = symmetric(12, models)
        for keep in range(1, 13):
            found = zip_units(similarity, models, budget=budget, keep=keep)
            assert set(found.tolist()) == set(range(keep))
            firsts = [found.tolist().index(n) for n in range(keep)]
            assert firsts == sorted(firsts)


@pytest.mark.parametrize(("budget", "keep", "expected"), [
    (0.0, 3, [0, 1, 2, 0, 1, 2]),  # between the models only: 0.3, 0.2, 0.1
    (0.6, 3, [0, 1, 2, 0, 1, 2]),  # int(3 / 2 * 0.6) = 0 joins inside a model
    (0.7, 3, [0, 0, 1, 2, 2, 1]),  # one inside each model: 0.95, 0.9; then the 0.1, which beats the smallest ones, 0.05
    (0.7, 2, [0, 0, 1, 0, 0, 1]),  # then what has nothing in common: 0.05, though {0, 1} and {2, 5} are 0.05, too
    (1.0, 2, [0, 0, 0, 1, 1, 1])])  # two inside each model
def test_the_budget_by_hand(budget: float, keep: int, expected: list[int]) -> None:
    similarity = np.full((6, 6), 0.05)
    for (i, j), value in {(0, 1): 0.9, (0, 2): 0.8, (1, 2): 0.7, (3, 4): 0.95, (3, 5): 0.75, (4, 5): 0.65,
                          (0, 3): 0.3, (1, 4): 0.2, (2, 5): 0.1}.items():
        similarity[i, j] = similarity[j, i] = value
    assert zip_units(similarity, 2, 1.0, budget, keep).tolist() == expected


def test_a_unit_of_both_models_takes_no_further_one_of_either_without_a_budget() -> None:
    """0 and 2 are joined; to 1 they are then 0.4 alike, 1 and 3 are 0.1: but 0 and 1 are of one model."""
    similarity = np.array([[1, .8, .9, .1], [.8, 1, .8, .1], [.9, .8, 1, .1], [.1, .1, .1, 1]])
    assert zip_units(similarity, 2, 0.5, 0.0).tolist() == [0, 1, 0, 1]
    assert zip_units(similarity, 2, 0.5, 1.0).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("budget", [0.0, 0.125, 0.3, 1.0])
def test_joins_inside_two_models_stay_within_the_budget(budget: float) -> None:
    """Of every merged unit all but one unit of a model were joined inside it. Without a budget it is a matching."""
    units = 16
    for seed in range(20):
        found = zip_units(symmetric(2 * units, seed) + 0.5, 2, 0.9, budget).reshape(2, units)
        for of_model in found:
            assert units - len(set(of_model)) <= int(units / 2 * budget + 1e-4)
        if not budget:
            assert all(sorted(of_model) == list(range(units)) for of_model in found)


def test_three_models_go_over_the_budget_only_where_nothing_else_is_left() -> None:
    """Two units each. 0-2, 1-5 and 3-4 are joined first; any two of these then hold a model twice."""
    similarity = np.full((6, 6), 0.2)
    for (i, j), value in {(0, 2): 0.9, (1, 5): 0.9, (3, 4): 0.9, (0, 5): 0.8, (2, 5): 0.8, (1, 2): 0.8,
                          (0, 1): 0.8}.items():
        similarity[i, j] = similarity[j, i] = value
    assert zip_units(similarity, 3, 1.0, 0.0).tolist() == [0, 0, 0, 1, 1, 0]


def test_only_the_symmetric_part_counts() -> None:
    rng = np.random.default_rng(0)
    similarity, skew = symmetric(18, 0), rng.standard_normal((18, 18))
    skewed = similarity + (skew - skew.T)
    assert zip_units(skewed, 3).tolist() == zip_units(similarity, 3).tolist()
    assert [p.tolist() for p in align_many(skewed, 3)] == [p.tolist() for p in align_many(similarity, 3)]


def test_decay_by_hand() -> None:
    """0 and 1 are joined; to 2 they are then decay times 0.8 (or -0.8) alike, and 3 is 0.5 (or -0.5) alike to 2."""
    for sign, decay, expected in ((1, 1.0, [0, 0, 0, 1]), (1, 0.5, [0, 0, 1, 1]),
                                  (-1, 1.0, [0, 0, 1, 1]), (-1, 0.5, [0, 0, 0, 1])):
        similarity = np.full((4, 4), -1.0)
        for i, j, value in ((0, 1, 0.9), (0, 2, 0.85 * sign), (1, 2, 0.8 * sign), (2, 3, 0.5 * sign)):
            similarity[i, j] = similarity[j, i] = value
        if sign < 0:
            similarity[0, 2] = similarity[2, 0] = -0.7
        assert zip_units(similarity, 1, decay, keep=2).tolist() == expected


@pytest.mark.parametrize("models", [2, 3])
def test_zip_does_not_depend_on_the_order_of_units_or_models(models: int) -> None:
    units = 10
    rng = np.random.default_rng(models)
    similarity = symmetric(models * units, models) + 0.5
    for budget in (0.0, 0.125, 1.0):
        found = zip_units(similarity, models, 0.7, budget)
        for _ in range(5):
            order = np.concatenate([n * units + rng.permutation(units) for n in rng.permutation(models)])
            permuted = zip_units(similarity[np.ix_(order, order)], models, 0.7, budget)
            assert (together(permuted) == together(found)[np.ix_(order, order)]).all()


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize(("blocks", "rigid"), KINDS)
def test_zip_in_blocks(models: int, blocks: int, rigid: bool, integers: bool) -> None:
    """Blocks as align_many matches them, each zipped by the plain zip."""
    size = 6 // blocks
    for seed in range(6):
        similarity = symmetric(6 * models, seed, integers)
        found = zip_units(similarity, models, 0.5, 0.5, blocks=blocks, rigid=rigid)
        matched = as_assignment(align_many(similarity, models, blocks, rigid, to_mean=True))
        if rigid:
            assert found.tolist() == matched.tolist()
            continue
        for block in range(blocks if blocks > 1 else 0):
            members = np.flatnonzero(matched // size == block)
            expected = plain_zip(similarity[np.ix_(members, members)], models, 0.5, 0.5, size)
            assert found[members].tolist() == [block * size + n for n in expected]


def test_wrong_shapes_and_numbers() -> None:
    for function in (align_many, zip_units):
        for models in (0, 3, 8, -2):
            with pytest.raises(ValueError, match=f"{models} models"):
                function(np.zeros((4, 4)), models)
        with pytest.raises(ValueError, match="3 blocks"):
            function(np.zeros((8, 8)), 2, blocks=3)
        with pytest.raises(ValueError, match=r"similarity\[0, 1\] is nan"):
            function(np.array([[1, np.nan], [np.nan, 1]]), 2)
    for keep in (0, 5, -1):
        with pytest.raises(ValueError, match=f"keep is {keep}"):
            zip_units(np.zeros((4, 4)), 2, keep=keep)
    with pytest.raises(ValueError, match="keep is 3"):
        zip_units(np.zeros((8, 8)), 2, keep=3, blocks=2)


# matrices


def test_permutations_give_the_papers_merge() -> None:
    """M_n = P_n / N, and merging permuted copies of two layers gives the layers of the first (MuDSC, Eq. 2)."""
    rng = np.random.default_rng(0)
    models, outputs, inputs = 3, 5, 4
    out, into = ([np.arange(size), *(rng.permutation(size) for _ in range(models - 1))] for size in (outputs, inputs))
    M, U = merge_matrix(as_assignment(out), outputs), unmerge_matrix(as_assignment(into), inputs)
    for n, permutation in enumerate(out):
        P = np.zeros((outputs, outputs))
        P[permutation, np.arange(outputs)] = 1
        np.testing.assert_array_equal(M[n * outputs:(n + 1) * outputs], P / models)
    W = rng.standard_normal((outputs, inputs))
    merged = np.zeros_like(W)
    for n in range(models):
        W_n = np.empty_like(W)
        W_n[np.ix_(out[n], into[n])] = W
        merged += M[n * outputs:(n + 1) * outputs].T @ W_n @ U[n * inputs:(n + 1) * inputs]
    np.testing.assert_allclose(merged, W, atol=1e-12)


def test_sets_of_units_are_averaged_and_added_up() -> None:
    assignment = np.array([0, 0, 1, 2, 0, 2])
    assert unmerge_matrix(assignment, 3).T.tolist() == [[1, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]]
    third = 1 / 3
    assert merge_matrix(assignment, 3).T.tolist() == [
        [third, third, 0, 0, third, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0.5, 0, 0.5]]
    for keep in (2, 4):
        with pytest.raises(ValueError, match=f"merged units 0 to {keep - 1}"):
            merge_matrix(assignment, keep)
