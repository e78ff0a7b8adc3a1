"""Methods on the singular values of task matrices.

A convolution's kernel is a matrix of shape (out, in x kernel), a transposed convolution's, as torch stores it,
(in, out x kernel): the transpose of what it does, with the same singular values.
"""
from collections.abc import Sequence
from typing import Annotated

import torch

from nnunet_transplant.methods.registry import FREE_SUM, Lambda, method
from nnunet_transplant.steps import Range
from nnunet_transplant.vectors import Tensors, added_up

Decomposition = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U, S, V with U diag(S) V^T

NEGLIGIBLE = 1e-7  # singular values below this share of the largest are rounding errors of float32


def thin_svd(matrix: torch.Tensor, smallest: float = 0.0) -> Decomposition:
    """U, S, V with matrix = U diag(S) V^T, the largest first, without those that are only rounding errors or not above
    `smallest`; float64.

    From the eigenvectors of the smaller Gram matrix: kernels are much wider than high.
    """
    matrix = matrix.double()
    if matrix.shape[0] > matrix.shape[1]:
        V, S, U = thin_svd(matrix.T, smallest)
        return U, S, V
    values, U = torch.linalg.eigh(matrix @ matrix.T)
    S, U = values.clamp(min=0).sqrt().flip(0), U.flip(1)
    large = (NEGLIGIBLE * S[:1]).clamp(min=smallest) < S
    S, U = S[large], U[:, large]
    return U, S, (matrix.T @ U) / S


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix of orthonormal columns nearest to this one (its polar factor): U V^T of its SVD."""
    U, _, V = thin_svd(matrix)
    return U @ V.T


def as_matrices(tensors: Tensors) -> list[torch.Tensor]:
    """The weighted task vectors w_t tau_t of one tensor as matrices; none where it is no matrix (norms, biases)."""
    if tensors.theta_0.dim() < 2 or 0 in tensors.theta_0.shape:
        return []
    return [(weight * tau).reshape(len(tau), -1) for tau, weight in zip(tensors.taus, tensors.weights, strict=True)]


def added(tensors: Tensors, matrix: torch.Tensor, scale: float) -> torch.Tensor:
    return tensors.theta_0 + scale * matrix.reshape(tensors.theta_0.shape).float()


def mean_added(tensors: Tensors, scale: float) -> torch.Tensor:
    """What the papers do with tensors that are no matrices: theta_0 + lambda times the mean of the w_t tau_t."""
    total = added_up([weight * tau for tau, weight in zip(tensors.taus, tensors.weights, strict=True)])
    return tensors.theta_0 + scale / len(tensors.taus) * total


@method("tsv_m", "task singular vectors: each task's largest ones, made orthogonal to those of the others",
        reference="Task Singular Vectors: Reducing Task Interference in Model Merging, Gargiulo et al., CVPR 2025",
        url="https://arxiv.org/abs/2412.00081", weights=FREE_SUM, needs=("base",))
def tsv_m(tensors: Tensors, lambda_: Lambda = 1.0) -> torch.Tensor:
    """Every task keeps the 1/T share of its largest singular values; the singular vectors of all tasks together are
    replaced by the nearest orthonormal ones, so that tasks do not disturb each other."""
    matrices = as_matrices(tensors)
    if not matrices:
        return mean_added(tensors, lambda_)
    rank = max(1, min(matrices[0].shape) // len(matrices))
    U, S, V = concatenated([cut(thin_svd(matrix), rank) for matrix in matrices])
    return added(tensors, nearest_orthogonal(U) * S @ nearest_orthogonal(V).T, lambda_)


@method("iso_c", "isotropic merging: the sum of the task matrices with one singular value for all directions",
        reference="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Marczak et "
        "al., ICML 2025", url="https://arxiv.org/abs/2502.04959", weights=FREE_SUM, needs=("base",))
def iso_c(tensors: Tensors, lambda_: Lambda = 1.0) -> torch.Tensor:
    """The sum of the task matrices with all its singular values replaced by their mean."""
    matrices = as_matrices(tensors)
    if not matrices:
        return mean_added(tensors, lambda_)
    U, S, V = thin_svd(added_up(matrices))
    mean = S.sum() / min(matrices[0].shape)  # those left out count as zero
    return added(tensors, mean * U @ V.T, lambda_)


@method("iso_cts", "isotropic merging in the common subspace and in one of each task's own",
        reference="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Marczak et "
        "al., ICML 2025", url="https://arxiv.org/abs/2502.04959", weights=FREE_SUM, needs=("base",))
def iso_cts(tensors: Tensors,
            common: Annotated[float, "share of the rank given to the common subspace", Range(0.0, 1.0)] = 0.8,
            lambda_: Lambda = 1.0) -> torch.Tensor:
    """The largest singular vectors of the sum (a share `common` of its rank), and in equal numbers those of every task
    outside their span, all made orthonormal, with the mean of their singular values for all."""
    matrices = as_matrices(tensors)
    if not matrices:
        return mean_added(tensors, lambda_)
    full = min(matrices[0].shape)
    each = min(round((full - int(common * full)) / len(matrices)), full // len(matrices))
    matrices = [matrix.double() for matrix in matrices]
    total = added_up(matrices)
    shared = cut(thin_svd(total), full - each * len(matrices))
    rounding = NEGLIGIBLE * max(float(matrix.norm()) for matrix in (total, *matrices))
    outside = (matrix - shared[0] @ (shared[0].T @ matrix) for matrix in matrices)
    U, S, V = concatenated([shared, *(cut(thin_svd(matrix, rounding), each) for matrix in outside)])
    mean = S.sum() / full
    return added(tensors, mean * nearest_orthogonal(U) @ nearest_orthogonal(V).T, lambda_)


def cut(decomposition: Decomposition, rank: int) -> Decomposition:
    U, S, V = decomposition
    return U[:, :rank], S[:rank], V[:, :rank]


def concatenated(decompositions: Sequence[Decomposition]) -> Decomposition:
    U, S, V = zip(*decompositions, strict=True)
    return torch.cat(U, 1), torch.cat(S), torch.cat(V, 1)

