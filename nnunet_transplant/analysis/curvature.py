"""How sharply a model's risk rises around it: the empirical Fisher's diagonal and the Hessian (U-Net Transplant,
Sec. 2.2).

Hessian-vector products are made by differentiating twice in reverse. curvlinops, and `torch.func`, go forward over
reverse: of the instance norms in nnU-Net's networks torch's forward derivative of the backward pass is wrong without a
word (pytorch issue 196699; a tenth of the Hessian's largest entries and more).
"""
from collections.abc import Mapping

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from nnunet_transplant.analysis.risk import Risk
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.vectors import added_up

TOLERANCE = 1e-3  # of eigenvalues, relative


def fisher_diagonal(risk: Risk) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information by tensor name: the mean over patches of the squared gradient of
    each patch's loss. Its sum is the trace, the mean squared length of the gradient (Kunstner et al., NeurIPS 2019)."""
    parameters = list(risk.parameters.values())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for patch in risk.bar(risk.patches, "Fisher information"):
        for sum_of, gradient in zip(total, torch.autograd.grad(risk.loss([patch]), parameters), strict=True):
            sum_of.addcmul_(gradient, gradient)
    return {name: each.div_(len(risk.patches)) for name, each in zip(risk.parameters, total, strict=True)}


class Hessian:
    """The Hessian of a risk as products with vectors (P,) of all its parameters, in the order of `risk.parameters`.

    batch: patches differentiated at once; halved where a GPU's memory is too small for it.
    """

    def __init__(self, risk: Risk, batch: int) -> None:
        self.risk, self.batch = risk, batch
        self.parameters = list(risk.parameters.values())
        self.size = sum(parameter.numel() for parameter in self.parameters)

    def __matmul__(self, vector: torch.Tensor) -> torch.Tensor:
        """H v (P,). Raises TransplantError where a single patch does not fit into memory, or torch cannot
        differentiate the network twice."""
        parts = [part.reshape(parameter.shape) for part, parameter in zip(
            vector.split([parameter.numel() for parameter in self.parameters]), self.parameters, strict=True)]
        while True:
            try:
                return self._product(parts)
            except torch.OutOfMemoryError as error:
                if self.batch == 1:
                    raise TransplantError("second derivatives of one patch do not fit into this device's memory"
                                          ) from error
                self.batch //= 2
                torch.cuda.empty_cache()

    def _product(self, parts: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(self.size, dtype=parts[0].dtype, device=parts[0].device)
        for patches in self.risk.batches(self.batch):
            with sdpa_kernel(SDPBackend.MATH):  # the only attention that torch differentiates twice
                gradients = torch.autograd.grad(self.risk.loss(patches), self.parameters, create_graph=True)
                along = added_up((gradient * part).sum() for gradient, part in zip(gradients, parts, strict=True))
                second = torch.autograd.grad(along, self.parameters, materialize_grads=True)
            total.add_(torch.cat([each.reshape(-1) for each in second]), alpha=len(patches) / len(self.risk.patches))
        return total


def top_eigenvalues(hessian: Hessian, count: int, seed: int = 0) -> np.ndarray:
    """The largest eigenvalues lambda_1 >= lambda_2 >= ... (at most P - 1 of them), by Lanczos (scipy's eigsh), to a
    relative tolerance of 1e-3. Raises TransplantError where they do not converge."""
    count = min(count, hessian.size - 1)
    device = hessian.parameters[0].device
    start = np.random.default_rng(seed).normal(size=hessian.size).astype(np.float32)
    with tqdm(desc="Hessian-vector products", unit="", delay=3, disable=not hessian.risk.progress) as bar:
        def product(vector: np.ndarray) -> np.ndarray:
            bar.update()
            vector = np.asarray(vector, np.float32).reshape(-1)
            return (hessian @ torch.from_numpy(vector).to(device)).cpu().numpy()
        operator = LinearOperator((hessian.size, hessian.size), matvec=product, dtype=np.float32)
        try:
            found = eigsh(operator, count, which="LA", v0=start, tol=TOLERANCE, return_eigenvectors=False)
        except ArpackNoConvergence as error:
            raise TransplantError(f"only {len(error.eigenvalues)} of {count} eigenvalues converged: ask for fewer"
                                  ) from error
    return np.sort(found)[::-1].astype(float)


def hessian_trace(hessian: Hessian, probes: int, seed: int = 0) -> tuple[float, float]:
    """The sum of all eigenvalues and its standard error, by Hutchinson's estimator: the mean of v^T H v over random
    vectors of signs. The error is NaN with one probe."""
    device = hessian.parameters[0].device
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in hessian.risk.bar(range(probes), "trace of the Hessian"):
        signs = torch.randint(0, 2, (hessian.size,), generator=generator).mul_(2).sub_(1).float().to(device)
        values.append(float(torch.dot(signs, hessian @ signs)))
    error = float(np.std(values, ddof=1) / probes ** 0.5) if probes > 1 else float("nan")
    return float(np.mean(values)), error


def quadratic(hessian: Hessian, tau: Mapping[str, torch.Tensor]) -> float:
    """1/2 tau^T H tau: what the second-order expansion of the risk adds at theta_0 + tau (U-Net Transplant, Eq. 6)
    beside the gradient's part. Parameters that tau does not have, such as heads, stay."""
    parts = [tau[name].float().reshape(-1) if name in tau else torch.zeros(parameter.numel())
             for name, parameter in hessian.risk.parameters.items()]
    vector = torch.cat(parts).to(hessian.parameters[0].device)
    return 0.5 * float(torch.dot(vector, hessian @ vector))
