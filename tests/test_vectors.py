"""What merging methods work on: task vectors by blocks, threads, ranks of entries."""
import numpy as np
import pytest
import torch
from cases import networks

from nnunet_transplant.vectors import (
    BLOCK,
    TaskVectors,
    at_least,
    blocks,
    in_parallel,
    keep_from,
    kept,
    kth_largest,
    kth_largest_magnitude,
    where_one,
)

LONG = 2 * BLOCK + 100_000  # entries, more than are sorted right away
STRIDE = 64  # kth_largest's sample of so long a vector takes every STRIDE-th entry
RANKS = (1, 2, 26, LONG // 10, LONG // 2, 3 * LONG // 4, LONG - 26, LONG - 1, LONG)
KINDS = ["normal", "constant", "zeros", "few values", "mostly zero", "heavy tails", "all magnitudes", "sorted",
         "reversed", "sample of the smallest", "sample of the largest", "sample of one value"]


def flat(vectors: TaskVectors, model: int) -> np.ndarray:
    """A whole task vector, float32."""
    return np.concatenate([tau.reshape(-1).numpy() for tau in vectors.tau(model)])


def vector(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    values = {
        "normal": lambda: rng.normal(size=LONG),
        "constant": lambda: np.full(LONG, 3.0),
        "zeros": lambda: np.zeros(LONG),
        "few values": lambda: rng.integers(0, 4, LONG),
        "mostly zero": lambda: rng.normal(size=LONG) * (rng.random(LONG) < 0.001),
        "heavy tails": lambda: rng.standard_cauchy(LONG),
        "all magnitudes": lambda: 10 ** rng.uniform(-38, 38, LONG),
        "sorted": lambda: np.sort(rng.normal(size=LONG)),
        "reversed": lambda: np.sort(rng.normal(size=LONG))[::-1],
        "sample of the smallest": lambda: np.where(np.arange(LONG) % STRIDE == 0, -1, 1) * rng.random(LONG),
        "sample of the largest": lambda: np.where(np.arange(LONG) % STRIDE == 0, 1, -1) * rng.random(LONG),
        "sample of one value": lambda: np.arange(LONG) % STRIDE,
    }[kind]()
    return values.astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_kth_largest_of_long_vectors(kind: str) -> None:
    values = vector(kind)
    before = values.copy()
    descending = np.sort(values)[::-1]
    for k in RANKS:
        assert kth_largest(values, k) == descending[k - 1]
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "mostly zero", "sample of one value"])
def test_kth_largest_magnitude_of_long_task_vectors(kind: str, dtype: torch.dtype) -> None:
    """Tensors of all sizes, one of them none, one of them longer than a block."""
    shapes = [(7,), (0, 3), (BLOCK + 1,), (3, BLOCK // 3), (1,)]
    shapes.append((LONG - sum(int(np.prod(shape)) for shape in shapes),))
    parts = torch.from_numpy(vector(kind)).to(dtype).split([int(np.prod(shape)) for shape in shapes])
    theta = {str(index): part.reshape(shape) for index, (part, shape) in enumerate(zip(parts, shapes, strict=True))}
    vectors = TaskVectors({name: torch.ones_like(tensor) for name, tensor in theta.items()}, [theta], [1.0])
    descending = np.sort(abs(flat(vectors, 0)))[::-1]
    for k in RANKS:
        assert kth_largest_magnitude(vectors, 0, k) == descending[k - 1]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100])
def test_kth_largest_of_short_vectors(size: int) -> None:
    for values in (np.random.default_rng(size).integers(0, 6, size).astype(np.float32), np.zeros(size, np.float32)):
        for k in range(1, size + 1):
            assert kth_largest(values, k) == sorted(values, reverse=True)[k - 1]


def test_there_is_no_largest_of_nothing() -> None:
    assert kth_largest(np.zeros(0, np.float32), 1) == 0.0
    assert kth_largest_magnitude(TaskVectors({}, [{}], [1.0]), 0, 1) == 0.0


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_blocks_are_all_of_a_tensor(size: int) -> None:
    parts = list(blocks(size))
    assert [index for start, stop in parts for index in range(start, stop)] == list(range(size))
    assert all(0 < stop - start <= BLOCK for start, stop in parts)


EXTREMES = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 1.0000001, -0.9999999, 1e30, -1e30, 1e38])


def test_keep_from_is_exact() -> None:
    for smallest in [each for each in EXTREMES.abs().tolist() if each > 0]:
        expected = [entry if abs(entry) >= smallest else 0.0 for entry in EXTREMES.tolist()]
        assert keep_from(EXTREMES, smallest).tolist() == expected


def test_masks_of_floats_are_exact() -> None:
    for limit in EXTREMES:
        mask = at_least(EXTREMES, limit)
        assert mask.tolist() == [float(entry >= limit) for entry in EXTREMES]
        chosen = where_one(mask, EXTREMES, EXTREMES.flip(0))
        assert chosen.tolist() == torch.where(mask == 1, EXTREMES, EXTREMES.flip(0)).tolist()


def test_a_density_keeps_a_share_but_at_least_one() -> None:
    assert [kept(density, 10) for density in (0, 0.04, 0.14, 0.16, 0.5, 0.96, 1)] == [1, 1, 1, 2, 5, 10, 10]
    assert kept(0.1, 1) == kept(1.0, 1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_task_vectors_are_differences_in_float32(dtype: torch.dtype) -> None:
    theta_0, thetas = ([{name: tensor.to(dtype) for name, tensor in network.items()} for network in group]
                       for group in ([networks(2)[0]], networks(2)[1]))
    vectors = TaskVectors(theta_0[0], thetas, [1.0, 1.0])
    for model, theta in enumerate(thetas):
        expected = [theta[name].float() - theta_0[0][name].float() for name in vectors.names]
        assert all(map(torch.equal, vectors.tau(model), expected))
        whole = [block.taus[model] for block in vectors.blocks()]
        assert all(part.dtype == torch.float32 for part in whole)
        assert torch.equal(torch.cat(whole), torch.cat([each.reshape(-1) for each in expected]))
        for name, tau in zip(vectors.names, expected, strict=True):
            assert torch.equal(vectors.block(name).taus[model], tau)
            block = vectors.block(name, 1, 4)
            assert block.start == 1 and block.weights == [1.0, 1.0]
            assert torch.equal(block.taus[model], tau.reshape(-1)[1:4])


def test_without_a_base_there_are_only_models() -> None:
    _, thetas = networks(2)
    block = TaskVectors(None, thetas, [1.0, 1.0]).block("3", 1, 4)
    assert block.base is None and torch.equal(block.thetas[1], thetas[1]["3"][1:4])
    for asks in (lambda: block.theta_0, lambda: block.taus, lambda: TaskVectors(None, thetas, [1.0, 1.0]).theta_0):
        with pytest.raises(AssertionError, match="does not declare that it needs the base"):
            asks()


@pytest.mark.parametrize("threads", [1, 3])
def test_in_parallel_keeps_the_order_and_the_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = list(in_parallel(lambda item: (item, torch.get_num_threads()), range(20)))
        assert seen == [(item, 1) for item in range(20)]
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            list(in_parallel(lambda item: 1 / item, [1, 0, 2]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
