"""Methods on the singular values of task matrices.

A convolution's kernel is a matrix of shape (out, in x kernel), a transposed convolution's, as torch stores it,
(in, out x kernel): the transpose of what it does, with the same singular values.
"""
from collections.abc import Sequence

import torch

from nnunet_transplant.merging.registry import FREE_SUM, LAMBDA, Method, Parameter, register
from nnunet_transplant.merging.vectors import Tensors

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
    total = sum(weight * tau for tau, weight in zip(tensors.taus, tensors.weights, strict=True))
    return tensors.theta_0 + scale / len(tensors.taus) * total


def tsv_m(tensors: Tensors, state: None, **parameters: float) -> torch.Tensor:
    """Every task keeps the 1/T share of its largest singular values; the singular vectors of all tasks together are
    replaced by the nearest orthonormal ones, so that tasks do not disturb each other."""
    matrices = as_matrices(tensors)
    if not matrices:
        return mean_added(tensors, parameters["lambda"])
    rank = max(1, min(matrices[0].shape) // len(matrices))
    U, S, V = concatenated([cut(thin_svd(matrix), rank) for matrix in matrices])
    return added(tensors, nearest_orthogonal(U) * S @ nearest_orthogonal(V).T, parameters["lambda"])


def iso_c(tensors: Tensors, state: None, **parameters: float) -> torch.Tensor:
    """The sum of the task matrices with all its singular values replaced by their mean."""
    matrices = as_matrices(tensors)
    if not matrices:
        return mean_added(tensors, parameters["lambda"])
    U, S, V = thin_svd(sum(matrices))
    mean = S.sum() / min(matrices[0].shape)  # those left out count as zero
    return added(tensors, mean * U @ V.T, parameters["lambda"])


def iso_cts(tensors: Tensors, state: None, common: float, **parameters: float) -> torch.Tensor:
    """The largest singular vectors of the sum (a share `common` of its rank), and in equal numbers those of every task
    outside their span, all made orthonormal, with the mean of their singular values for all."""
    matrices = as_matrices(tensors)
    if not matrices:
        return mean_added(tensors, parameters["lambda"])
    full = min(matrices[0].shape)
    each = min(round((full - int(common * full)) / len(matrices)), full // len(matrices))
    matrices = [matrix.double() for matrix in matrices]
    total = sum(matrices)
    shared = cut(thin_svd(total), full - each * len(matrices))
    rounding = NEGLIGIBLE * max(float(matrix.norm()) for matrix in (total, *matrices))
    outside = (matrix - shared[0] @ (shared[0].T @ matrix) for matrix in matrices)
    U, S, V = concatenated([shared, *(cut(thin_svd(matrix, rounding), each) for matrix in outside)])
    mean = S.sum() / full
    return added(tensors, mean * nearest_orthogonal(U) @ nearest_orthogonal(V).T, parameters["lambda"])


def cut(decomposition: Decomposition, rank: int) -> Decomposition:
    U, S, V = decomposition
    return U[:, :rank], S[:rank], V[:, :rank]


def concatenated(decompositions: Sequence[Decomposition]) -> Decomposition:
    U, S, V = zip(*decompositions, strict=True)
    return torch.cat(U, 1), torch.cat(S), torch.cat(V, 1)


register(Method(
    name="tsv_m", summary="task singular vectors: each task's largest ones, made orthogonal to those of the others",
    reference="Task Singular Vectors: Reducing Task Interference in Model Merging, Gargiulo et al., CVPR 2025",
    merge=tsv_m, weights_rule=FREE_SUM, parameters=(LAMBDA,)))
register(Method(
    name="iso_c", summary="isotropic merging: the sum of the task matrices with one singular value for all directions",
    reference="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Marczak et al., "
              "ICML 2025",
    merge=iso_c, weights_rule=FREE_SUM, parameters=(LAMBDA,)))
register(Method(
    name="iso_cts", summary="isotropic merging in the common subspace and in one of each task's own",
    reference="No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, Marczak et al., "
              "ICML 2025",
    merge=iso_cts, weights_rule=FREE_SUM,
    parameters=(Parameter("common", 0.8, "share of the rank given to the common subspace", 0.0, 1.0), LAMBDA)))
