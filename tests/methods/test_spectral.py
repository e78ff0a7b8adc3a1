"""Methods on singular values against numpy's decomposition."""
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import merge, numpy_taus, tensors

from nnunet_transplant.methods.spectral import nearest_orthogonal, thin_svd

MATRICES = [(8, 12), (12, 8), (8, 2, 3, 3), (8, 16, 1, 1), (16, 1, 2, 2, 2), (6, 1), (1, 6), (1, 1)]
NO_MATRICES = [(1,), (5,), ()]

ZERO = 1e-6  # a smaller share of the largest singular value is zero


def polar(matrix: np.ndarray) -> np.ndarray:
    """U V^T without the directions of singular value zero, which an SVD fills in as it likes."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    large = ZERO * norm(matrix) < S
    return U[:, large] @ Vt[large]


def norm(*matrices: np.ndarray) -> float:
    return max(np.linalg.svd(matrix, compute_uv=False).max(initial=0) for matrix in matrices)


def largest(matrix: np.ndarray, rank: int, among: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `rank` largest singular values that are not zero beside `among`, and their vectors."""
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    large = ZERO * among < S[:rank]
    return U[:, :rank][:, large], S[:rank][large], Vt[:rank][large]


def plain_tsv_m(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """The published code: each task's 1/T largest, side by side, both sides made orthonormal by an SVD of their own."""
    parts = [largest(matrix, max(1, min(matrix.shape) // len(matrices)), norm(matrix)) for matrix in matrices]
    U, S, Vt = (np.concatenate([part[i] for part in parts], axis) for i, axis in ((0, 1), (1, 0), (2, 0)))
    return polar(U) @ np.diag(S) @ polar(Vt)


def plain_iso_c(matrices: Sequence[np.ndarray]) -> np.ndarray:
    total = sum(matrices)
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total)


def plain_iso_cts(matrices: Sequence[np.ndarray], common: float) -> np.ndarray:
    """Common subspace of the sum, what the tasks have outside it, all orthonormal with the mean singular value."""
    full = min(matrices[0].shape)
    each = min(round((full - int(common * full)) / len(matrices)), full // len(matrices))
    among = norm(sum(matrices), *matrices)
    shared = largest(sum(matrices), full - each * len(matrices), among)
    outside = [matrix - shared[0] @ shared[0].T @ matrix for matrix in matrices]
    parts = [shared, *(largest(matrix, each, among) for matrix in outside)]
    U, S, Vt = (np.concatenate([part[i] for part in parts], axis) for i, axis in ((0, 1), (1, 0), (2, 0)))
    return S.sum() / full * polar(U) @ polar(Vt)


def plain(name: str, matrices: Sequence[np.ndarray], **given: float) -> np.ndarray:
    return {"tsv_m": plain_tsv_m, "iso_c": plain_iso_c, "iso_cts": plain_iso_cts}[name](matrices, **given)


CASES = [("tsv_m", {}), ("iso_c", {}), ("iso_cts", {"common": 0.75}), ("iso_cts", {"common": 0.5}),
         ("iso_cts", {"common": 0.0}), ("iso_cts", {"common": 1.0})]


@pytest.mark.parametrize(("name", "given"), CASES)
@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize(("weights", "scale"), [([1.0, 1.0], 1.0), ([1.0, -0.5, 2.0], 0.7), ([1.0], 1.0)])
def test_matrices(name: str, given: dict, shape: tuple, weights: list[float], scale: float) -> None:
    theta_0, thetas = tensors(shape, len(weights))
    matrices = [weight * tau.reshape(shape[0], -1)
                for weight, tau in zip(weights, numpy_taus(theta_0, thetas), strict=True)]
    change = scale * plain(name, matrices, **given).reshape(shape)
    merged = merge(name, theta_0, thetas, weights, **given, **{"lambda": scale})
    np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "given"), CASES)
def test_matrices_of_lower_rank(name: str, given: dict) -> None:
    """Rows of zeros, a task twice, a large task of rank 1, a task vector of zero: what has no direction adds none."""
    theta_0, thetas = tensors((8, 12), 4)
    taus = [tau.astype(np.float32) for tau in numpy_taus(theta_0, thetas)]
    taus[0][:5] = 0
    taus[1] = taus[0]
    taus[2] = np.outer(np.arange(1, 9), np.arange(-5, 7)).astype(np.float32)
    taus[3][:] = 0
    for chosen in ([0], [2], [3], [0, 1], [0, 2], [2, 3], [0, 1, 2, 3]):
        matrices = [taus[index].astype(np.float64) for index in chosen]
        merged = merge(name, torch.zeros(8, 12), [torch.from_numpy(taus[index]) for index in chosen], **given)
        np.testing.assert_allclose(merged.numpy(), plain(name, matrices, **given), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts"])
@pytest.mark.parametrize("shape", NO_MATRICES)
def test_what_is_no_matrix_is_averaged(name: str, shape: tuple) -> None:
    """With weights of 1, the default: a model alone comes out, and equal models merge to themselves."""
    theta_0, thetas = tensors(shape, 3)
    for weights, scale in (([1.0, 1.0, 1.0], 1.0), ([1.0, -0.5, 2.0], 0.7)):
        change = scale / 3 * sum(weight * tau
                                 for weight, tau in zip(weights, numpy_taus(theta_0, thetas), strict=True))
        merged = merge(name, theta_0, thetas, weights, **{"lambda": scale})
        np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + change, rtol=1e-5, atol=1e-6)


def test_tsv_m_gives_equal_models_back_as_far_as_their_rank_fits() -> None:
    """Two models of half the rank lose nothing; of full rank, they keep the larger half of their singular values."""
    theta_0, thetas = tensors((8, 12), 1)
    tau = numpy_taus(theta_0, thetas)[0]
    U, S, Vt = np.linalg.svd(tau, full_matrices=False)
    half = U[:, :4] @ np.diag(S[:4]) @ Vt[:4]
    for change in (tau, half):
        model = torch.from_numpy(change).float()
        merged = merge("tsv_m", torch.zeros(8, 12), [model, model.clone()])
        np.testing.assert_allclose(merged.numpy(), half, rtol=1e-4, atol=1e-5)


def test_tsv_m_adds_tasks_that_are_orthogonal() -> None:
    """No task disturbs another where none shares a direction: their sum is the merge."""
    U = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    V = np.linalg.qr(np.random.default_rng(1).normal(size=(12, 8)))[0]
    taus = [torch.from_numpy(U[:, part] * [4, 3, 2, 1] @ V[:, part].T).float() for part in (slice(4), slice(4, 8))]
    torch.testing.assert_close(merge("tsv_m", torch.zeros(8, 12), taus), taus[0] + taus[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
@pytest.mark.parametrize("count", [1, 2])
def test_isotropic_merges_have_one_singular_value(name: str, count: int) -> None:
    """So a model alone does not come out: its directions do, all of one strength."""
    theta_0, thetas = tensors((8, 3, 3, 3), count)
    values = np.linalg.svd(numpy_taus(theta_0, [merge(name, theta_0, thetas)])[0].reshape(8, -1), compute_uv=False)
    np.testing.assert_allclose(values, values.mean(), rtol=1e-3)
    if name == "iso_c":
        total = sum(numpy_taus(theta_0, thetas)).reshape(8, -1)
        np.testing.assert_allclose(values.mean(), np.linalg.svd(total, compute_uv=False).mean(), rtol=1e-4)


def test_an_isotropic_model_alone_comes_out() -> None:
    rotation = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(12, 8)))[0].T.copy()).float()
    for name in ("iso_c", "iso_cts"):
        torch.testing.assert_close(merge(name, torch.zeros(8, 12), [3 * rotation]), 3 * rotation, rtol=1e-4, atol=1e-5)


def test_the_transpose_merges_to_the_transpose() -> None:
    """A transposed convolution's kernel is stored the other way round."""
    theta_0, thetas = tensors((6, 9), 3)
    for name in ("tsv_m", "iso_c"):  # iso_cts looks outside the span of the left vectors only, as its code does
        torch.testing.assert_close(merge(name, theta_0.T, [theta.T for theta in thetas]).T,
                                   merge(name, theta_0, thetas), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (5, 5), (1, 4), (4, 1), (1, 1), (3, 0), (0, 3), (0, 0)])
def test_thin_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, V = thin_svd(matrix)
    assert len(S) == min(shape)
    np.testing.assert_allclose(S.numpy(), np.linalg.svd(matrix.double().numpy(), compute_uv=False), rtol=1e-6)
    torch.testing.assert_close(U * S @ V.T, matrix.double(), rtol=1e-6, atol=1e-7)
    for vectors in (U, V):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(S)).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_thin_svd_leaves_out_rounding_errors(scale: float) -> None:
    """Singular values over five orders of magnitude stay and are orthonormal; those that float32 cannot know go."""
    U = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).double())[0]
    V = torch.linalg.qr(torch.randn(90, 40, generator=torch.Generator().manual_seed(1)).double())[0]
    values = scale * torch.cat([torch.logspace(0, -5, 20), torch.logspace(-9, -12, 10), torch.zeros(10)]).double()
    left, found, right = thin_svd(U * values @ V.T)
    torch.testing.assert_close(found, values[:20], rtol=1e-4, atol=0)
    for vectors in (left, right):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(20).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(nearest_orthogonal(U * values @ V.T), U[:, :20] @ V[:, :20].T, rtol=0, atol=1e-4)
