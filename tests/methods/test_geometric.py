"""Methods on angles: slerp, Karcher mean, Model Stock."""
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import merge, numpy_taus, tensors

SHAPES = [(2,), (5,), (4, 6), (3, 2, 3, 3), (2, 2, 3, 2, 2)]
WEIGHTS = [[0.5, 0.5], [0.2, 0.8], [1.0, 0.0], [0.0, 1.0]]


def dot(first: Sequence[float], second: Sequence[float]) -> float:
    return math.fsum(one * other for one, other in zip(first, second, strict=True))


def entries(tensor: torch.Tensor) -> list[float]:
    return tensor.double().reshape(-1).tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("near", [True, False])
def test_slerp_is_shoemakes_formula(shape: tuple, weights: list[float], near: bool) -> None:
    theta_0, thetas = tensors(shape, 2)
    if not near:  # independent networks
        thetas = [theta - theta_0 for theta in thetas]
    first, second = map(entries, thetas)
    a = math.acos(dot(first, second) / math.sqrt(dot(first, first) * dot(second, second)))
    expected = [math.sin(weights[0] * a) / math.sin(a) * one + math.sin(weights[1] * a) / math.sin(a) * other
                for one, other in zip(first, second, strict=True)]
    merged = merge("slerp", theta_0, thetas, weights)
    np.testing.assert_allclose(entries(merged), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degrees", [0.001, 1, 60, 90, 150, 179])
def test_slerp_turns_by_a_share_of_the_angle(degrees: float) -> None:
    arc = math.radians(degrees)
    first, second = torch.tensor([5.0, 0, 0]), 5 * torch.tensor([math.cos(arc), math.sin(arc), 0])
    for share in (0.0, 0.25, 0.5, 1.0):
        expected = 5 * torch.tensor([math.cos(share * arc), math.sin(share * arc), 0])
        torch.testing.assert_close(merge("slerp", first, [first, second], [1 - share, share]), expected,
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["slerp", "karcher"])
def test_parallel_and_zero_models_are_averaged(name: str) -> None:
    model = torch.tensor([1.0, -2.0, 3.0])
    for other in (model, 3 * model, torch.zeros(3)):
        for weights in WEIGHTS:
            torch.testing.assert_close(merge(name, model, [model, other], weights),
                                       weights[0] * model + weights[1] * other)


@pytest.mark.parametrize("name", ["slerp", "karcher"])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.3, 0.7]])
def test_models_that_are_opposite_up_to_rounding_are_not_blown_up(name: str, weights: list[float]) -> None:
    """Between them, large multiples of the models cancel out."""
    model = tensors((24,), 1)[0]
    noise = torch.randn(24, generator=torch.Generator().manual_seed(1))
    for other in (-model, -3 * model, -model * (1 + 1e-7 * noise)):
        assert merge(name, model, [model, other], weights).norm() <= 1.01 * max(model.norm(), other.norm())
    for off in (1e-2, 1e-3, 1e-4, 1e-5):  # there is still a way round
        other = off * noise - model
        one, two = (tensor.double() / (tensor.double().norm() if name == "karcher" else 1) for tensor in (model, other))
        cosine = float(torch.dot(one, two) / (one.norm() * two.norm()))
        a = math.pi - math.asin(math.sqrt((1 - cosine) * (1 + cosine)))
        expected = (math.sin(weights[0] * a) * one + math.sin(weights[1] * a) * two) / math.sin(a)
        if name == "karcher":
            expected *= weights[0] * model.double().norm() + weights[1] * other.double().norm()
        torch.testing.assert_close(merge(name, model, [model, other], weights).double(), expected, rtol=1e-3, atol=1e-4)


def plain_karcher(thetas: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Small steps from the first model's direction along the sum of the tangent vectors, until there is none."""
    lengths = [np.linalg.norm(theta) for theta in thetas]
    directions = [theta / length for theta, length in zip(thetas, lengths, strict=True)]
    point = directions[0]
    for _ in range(300):
        step = np.zeros_like(point)
        for weight, direction in zip(weights, directions, strict=True):
            across = direction - direction @ point * point
            if np.linalg.norm(across) > 1e-12:
                step += weight * math.acos(np.clip(direction @ point, -1, 1)) * across / np.linalg.norm(across)
        point = point + 0.2 * step
        point /= np.linalg.norm(point)
    return np.dot(weights, lengths) * point


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.5, 0.2, 0.3], [0.9, 0.1, 0.0]])
@pytest.mark.parametrize("near", [True, False])
def test_karcher_is_the_riemannian_mean(shape: tuple, weights: list[float], near: bool) -> None:
    theta_0, thetas = tensors(shape, 3)
    if not near:
        if shape == (2,):  # on a circle the mean of directions all around is not unique
            return
        thetas = [theta - theta_0 + 0.05 for theta in thetas]
    expected = plain_karcher([np.array(entries(theta)) for theta in thetas], weights)
    np.testing.assert_allclose(entries(merge("karcher", theta_0, thetas, weights)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_karcher_of_orthogonal_models_is_their_diagonal(count: int) -> None:
    models = list(2 * torch.eye(count))
    torch.testing.assert_close(merge("karcher", models[0], models), torch.full((count,), 2 / count**0.5))


def test_karcher_of_two_models_of_one_length_is_slerp() -> None:
    theta_0, (first, second) = tensors((4, 6), 2)
    second = second * (first.norm() / second.norm())
    for weights in WEIGHTS:
        torch.testing.assert_close(merge("karcher", theta_0, [first, second], weights),
                                   merge("slerp", theta_0, [first, second], weights), rtol=1e-5, atol=1e-6)


def test_karcher_leaves_zero_models_out_of_the_direction_only() -> None:
    theta_0, (first, second) = tensors((4, 6), 2)
    torch.testing.assert_close(merge("karcher", theta_0, [first, torch.zeros(4, 6), second], [0.4, 0.2, 0.4]),
                               0.8 * merge("karcher", theta_0, [first, second]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_model_stock_is_the_papers_ratio(shape: tuple, count: int) -> None:
    theta_0, thetas = tensors(shape, count)
    thetas = [theta + 0.1 for theta in thetas]  # something in common, so that cosines are positive
    taus = [entries(torch.from_numpy(tau)) for tau in numpy_taus(theta_0, thetas)]
    cosines = [dot(taus[i], taus[j]) / math.sqrt(dot(taus[i], taus[i]) * dot(taus[j], taus[j]))
               for i in range(count) for j in range(i)]
    cosine = max(0.0, sum(cosines) / len(cosines))
    t = count * cosine / (1 + (count - 1) * cosine)
    mean = [math.fsum(column) / count for column in zip(*map(entries, thetas), strict=True)]
    expected = [t * one + (1 - t) * base for one, base in zip(mean, entries(theta_0), strict=True)]
    np.testing.assert_allclose(entries(merge("model_stock", theta_0, thetas)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degrees", [10, 60, 89])
@pytest.mark.parametrize("count", [2, 3])
def test_model_stock_is_where_the_centre_of_the_sphere_projects_to(degrees: float, count: int) -> None:
    """The paper's geometry: models at equal distance d of their centre mu, at right angles to each other as seen from
    it, and to the line from mu to theta_0. The merge is the point of the plane of theta_0 and the models nearest mu."""
    mu, d = torch.zeros(count + 1, dtype=torch.float64), math.tan(math.radians(degrees))
    theta_0 = torch.eye(count + 1, dtype=torch.float64)[count]
    thetas = [d * torch.eye(count + 1, dtype=torch.float64)[model] for model in range(count)]
    plane = torch.stack([theta - theta_0 for theta in thetas], 1)
    nearest = theta_0 + plane @ torch.linalg.lstsq(plane, (mu - theta_0)[:, None]).solution[:, 0]
    merged = merge("model_stock", theta_0.float(), [theta.float() for theta in thetas])
    torch.testing.assert_close(merged.double(), nearest, rtol=1e-5, atol=1e-6)


def test_model_stock_stays_at_theta_0_where_task_vectors_have_nothing_in_common() -> None:
    theta_0, tau = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    for other in (-tau, tau.flip(0), torch.zeros(2)):
        torch.testing.assert_close(merge("model_stock", theta_0, [theta_0 + tau, theta_0 + other]), theta_0)
