"""Every method against a plain, slow definition, and against what must hold for any merge."""
import itertools

import numpy as np
import pytest
import torch

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging import METHODS, Method
from nnunet_transplant.merging.apply import merge_tensors
from nnunet_transplant.merging.registry import find

SHAPES = [(1,), (2,), (5,), (3, 2, 3, 3), (4, 2, 3, 3, 3)]


def tensors(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    theta_0 = torch.randn(shape, generator=generator)
    return theta_0, [theta_0 + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]


def merge(name: str, theta_0: torch.Tensor, thetas: list[torch.Tensor], weights: list[float] | None = None,
          **given: object) -> torch.Tensor:
    """The method on networks of one tensor."""
    method = find(name)
    networks = [{"a": theta} for theta in thetas]
    return merge_tensors(method, method.settings(given), method.weights(weights, len(thetas)), {"a": theta_0},
                         networks)["a"]


def plain_ties(theta_0: np.ndarray, thetas: list[np.ndarray], weights: list[float], density: float,
               scale: float) -> np.ndarray:
    """TIES entry by entry, as the paper's Algorithm 1 reads."""
    taus = []
    for theta in thetas:
        tau = (theta - theta_0).ravel().astype(np.float64)
        keep = max(1, round(density * tau.size))
        limit = sorted(abs(tau))[-keep]
        taus.append([entry if abs(entry) >= limit else 0.0 for entry in tau])
    merged = []
    for entries in zip(*taus, strict=True):
        total = sum(w * entry for w, entry in zip(weights, entries, strict=True))
        agreeing = [(w, entry) for w, entry in zip(weights, entries, strict=True) if entry * total > 0]
        weight = sum(w for w, _ in agreeing)
        merged.append(scale * sum(w * entry for w, entry in agreeing) / weight if weight else 0.0)
    return theta_0 + np.array(merged).reshape(theta_0.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "scale", "weights"), [(0.2, 1.0, [1, 1, 1]), (0.5, 0.7, [1, 1, 1]),
                                                           (1.0, 1.0, [1, 1, 1]), (0.3, 1.5, [0.5, 0.2, 1.0])])
def test_ties_is_the_papers_algorithm(shape: tuple, density: float, scale: float, weights: list[float]) -> None:
    theta_0, thetas = tensors(shape, 3)
    expected = plain_ties(theta_0.numpy(), [theta.numpy() for theta in thetas], weights, density, scale)
    for trim in ("vector", "tensor"):  # one tensor: both trim the same vector
        merged = merge("ties", theta_0, thetas, weights, density=density, trim=trim, **{"lambda": scale})
        np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_ties_trims_over_the_whole_vector_or_per_tensor() -> None:
    method = find("ties")
    theta_0 = [torch.zeros(4), torch.zeros(4)]
    thetas = [torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 30, 40])]
    networks = [dict(zip("ab", theta, strict=True)) for theta in ([*theta_0], [*thetas])]
    for trim, expected in (("vector", [[0, 0, 0, 0], [10, 20, 30, 40]]), ("tensor", [[0, 0, 3, 4], [0, 0, 30, 40]])):
        settings = method.settings({"density": 0.5, "trim": trim})
        merged = merge_tensors(method, settings, [1.0], networks[0], [networks[1]])
        assert [tensor.tolist() for tensor in merged.values()] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_average_is_equation_1(shape: tuple) -> None:
    theta_0, thetas = tensors(shape, 3)
    weights = [0.5, 0.2, 0.3]
    expected = theta_0.double() + sum(w * (theta - theta_0).double() for w, theta in zip(weights, thetas, strict=True))
    torch.testing.assert_close(merge("average", theta_0, thetas, weights).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic_adds_and_forgets(shape: tuple) -> None:
    theta_0, thetas = tensors(shape, 2)
    weights = [0.8, -0.6]
    expected = theta_0.double() + sum(w * (theta - theta_0).double() for w, theta in zip(weights, thetas, strict=True))
    torch.testing.assert_close(merge("task_arithmetic", theta_0, thetas, weights).double(), expected,
                               rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merge("task_arithmetic", theta_0, thetas, [0, 0]), theta_0, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["average", "task_arithmetic"])
def test_one_model_of_weight_1_comes_out_bit_for_bit(name: str) -> None:
    theta_0, thetas = tensors((64, 3, 3, 3), 1)
    assert torch.equal(merge(name, theta_0, thetas, [1.0]), thetas[0])


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("shape", SHAPES)
def test_invariants(name: str, shape: tuple) -> None:
    theta_0, thetas = tensors(shape, 3)
    full = {"density": 1.0} if name == "ties" else {}
    for order in itertools.permutations(thetas):  # equal weights: the order of the models does not matter
        torch.testing.assert_close(merge(name, theta_0, list(order)), merge(name, theta_0, thetas),
                                   rtol=1e-5, atol=1e-6)
    unchanged = merge(name, theta_0, [theta_0.clone(), theta_0.clone()])
    torch.testing.assert_close(unchanged, theta_0, rtol=1e-6, atol=1e-7)  # zero task vectors change nothing
    shares = None if name != "task_arithmetic" else [0.5, 0.5]
    torch.testing.assert_close(merge(name, theta_0, [thetas[0], thetas[0]], shares, **full), thetas[0],
                               rtol=1e-5, atol=1e-6)  # equal models merge to themselves


@pytest.mark.parametrize(("name", "weights", "given", "message"), [
    ("average", [0.5, 0.6], {}, "must sum to 1"),
    ("average", [1.0], {}, "1 numbers for 2 models"),
    ("ties", [1, -1], {}, "must not be negative"),
    ("ties", [0, 0], {}, "not all zero"),
    ("task_arithmetic", [float("nan"), 1], {}, "finite"),
    ("ties", None, {"density": 1.5}, "between 0 and 1"),
    ("ties", None, {"density": float("nan")}, "between 0 and 1"),
    ("ties", None, {"trim": "some"}, "one of vector, tensor"),
    ("average", None, {"density": 0.5}, "has no -density"),
])
def test_wrong_weights_and_parameters_are_refused(name: str, weights: list | None, given: dict, message: str) -> None:
    theta_0, thetas = tensors((3,), 2)
    with pytest.raises(TransplantError, match=message):
        merge(name, theta_0, thetas, weights, **given)


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(TransplantError, match="average, task_arithmetic, ties"):
        find("magic")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_declares_itself(method: Method) -> None:
    assert method.summary and method.reference and method.weights_rule
    for parameter in method.parameters:
        assert parameter.help and parameter.check(parameter.default) == parameter.default
