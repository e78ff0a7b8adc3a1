"""Matching whole networks: MuDSC's sweeps over the layers, in which weights and activations both have a say.

Methods differ in the space they compare units in (alpha: 1 weights, 0 activations, between them both), and in what
they do with the similarities: align gives every unit one of each other model, zip joins the most similar first.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

import numpy as np
from tqdm import tqdm

from nnunet_transplant.alignment.matching import align_many, as_assignment, zip_units
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weight_space import Assignments, WeightSimilarity, identity
from nnunet_transplant.architecture import Network

MOST_SWEEPS = 100
PATIENCE = 5  # sweeps without a better mean matched similarity


@dataclass(frozen=True)
class Solver:
    """What makes an assignment (N D,) of the similarities (N D, N D) of N models' units.

    pairs: the pairs of models whose similarities it looks at; the others may be anything.
    """
    solve: Callable[[np.ndarray, int, int], np.ndarray]  # similarity, models, blocks
    pairs: Callable[[int], list[tuple[int, int]]]


def matcher(to_mean: bool) -> Solver:
    """Every unit with one of each other model: matched to the first model, or to the mean of the others."""
    def solve(similarity: np.ndarray, models: int, blocks: int) -> np.ndarray:
        return as_assignment(align_many(similarity, models, blocks, to_mean=to_mean))

    def pairs(models: int) -> list[tuple[int, int]]:
        return list(combinations(range(models), 2)) if to_mean else [(0, n) for n in range(1, models)]
    return Solver(solve, pairs)


def zipper(decay: float, budget: float) -> Solver:
    return Solver(lambda similarity, models, blocks: zip_units(similarity, models, decay, budget, blocks=blocks),
                  lambda models: list(combinations_with_replacement(range(models), 2)))


@dataclass(frozen=True)
class Matching:
    """Which units of the models belong together."""
    assignments: Assignments
    similarity: float   # the mean over units of how similar they are to those they are matched with
    sweeps: int


def match(spec: Spec, networks: Sequence[Network], solver: Solver, alpha: float,
          activations: Mapping[str, np.ndarray] | None = None, seed: int = 0, skip: frozenset[str] = frozenset(),
          pearson: bool = True, patience: int = PATIENCE, progress: bool = False) -> Matching:
    """MuDSC's Eq. 8: P_l = Psi(alpha C(Z_l) + (1 - alpha) C(A_l)), layer by layer in a random order, until the mean
    matched similarity has not risen for `patience` sweeps; the best state counts.

    activations: C(A) of every group, (N D, N D); the start is its match, or without it the identity.
    skip: tensors whose weights say nothing (see WeightSimilarity).
    """
    models = len(networks)
    pairs = solver.pairs(models)
    state = identity(spec, models)
    weights = None if alpha == 0 else WeightSimilarity(spec, networks, skip)

    def similarity(name: str) -> np.ndarray:
        parts = []
        if weights is not None:
            parts.append(alpha * weights.between(name, pairs, state, pearson))
        if alpha < 1:
            assert activations is not None
            parts.append((1 - alpha) * activations[name])
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def solve(name: str, similarities: np.ndarray) -> np.ndarray:
        return solver.solve(similarities, models, spec.groups[name].blocks).reshape(models, -1)

    def score() -> float:
        """Over units, so that a group counts by its size."""
        sizes = {name: group.size for name, group in spec.groups.items()}
        matched = {name: matched_similarity(similarity(name), state[name], pairs) for name in sizes}
        return sum(matched[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))

    if activations is not None:
        state = {name: solve(name, activations[name]) for name in spec.groups}
    if alpha == 0:
        return Matching(state, score(), 0)

    best = Matching(dict(state), score(), 0)
    rng = np.random.default_rng(seed)
    with tqdm(desc="matching", unit=" sweeps", delay=3, disable=not progress) as bar:
        for sweep in range(1, MOST_SWEEPS + 1):
            before = dict(state)
            for name in rng.permutation(list(spec.groups)):
                state[name] = solve(name, similarity(name))
            bar.update()
            now = score()
            bar.set_postfix_str(f"mean similarity {now:.4f}", refresh=False)
            if now > best.similarity + 1e-9 * abs(best.similarity):
                best = Matching(dict(state), now, sweep)
            if sweep - best.sweeps >= patience or all(np.array_equal(before[name], state[name]) for name in state):
                break
    return best


def matched_similarity(similarity: np.ndarray, assignment: np.ndarray, pairs: Sequence[tuple[int, int]]) -> float:
    """The mean over pairs of different units, of these pairs of models, that an assignment (N, D) brings together; 0
    where there are none."""
    between = similarity.reshape(*assignment.shape, *assignment.shape)
    found = []
    for one, other in pairs:
        together = assignment[one][:, None] == assignment[other]
        if one == other:
            together = np.triu(together, 1)
        found.append(between[one, :, other][together])
    values = np.concatenate(found)
    return float(values.mean()) if values.size else 0.0
