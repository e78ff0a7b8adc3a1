"""Matching whole networks: MuDSC's sweeps over the layers, in which weights and activations both have a say.

Methods differ in the space they compare units in (alpha: 1 weights, 0 activations, between them both), and in what
they do with the similarities: align gives every unit one of each other model, zip joins the most similar first.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from nnunet_transplant.alignment.matching import align_many, as_assignment, zip_units
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weights import Assignments, Network, WeightSimilarity, identity

MOST_SWEEPS = 100
PATIENCE = 5  # sweeps without a better mean matched similarity

Solve = Callable[[np.ndarray, int, int], np.ndarray]  # similarity (N D, N D), models, blocks -> assignment (N D,)


def aligned(to_mean: bool) -> Solve:
    """Every unit with one of each other model: matched to the first model, or to the mean of the others."""
    return lambda similarity, models, blocks: as_assignment(align_many(similarity, models, blocks, to_mean=to_mean))


def zipped(decay: float, budget: float) -> Solve:
    return lambda similarity, models, blocks: zip_units(similarity, models, decay, budget, blocks=blocks)


@dataclass(frozen=True)
class Matching:
    """Which units of the models belong together."""
    assignments: Assignments
    similarity: float   # the mean over units of how similar they are to those they are matched with
    sweeps: int


def match(spec: Spec, networks: Sequence[Network], solve: Solve, alpha: float,
          activations: Mapping[str, np.ndarray] | None = None, seed: int = 0, skip: frozenset[str] = frozenset(),
          pearson: bool = True, patience: int = PATIENCE, progress: bool = False) -> Matching:
    """MuDSC's Eq. 8: P_l = Psi(alpha C(Z_l) + (1 - alpha) C(A_l)), layer by layer in a random order, until the mean
    matched similarity has not risen for `patience` sweeps; the best state counts.

    activations: C(A) of every group, (N D, N D); the start is its match, or without it the identity.
    skip: tensors whose weights say nothing (see WeightSimilarity).
    """
    models = len(networks)
    state = identity(spec, models)
    if activations is not None:
        state = {name: solve(activations[name], models, group.blocks).reshape(models, -1)
                 for name, group in spec.groups.items()}
    if alpha == 0:
        score = _mean(spec, {name: matched_similarity(activations[name], state[name]) for name in spec.groups})
        return Matching(state, score, 0)
    weights = WeightSimilarity(spec, networks, skip)

    def similarity(name: str) -> np.ndarray:
        found = full(weights, name, state, pearson)
        return found if alpha == 1 else alpha * found + (1 - alpha) * activations[name]

    def score() -> float:
        return _mean(spec, {name: matched_similarity(similarity(name), state[name]) for name in spec.groups})

    best = Matching(dict(state), score(), 0)
    rng = np.random.default_rng(seed)
    with tqdm(desc="matching", unit=" sweeps", delay=3, disable=not progress) as bar:
        for sweep in range(1, MOST_SWEEPS + 1):
            before = dict(state)
            for name in rng.permutation(list(spec.groups)):
                state[name] = solve(similarity(name), models, spec.groups[name].blocks).reshape(models, -1)
            bar.update()
            now = score()
            bar.set_postfix_str(f"mean similarity {now:.4f}", refresh=False)
            if now > best.similarity + 1e-9 * abs(best.similarity):
                best = Matching(dict(state), now, sweep)
            if sweep - best.sweeps >= patience or all(np.array_equal(before[name], state[name]) for name in state):
                break
    return best


def full(weights: WeightSimilarity, name: str, state: Assignments, pearson: bool = True) -> np.ndarray:
    """(N D, N D): the weight similarities of all units of all models, by blocks of two models each."""
    blocks = [[None] * weights.models for _ in range(weights.models)]
    for one in range(weights.models):
        for other in range(one, weights.models):
            blocks[one][other] = weights.between(name, one, other, state, pearson)
            blocks[other][one] = blocks[one][other].T
    return np.block(blocks)


def matched_similarity(similarity: np.ndarray, assignment: np.ndarray) -> float:
    """The mean over pairs of different units that are matched; 0 where there are none."""
    together = assignment.ravel()[:, None] == assignment.ravel()
    np.fill_diagonal(together, False)
    return float(similarity[together].mean()) if together.any() else 0.0


def _mean(spec: Spec, values: Mapping[str, float]) -> float:
    """Over units, so that a group counts by its size."""
    sizes = {name: group.size for name, group in spec.groups.items()}
    return sum(values[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))
