"""Similarities in weight space, and networks with their units moved or merged, against plain versions of the papers'
equations on a network whose layers are written down by hand."""
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    plans_of,
    spec_of,
    tensors_of,
)

from nnunet_transplant.alignment.matching import merge_matrix, unmerge_matrix
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.weight_space import WeightSimilarity, canonical_scale, identity, moved, restricted

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Layer:
    """A convolution of the plain U-Net of the tests."""
    weight: str
    makes: str | None                  # the group that it makes; None: a head
    reads: tuple[tuple[str, int], ...]  # groups, and where their units start among its inputs
    norm: bool = True
    transposed: bool = False           # the kernel's first axis is that of the inputs

    @property
    def bias(self) -> str:
        return self.weight.replace("weight", "bias")

    @property
    def of_norm(self) -> tuple[str, ...]:
        return tuple(self.weight.replace("all_modules.0.weight", f"all_modules.1.{part}")
                     for part in ("weight", "bias")) if self.norm else ()


E0, E1, E2 = (f"decoder.encoder.stages.{stage}.0.convs.0.all_modules.0" for stage in range(3))
D0, D1 = (f"decoder.stages.{stage}.convs.0.all_modules.0" for stage in range(2))
T0, T1, H0, H1 = "decoder.transpconvs.0", "decoder.transpconvs.1", "decoder.seg_layers.0", "decoder.seg_layers.1"
SIZES = {E0: 4, E1: 8, E2: 16, T0: 8, D0: 8, T1: 4, D1: 4}
LAYERS = [Layer(f"{E0}.weight", E0, ()), Layer(f"{E1}.weight", E1, ((E0, 0),)), Layer(f"{E2}.weight", E2, ((E1, 0),)),
          Layer(f"{T0}.weight", T0, ((E2, 0),), norm=False, transposed=True),
          Layer(f"{D0}.weight", D0, ((T0, 0), (E1, 8))),  # the skip connection comes behind what was upsampled
          Layer(f"{T1}.weight", T1, ((D0, 0),), norm=False, transposed=True),
          Layer(f"{D1}.weight", D1, ((T1, 0), (E0, 4))),
          Layer(f"{H0}.weight", None, ((D0, 0),), norm=False), Layer(f"{H1}.weight", None, ((D1, 0),), norm=False)]


def matrix(assignment: np.ndarray) -> np.ndarray:
    """U (D, D): 1 where a unit becomes a merged one; of a permutation the paper's P."""
    result = np.zeros((len(assignment), len(assignment)))
    for unit, to in enumerate(assignment):
        result[unit, to] = 1
    return result


def kernel(layer: Layer, network: Arrays) -> np.ndarray:
    """(outputs, inputs, voxels)."""
    weight = network[layer.weight]
    weight = weight.reshape(*weight.shape[:2], -1)
    return weight.swapaxes(0, 1) if layer.transposed else weight


def with_inputs(weight: np.ndarray, layer: Layer, matrices: Arrays) -> np.ndarray:
    """W U: the inputs in the order, or merged to the units, of the matrices."""
    result = weight.copy()
    for group, start in layer.reads:
        part = slice(start, start + SIZES[group])
        result[:, part] = np.einsum("oiv,ij->ojv", weight[:, part], matrices[group])
    return result


def compared(layer: Layer, network: Arrays) -> np.ndarray:
    """The kernel as it counts: before a norm each unit's has length 1."""
    weight = kernel(layer, network)
    if layer.norm:
        weight = np.stack([row / np.sqrt((row ** 2).sum()) for row in weight])
    return weight


def units_of(group: str, network: Arrays, matrices: Arrays, skip: Sequence[str]) -> list[np.ndarray]:
    """Z_l of one model in parts (D, features): what makes each unit, with its inputs as they are matched, its numbers,
    and what reads it, with its outputs as they are matched."""
    parts = []
    for layer in LAYERS:
        if layer.makes == group and layer.weight not in skip:
            weight = compared(layer, network)
            parts.append(with_inputs(weight, layer, matrices).reshape(len(weight), -1))
        if layer.makes == group:  # a bias before a norm has no effect, others do
            parts += [network[name][:, None] for name in layer.of_norm or (layer.bias,) if name not in skip]
        for read, start in layer.reads:
            if read == group and layer.weight not in skip:
                weight = compared(layer, network)[:, start:start + SIZES[group]]
                own = np.eye(len(weight)) if layer.makes is None else matrices[layer.makes]
                parts.append(np.einsum("oiv,op->ipv", weight, own).reshape(SIZES[group], -1))
    return parts


def plain_similarity(group: str, networks: Sequence[Arrays], assignments: Arrays, pearson: bool,
                     skip: Sequence[str] = ()) -> np.ndarray:
    """(N D, N D). Single numbers count by how they differ from their mean."""
    of_models = [units_of(group, network, {name: matrix(assignment[n]) for name, assignment in assignments.items()},
                          skip) for n, network in enumerate(networks)]
    of_segments = [np.concatenate(part) for part in zip(*of_models, strict=True)]
    rows = np.concatenate([part - part.mean() * (part.shape[1] == 1) for part in of_segments], axis=1)
    return np.corrcoef(rows) if pearson else rows @ rows.T


def random_assignments(kind: str, models: int, seed: int) -> dict[str, np.ndarray]:
    """Of every group and model: the merged unit of each unit. zip: merged units have any number of units of any model,
    but one at least."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, size in SIZES.items():
        if kind == "permutations":
            found[name] = np.stack([rng.permutation(size) for _ in range(models)])
        else:
            every = np.concatenate([np.arange(size), rng.integers(0, size, (models - 1) * size)])
            found[name] = rng.permutation(every).reshape(models, size)
    return found


@pytest.fixture(scope="module")
def spec() -> Spec:
    return spec_of(plans_of("plain2d"))


@pytest.fixture(scope="module")
def networks() -> list[dict[str, torch.Tensor]]:
    plans = plans_of("plain2d")
    return [tensors_of(network_of(plans, seed=seed), canonical(plans)) for seed in range(3)]


def arrays(network: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in network.items()}


PAIRS = ((0, 0), (0, 1), (1, 2), (2, 2))  # of models


def check(weights: WeightSimilarity, networks: Sequence[Mapping[str, torch.Tensor]], assignments: dict[str, np.ndarray],
          groups: Sequence[str] = tuple(SIZES), skip: Sequence[str] = ()) -> None:
    plain = [arrays(network) for network in networks]
    for group in groups:
        size = SIZES[group]
        for pearson in (True, False):
            expected = plain_similarity(group, plain, assignments, pearson, skip).reshape(3, size, 3, size)
            found = weights.between(group, PAIRS, assignments, pearson).reshape(expected.shape)
            for one, other in itertools.product(range(3), repeat=2):
                looked_at = (one, other) in PAIRS or (other, one) in PAIRS
                np.testing.assert_allclose(found[one, :, other], expected[one, :, other] * looked_at, atol=2e-6)


@pytest.mark.parametrize("kind", ["permutations", "zip"])
def test_similarity_is_that_of_all_weights_around_a_unit(spec: Spec, networks: list, kind: str) -> None:
    assert set(spec.groups) == set(SIZES)
    weights = WeightSimilarity(spec, networks)
    check(weights, networks, identity(spec, 3))
    check(weights, networks, random_assignments(kind, 3, 0))


def test_what_is_kept_follows_the_neighbours(spec: Spec, networks: list) -> None:
    """In any order of changes, also where an array is changed in place, or changed and changed back."""
    weights = WeightSimilarity(spec, networks)
    state = identity(spec, 3)
    rng = np.random.default_rng(0)
    check(weights, networks, state)
    for name in (E1, T0, D1):
        state[name] = state[name].copy()
        state[name][2] = rng.permutation(SIZES[name])
        check(weights, networks, state)
    before = state[D0].copy()
    state[D0][0] = rng.permutation(8)  # in place
    check(weights, networks, state, (T0, E1, T1, D0))
    state[D0][0] = before[0]
    check(weights, networks, state, (T0, E1, T1, D0))
    for name, new in random_assignments("zip", 3, 1).items():
        state[name] = new
    check(weights, networks, state)


def test_skipped_tensors_say_nothing(spec: Spec, networks: list) -> None:
    skip = frozenset((f"{H0}.weight", f"{H1}.weight", f"{H0}.bias", f"{H1}.bias"))
    assignments = random_assignments("permutations", 3, 2)
    check(WeightSimilarity(spec, networks, skip), networks, assignments, skip=tuple(skip))
    other = [network | {name: torch.full_like(network[name], 7.0) for name in skip} for network in networks]
    check(WeightSimilarity(spec, other, skip), networks, assignments, (D0, D1), skip=tuple(skip))


def test_what_a_norm_undoes_says_nothing(spec: Spec, networks: list) -> None:
    """The scale of each unit before an instance norm, and its bias."""
    rng = np.random.default_rng(3)
    other = []
    for network in networks:
        changed = dict(network)
        for layer in LAYERS:
            if layer.norm:
                size = SIZES[layer.makes]
                scale = torch.from_numpy(rng.uniform(0.1, 10, size)).float()
                changed[layer.weight] = network[layer.weight] * scale[:, None, None, None]
                changed[layer.bias] = torch.from_numpy(rng.normal(size=size)).float()
        other.append(changed)
    assignments = random_assignments("permutations", 3, 4)
    weights = WeightSimilarity(spec, other)
    check(weights, networks, assignments)


def test_dead_units_are_like_nothing(spec: Spec, networks: list) -> None:
    """All that makes, scales and reads the unit is zero, and its numbers are the mean."""
    dead = [dict(network) for network in networks]
    for network in dead:
        for name, axis in ((f"{E2}.weight", 0), (f"{T0}.weight", 0)):
            network[name] = network[name].clone()
            network[name].select(axis, 3).zero_()
        for layer in LAYERS[2:3]:
            for name in layer.of_norm:
                network[name] = torch.full_like(network[name], 0.5)
    assert bool(torch.isfinite(canonical_scale(dead[0], spec)[f"{E2}.weight"]).all())
    found = WeightSimilarity(spec, dead).between(E2, [(0, 1)], identity(spec, 3))[:16, 16:32]
    assert not found[3].any() and not found[:, 3].any() and np.isfinite(found).all()
    alive = np.arange(16) != 3
    assert np.abs(found[np.ix_(alive, alive)]).max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Heads of an attention: blocks of units, and queries and keys that move with them

@pytest.mark.parametrize("pearson", [True, False])
def test_rigid_segments_are_compared_block_by_block(pearson: bool) -> None:
    """Units by what they are matched by freely; their blocks by whole queries and keys in order. Of Pearson's each kind
    has the share of its segments; inner products add up to those of everything once all units of a block match."""
    models = [attention(seed) for seed in range(2)]
    plain = [arrays(model) for model in models]
    state = identity(HEADS, 2)
    state["stream"] = np.array([[2, 0, 3, 1], [1, 3, 0, 2]])
    order = [matrix(assignment) for assignment in state["stream"]]

    def rows(now: Callable) -> list[np.ndarray]:
        return [now(network, p) for network, p in zip(plain, order, strict=True)]

    def numbers(name: str) -> list[np.ndarray]:
        mean = np.mean([network[name] for network in plain])
        return [network[name][:, None] - mean for network in plain]
    free = [rows(lambda n, p: n["v"] @ p), rows(lambda n, p: n["out"].T @ p), numbers("v_bias")]
    rigid = [rows(lambda n, p: n["qk"][:6] @ p), rows(lambda n, p: n["qk"][6:] @ p), numbers("q_bias")]
    z = [np.concatenate([part[n] for part in free], axis=1) for n in range(2)]
    # three units of a block one behind the other
    heads = [np.concatenate([part[n].reshape(2, -1) for part in rigid], axis=1) for n in range(2)]
    expected = np.empty((6, 6))
    for i in range(6):
        for j in range(6):
            one, other = heads[0][i // 3], heads[1][j // 3]
            if pearson:
                expected[i, j] = np.corrcoef(z[0][i], z[1][j])[0, 1] / 2 + np.corrcoef(one, other)[0, 1] / 2
            else:
                expected[i, j] = z[0][i] @ z[1][j] + one @ other / 3
    found = WeightSimilarity(HEADS, models).between("values", [(0, 1)], state, pearson)[:6, 6:]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if not pearson:
        assert np.isclose(np.trace(found), sum(z[0][i] @ z[1][i] for i in range(6)) + (heads[0] * heads[1]).sum())


def test_queries_and_keys_move_by_whole_heads() -> None:
    model = attention(0)
    values = np.array([4, 3, 5, 1, 2, 0])  # head 0 goes to the place of head 1, with its units in another order
    result = moved(model, HEADS, {"values": np.stack([np.arange(6), values])}, 1)
    for unit, to in enumerate(values):
        assert torch.equal(result["v"][to], model["v"][unit])
        assert torch.equal(result["out"][:, to], model["out"][:, unit])
    order = [3, 4, 5, 0, 1, 2]
    assert torch.equal(result["q_bias"], model["q_bias"][order])
    assert torch.equal(result["qk"], model["qk"][[*order, *(6 + unit for unit in order)]])


def test_zipped_heads_average_their_queries_and_keys() -> None:
    """Of blocks that are zipped, every model gives one; how the units inside are joined does not matter to queries."""
    models = [attention(seed) for seed in range(2)]
    values = np.array([[0, 0, 2, 3, 4, 5], [4, 3, 3, 1, 2, 2]])  # blocks of the second model change places
    assert set(values.ravel()) == set(range(6))
    merged = sum(moved(model, HEADS, {"values": values}, n)["qk"] for n, model in enumerate(models)) / 2
    expected = (models[0]["qk"] + models[1]["qk"][[3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]]) / 2
    torch.testing.assert_close(merged, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Moving and merging

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_permutation_moves_bits(spec: Spec, networks: list, dtype: torch.dtype) -> None:
    """Every entry is found where its units went, in any type of number, and nothing else changes."""
    network = {name: tensor.to(dtype) for name, tensor in networks[0].items()} | {"count": torch.tensor(3)}
    assignments = random_assignments("permutations", 3, 5)
    result = moved(network, spec, assignments, 2)
    assert set(result) == set(network) and torch.equal(result["count"], network["count"])
    to = {name: assignment[2] for name, assignment in assignments.items()}
    for layer in LAYERS:
        before, after = (kernel(layer, {layer.weight: each[layer.weight].double().numpy()})
                         for each in (network, result))
        assert result[layer.weight].dtype == dtype
        outputs = np.arange(len(before)) if layer.makes is None else to[layer.makes]
        inputs = np.arange(before.shape[1])
        for group, start in layer.reads:
            inputs[start:start + SIZES[group]] = start + to[group]
        np.testing.assert_array_equal(after[np.ix_(outputs, inputs)], before)
        for name in (layer.bias, *layer.of_norm):
            assert torch.equal(result[name][torch.from_numpy(outputs)], network[name])


@pytest.mark.parametrize("kind", ["plain3d", "residual2d", "batch3d"])
def test_a_moved_network_does_the_same(kind: str) -> None:
    plans = plans_of(kind)
    network = tensors_of(network_of(plans), canonical(plans))
    spec = spec_of(plans)
    rng = np.random.default_rng(6)
    assignments = {name: np.stack([rng.permutation(group.size) for _ in range(2)])
                   for name, group in spec.groups.items()}
    result = moved(network, spec, assignments, 1)
    assert not torch.equal(result[f"{T0}.weight"], network[f"{T0}.weight"])
    image = image_of(plans)
    assert_close(logits(plans, LABELS, result, image), logits(plans, LABELS, network, image), 1e-5)


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("seed", [7, 8])
def test_the_mean_of_zipped_networks_is_the_papers_merged_network(spec: Spec, networks: list, models: int,
                                                                  seed: int) -> None:
    """W' = sum_n M_n^T W_n U_n, with M the mean and U the sum over the units of each merged unit."""
    assignments = random_assignments("zip", models, seed)
    result = [moved(network, spec, assignments, n) for n, network in enumerate(networks[:models])]
    merged = {name: sum(network[name].double() for network in result).numpy() / models for name in result[0]}
    means, sums = {}, {}
    for group, assignment in assignments.items():
        size = SIZES[group]
        means[group] = merge_matrix(assignment.ravel(), size).reshape(models, size, size)
        sums[group] = unmerge_matrix(assignment.ravel(), size).reshape(models, size, size)
    plain = [arrays(network) for network in networks[:models]]
    for layer in LAYERS:
        expected = 0
        vectors = dict.fromkeys((layer.bias, *layer.of_norm), 0)
        for n, network in enumerate(plain):
            weight = with_inputs(kernel(layer, network), layer, {name: m[n] for name, m in sums.items()})
            mean = np.eye(len(weight)) / models if layer.makes is None else means[layer.makes][n]
            expected = expected + np.einsum("oiv,op->piv", weight, mean)
            for name in vectors:
                vectors[name] = vectors[name] + mean.T @ network[name]
        np.testing.assert_allclose(kernel(layer, merged), expected, atol=1e-6)
        for name, vector in vectors.items():
            np.testing.assert_allclose(merged[name], vector, atol=1e-6)


def test_a_zip_of_halves_is_as_exact_as_halves_are(spec: Spec, networks: list) -> None:
    halves = [{name: tensor.half() for name, tensor in network.items()} for network in networks]
    assignments = random_assignments("zip", 3, 9)
    for n, network in enumerate(halves):
        exact = moved({name: tensor.double() for name, tensor in network.items()}, spec, assignments, n)
        for name, tensor in moved(network, spec, assignments, n).items():
            assert tensor.dtype == torch.float16
            torch.testing.assert_close(tensor.double(), exact[name], rtol=1.01 * 2 ** -11, atol=1e-7)


def test_running_statistics_of_a_zip_are_averaged() -> None:
    plans = plans_of("batch2d")
    spec = spec_of(plans)
    networks = [tensors_of(network_of(plans, seed=seed), canonical(plans)) for seed in range(2)]
    assignments = random_assignments("zip", 2, 10)
    result = [moved(network, spec, assignments, n) for n, network in enumerate(networks)]
    for layer in LAYERS[:3]:
        mean = merge_matrix(assignments[layer.makes].ravel(), SIZES[layer.makes])
        name = layer.of_norm[0].replace("weight", "running_var")
        both = np.concatenate([network[name].double().numpy() for network in networks])
        np.testing.assert_allclose(sum(network[name].double() for network in result) / 2, mean.T @ both, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Sharing a part

def test_only_units_that_shared_tensors_alone_make_are_restricted_to(spec: Spec) -> None:
    encoder = {name for name in canonical(plans_of("plain2d")).values() if name.startswith("decoder.encoder.")}
    assert set(restricted(spec, encoder).groups) == {E0, E1, E2}
    assert set(restricted(spec, encoder - {f"{E1}.weight"}).groups) == {E0, E2}
    assert set(restricted(spec, encoder - {LAYERS[2].of_norm[1]}).groups) == {E0, E1}  # it shifts them
    assert set(restricted(spec, {f"{T1}.weight", f"{T1}.bias"}).groups) == {T1}  # reading it, D1 need not be shared
    assert restricted(spec, ()).groups == {}


def test_a_residual_stream_is_shared_whole_or_not_at_all() -> None:
    plans = plans_of("residual2d")
    spec = spec_of(plans)
    stem = {name for name in canonical(plans).values() if ".stem." in name}
    first = {name for name in canonical(plans).values() if ".encoder.stages.0." in name}
    assert restricted(spec, stem).groups == {}
    inside = "decoder.encoder.stages.0.blocks.0.conv1.all_modules.0"
    assert set(restricted(spec, first).groups) == {inside}
    assert set(restricted(spec, stem | first).groups) == {inside, "decoder.encoder.stem.convs.0.all_modules.0"}
