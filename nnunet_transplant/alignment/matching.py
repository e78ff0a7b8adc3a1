"""Which units of several models belong together, from the similarities of all pairs of units.

N models have D units each (the channels of one layer). A similarity matrix holds all of them, model by model: unit i of
model n is row n D + i of a matrix (N D, N D), the paper's C_l (MuDSC, CVPR 2024, Sec. 3.1). The larger an entry, the
more alike the units. What is found is the paper's P_l, Eq. 1: one permutation for each model (align, Git Re-Basin,
ICLR 2023), or sets of units that may differ in size and hold several units of one model (zip_units, ZipIt!, ICLR 2024).

Group structure (Sec. 3.3): with `blocks` > 1, units lie in so many blocks of D / blocks consecutive units that stay
together (the groups of a group normalisation, the heads of an attention). `rigid` blocks keep their units' order, too.
"""
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

RELATIVE = 1e-9  # of the largest similarity: what is closer than this counts as equal


def align(similarity: np.ndarray, blocks: int = 1, rigid: bool = False) -> np.ndarray:
    """The permutation p (D,), int64, with the largest sum_i similarity[i, p[i]], of a matrix (D, D) of the units of one
    model by those of another; among equals the one that leaves most units where they are.

    With blocks this is group alignment (MuDSC, Fig. 2), which is optimal, too: units are aligned for every pair of
    blocks, then blocks, by the mean similarity of their aligned units. One rigid block stays as it is.
    Raises ValueError for a matrix that is not square or not finite, or a D that is no multiple of blocks."""
    similarity = _checked(similarity, blocks, "blocks")
    size = len(similarity) // blocks
    if size == 1 or (blocks == 1 and not rigid):
        return _assign(similarity)
    parts = similarity.reshape(blocks, size, blocks, size).swapaxes(1, 2)
    if rigid:
        inside = np.broadcast_to(np.arange(size), (blocks, blocks, size))
    else:
        inside = np.array([[_assign(part) for part in row] for row in parts])
    values = np.take_along_axis(parts, inside[..., None], axis=3).mean(axis=(2, 3))
    to = _assign(values)
    return (to[:, None] * size + inside[np.arange(blocks), to]).reshape(-1)


def mean_matched(similarity: np.ndarray, permutation: np.ndarray) -> float:
    """mean_i similarity[i, p[i]]."""
    return float(similarity[np.arange(len(permutation)), permutation].mean())


def align_many(similarity: np.ndarray, models: int, blocks: int = 1, rigid: bool = False, to_mean: bool = False,
               sweeps: int = 100) -> list[np.ndarray]:
    """A permutation p_n (D,) for each of N models, of a symmetric matrix (N D, N D): unit i of the common order is unit
    p_n[i] of model n. The common order is the first model's: p_0 is the identity.

    Each model is aligned to the first. With to_mean (Git Re-Basin, Algorithm 3) models are then aligned in turn to the
    mean of the others as they are permuted now, until no model moves in a whole sweep: the sum over all pairs of models
    of their matched similarities only ever rises. Raises ValueError like align."""
    between = _between_models(similarity, models)
    permutations = [np.arange(between.shape[1]), *(align(between[0, :, n], blocks, rigid) for n in range(1, models))]
    for _ in range(sweeps if to_mean and models > 2 else 0):
        moved = False
        for n in range(models):
            others = [between[m, permutations[m], n] for m in range(models) if m != n]
            to_others = np.mean(others, axis=0)  # similarity to the mean: the mean of the similarities
            found = align(to_others, blocks, rigid)
            gain = mean_matched(to_others, found) - mean_matched(to_others, permutations[n])
            if gain > RELATIVE * abs(to_others).max():  # rounding alone must not keep models moving
                permutations[n], moved = found, True
        if not moved:
            break
    first = np.argsort(permutations[0])
    return [permutation[first] for permutation in permutations]


def zip_units(similarity: np.ndarray, models: int, decay: float = 0.5, budget: float = 1.0, keep: int | None = None,
              blocks: int = 1, rigid: bool = False) -> np.ndarray:
    """The merged unit 0 ... keep - 1 (keep: D unless told) of every unit of all models: (N D,), int64, of a symmetric
    matrix (N D, N D).

    ZipIt!'s greedy merging: the most similar pair of units is joined until `keep` units are left. The joined unit's
    similarity to another is the smaller one of its two parts', times decay (the paper's alpha; of negative ones, too).
    Of equally similar pairs i < j the one with the smallest i is joined, then with the smallest j: the numbers of the
    units' smallest members, whose order is also that of the merged units.

    A join is one inside a model where both of its units hold units of that model; it is one inside each such model.
    Each model has a budget of them (the paper's beta): int((N D - keep) / N budget + 1e-4). Where it is used up, pairs
    that would make a further one are passed over, so that with budget 0 no two units of a model meet, and a zip to D is
    a matching. With three models or more, a keep below D or a single model, it can come to where every pair left is
    such a pair: then the most similar of those are joined that go over the budgets of the fewest models.

    With blocks this is group zip (Sec. 3.3): align_many, to the mean, says which blocks belong together, and the units
    of each set of blocks are zipped by themselves, D / blocks of them kept: merged units lie in blocks as the first
    model's do. In rigid blocks units are merged in order.
    Raises ValueError like align, and for a `keep` that is not from 1 to N D, or not D with blocks."""
    between = _between_models(similarity, models)
    units = between.shape[1]
    keep = units if keep is None else keep
    if not 1 <= keep <= models * units:
        raise ValueError(f"keep is {keep}: there are {models * units} units to merge")
    if blocks == 1 and not rigid:
        return _zip(between.reshape(models * units, -1), models, decay, budget, keep)
    if keep != units:
        raise ValueError(f"keep is {keep}: blocks are merged to as many units as one model has, {units}")
    permutations = align_many(similarity, models, blocks, rigid, to_mean=True)
    if rigid:
        return as_assignment(permutations)
    merged = np.empty(models * units, np.int64)
    size = units // blocks
    for start in range(0, units, size):
        members = np.concatenate([n * units + np.sort(permutation[start:start + size])
                                  for n, permutation in enumerate(permutations)])
        part = between.reshape(models * units, -1)[np.ix_(members, members)]
        merged[members] = start + _zip(part, models, decay, budget, size)
    return merged


def as_assignment(permutations: Sequence[np.ndarray]) -> np.ndarray:
    """The merged unit of every unit of all models (N D,) that permutations like align_many's give: the merged unit of
    unit p_n[i] of model n is i."""
    return np.concatenate([np.argsort(permutation) for permutation in permutations])


def unmerge_matrix(assignment: np.ndarray, keep: int) -> np.ndarray:
    """U (N D, keep): 1 where a unit belongs to a merged unit, else 0. It adds up the inputs of a layer: rows n D to
    (n + 1) D are U_n, and merged weights are W' = sum_n M_n^T W_n U_n, with M_n of the outputs and U_n of the inputs.
    From permutations come permutation matrices U_n = P_n and M_n = P_n / N: MuDSC, Eq. 2.
    Raises ValueError where a merged unit has no members, or members have no such merged unit."""
    if set(assignment.tolist()) != set(range(keep)):
        raise ValueError(f"the assignment does not use each of the merged units 0 to {keep - 1}, and no others")
    return np.eye(keep)[assignment]


def merge_matrix(assignment: np.ndarray, keep: int) -> np.ndarray:
    """M (N D, keep), whose columns each sum to 1: it averages the outputs of the units of each merged unit."""
    unmerge = unmerge_matrix(assignment, keep)
    return unmerge / unmerge.sum(axis=0)


def _checked(similarity: np.ndarray, parts: int, name: str) -> np.ndarray:
    """The square matrix in float64, whose size is a multiple of `parts`."""
    shape = np.shape(similarity)
    if len(shape) != 2 or shape[0] != shape[1] or parts < 1 or shape[0] < parts or shape[0] % parts:
        raise ValueError(f"a similarity matrix of shape {shape} does not fit {parts} {name} of equal size")
    similarity = np.asarray(similarity, np.float64)
    if not np.isfinite(similarity).all():
        i, j = np.argwhere(~np.isfinite(similarity))[0]
        raise ValueError(f"similarity[{i}, {j}] is {similarity[i, j]}")
    return similarity


def _between_models(similarity: np.ndarray, models: int) -> np.ndarray:
    """The similarities as (N, D, N, D), a copy, exactly symmetric: a product A A^T may miss it by rounding."""
    similarity = _checked(similarity, models, "models")
    return ((similarity + similarity.T) / 2).reshape(models, -1, models, len(similarity) // models)


def _assign(similarity: np.ndarray) -> np.ndarray:
    """The linear assignment of a square matrix."""
    # Ties are common: a dead unit has similarity 0 to every other. The solver breaks them anyhow; a bonus on the
    # diagonal leaves such units in place, and is far below what tells units apart, far above rounding in float64.
    bonus = RELATIVE * (abs(similarity).max() or 1.0)
    return linear_sum_assignment(similarity + bonus * np.eye(len(similarity)), maximize=True)[1]


def _zip(similarity: np.ndarray, models: int, decay: float, budget: float, keep: int) -> np.ndarray:
    """zip_units without blocks; overwrites the matrix."""
    count = len(similarity)
    merged = np.arange(count)  # of every unit, the smallest member of the unit that it is part of
    alive = np.ones(count, bool)
    holds = np.repeat(np.eye(models, dtype=bool), count // models, axis=1)  # [n, i]: unit i holds units of model n
    joins_left = np.full(models, int((count - keep) / models * budget + 1e-4))
    over = 0  # of how many models a join may go over the budget. It never falls: units only come to hold more models
    # Not less than the similarity of unit i to the most similar j > i. Exact values cost a search of a row each; this
    # way only rows that come up as the most similar are searched, once or twice for a join and not all of them.
    bound: np.ndarray = np.full(count, np.inf)
    for _ in range(count - keep):
        while True:
            i = int(bound.argmax())  # the first of equals: no row before it reaches this bound
            if bound[i] == -np.inf:
                over, bound = over + 1, np.where(alive, np.inf, -np.inf)
                continue
            allowed = alive[i + 1:]
            spent = np.flatnonzero(holds[:, i] & (joins_left <= 0))
            if len(spent) > over:
                allowed = allowed & (holds[spent, i + 1:].sum(0, dtype=np.int16) <= over)
            row = np.where(allowed, similarity[i, i + 1:], -np.inf)
            best = row.max(initial=-np.inf)
            if best == bound[i]:
                break
            bound[i] = best
        j = i + 1 + int(row.argmax())
        joins_left -= holds[:, i] & holds[:, j]
        holds[:, i] |= holds[:, j]
        alive[j] = False
        merged[merged == j] = i
        joined = decay * np.minimum(similarity[i], similarity[j])
        similarity[i] = similarity[:, i] = joined
        bound[j] = -np.inf
        bound[i] = np.inf  # to be searched
        bound[:i] = np.where(alive[:i], np.maximum(bound[:i], joined[:i]), -np.inf)
    return np.unique(merged, return_inverse=True)[1]
