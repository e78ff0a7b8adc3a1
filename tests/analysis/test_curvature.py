"""Fisher information and Hessian against their definitions, on networks small enough to write them down."""
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import small_plans, write_model, write_volumes

from nnunet_transplant.analysis.curvature import Hessian, fisher_diagonal, hessian_trace, quadratic, top_eigenvalues
from nnunet_transplant.analysis.risk import Risk, open_risk
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.volumes import Volumes

LABELS = {"background": 0, "A": 1, "B": 2}
KINDS = {"plain": {}, "residual": {"residual": True}, "2d": {"dim": 2}}


@pytest.fixture(params=KINDS)
def risk(request: pytest.FixtureRequest, tmp_path: Path, nnunet_folders: None) -> Iterator[Risk]:
    """In float64 and with a smooth nonlinearity: differences over the kinks of a ReLU converge to nothing. Norm scales,
    shifts and biases are random: residual encoders start with zeros."""
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(12, 12, 12))
    plans = small_plans(patch=8, **KINDS[request.param])
    next(iter(plans["configurations"].values()))["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.SiLU"
    folder = write_model(tmp_path / "model", LABELS, plans=plans)
    found = open_risk(open_models(folder)[0], Volumes([501], 3), patches=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    patches = [replace(patch, image=patch.image.double()) for patch in found.patches]
    return replace(found, network=found.network.double(), patches=patches)


def gradient(risk: Risk, patches: list) -> torch.Tensor:
    parameters = list(risk.parameters.values())
    return torch.cat([each.reshape(-1) for each in torch.autograd.grad(risk.loss(patches), parameters)])


def shifted(risk: Risk, direction: torch.Tensor, step: float) -> torch.Tensor:
    """The gradient of the whole risk, a step away."""
    parts = direction.split([parameter.numel() for parameter in risk.parameters.values()])

    def go(by: float) -> None:
        with torch.no_grad():
            for parameter, part in zip(risk.parameters.values(), parts, strict=True):
                parameter.add_(part.reshape(parameter.shape), alpha=by)
    go(step)
    found = sum(gradient(risk, [patch]) for patch in risk.patches) / len(risk.patches)
    go(-step)
    return found


def dense(hessian: Hessian) -> np.ndarray:
    return torch.stack([hessian @ row for row in torch.eye(hessian.size, dtype=torch.float64)]).numpy()


def test_fisher_is_the_mean_squared_gradient_of_each_patch(risk: Risk) -> None:
    found = fisher_diagonal(risk)
    assert list(found) == list(risk.parameters)
    each = torch.stack([gradient(risk, [patch]) for patch in risk.patches])
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in found.values()]), each.square().mean(0))
    assert float(each.square().mean(0).sum()) > 0
    # and nothing like the square of the mean gradient, which batches would give
    assert not torch.allclose(each.square().mean(0), each.mean(0).square(), rtol=0.1)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_hessian_is_the_derivative_of_the_gradient(risk: Risk, batch: int) -> None:
    """Central differences along directions, as exact as a Dice that nnU-Net sums in float32 allows. Forward over
    reverse, instance norms make this wrong by a tenth and more."""
    hessian = Hessian(risk, batch)
    rng = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(hessian.size, generator=rng, dtype=torch.float64)
        direction /= direction.norm()
        slope = (shifted(risk, direction, 1e-3) - shifted(risk, direction, -1e-3)) / 2e-3
        assert float(slope.norm()) > 0
        torch.testing.assert_close(hessian @ direction, slope, rtol=1e-3, atol=3e-4 * float(slope.abs().max()))


def test_hessian_is_symmetric(risk: Risk) -> None:
    hessian = Hessian(risk, 3)
    one, other = torch.randn(2, hessian.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert float(one @ (hessian @ other)) == pytest.approx(float(other @ (hessian @ one)), rel=1e-6)


def test_eigenvalues_and_trace_are_those_of_the_whole_matrix(tmp_path: Path, nnunet_folders: None) -> None:
    """Of a network of a few hundred parameters."""
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(12, 12, 12))
    plans = small_plans(dim=2, patch=8)
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [2, 2, 3]
    folder = write_model(tmp_path / "model", LABELS, plans=plans)
    risk = open_risk(open_models(folder)[0], Volumes([501], 2), patches=2)
    hessian = Hessian(risk, 2)
    matrix = torch.stack([hessian @ row for row in torch.eye(hessian.size)]).double().numpy()
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1]
    found = top_eigenvalues(hessian, 5)
    np.testing.assert_allclose(found, values[:5], rtol=3e-3)
    assert top_eigenvalues(hessian, 5).tolist() == found.tolist()  # seeded
    estimate, error = hessian_trace(hessian, 400)
    assert abs(estimate - matrix.trace()) < 4 * error
    # of random signs the variance is twice the squares off the diagonal
    off = 2 * ((matrix ** 2).sum() - (np.diag(matrix) ** 2).sum())
    assert error == pytest.approx((off / 400) ** 0.5, rel=0.25)
    assert np.isnan(hessian_trace(hessian, 1)[1])
    tau = {name: torch.randn_like(parameter) for name, parameter in risk.parameters.items()}
    flat = torch.cat([part.reshape(-1) for part in tau.values()]).double().detach().numpy()
    assert quadratic(hessian, tau) == pytest.approx(0.5 * flat @ matrix @ flat, rel=1e-4)
    assert quadratic(hessian, tau) <= 0.5 * values[0] * (flat ** 2).sum() * (1 + 1e-4)  # Eq. 7
    body = {name: part for name, part in tau.items() if "seg_layers" not in name}
    assert quadratic(hessian, body) != quadratic(hessian, tau)
