"""TIES against its Algorithm 1, entry by entry."""
import numpy as np
import pytest
import torch
from cases import merge, merge_networks, networks, numpy_taus, plain_disjoint_mean, tensors

SHAPES = [(1,), (2,), (5,), (3, 2, 3, 3), (4, 2, 3, 3, 3)]


def trimmed(tau: np.ndarray, limit: float) -> np.ndarray:
    return np.array([entry if abs(entry) >= limit else 0.0 for entry in tau.ravel().tolist()]).reshape(tau.shape)


def smallest_kept(entries: np.ndarray, density: float) -> float:
    keep = max(1, round(density * entries.size))
    return sorted(abs(entries).ravel().tolist(), reverse=True)[keep - 1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "scale", "weights"), [(0.2, 1.0, [1, 1, 1]), (0.5, 0.7, [1, 1, 1]),
                                                           (1.0, 1.0, [1, 1, 1]), (0.3, 1.5, [0.5, 0.2, 1.0]),
                                                           (0.6, -1.0, [3, 0, 1]), (0.0, 1.0, [1, 1, 1])])
def test_ties_is_the_papers_algorithm(shape: tuple, density: float, scale: float, weights: list[float]) -> None:
    theta_0, thetas = tensors(shape, 3)
    taus = [trimmed(tau, smallest_kept(tau, density)) for tau in numpy_taus(theta_0, thetas)]
    expected = theta_0.numpy() + scale * plain_disjoint_mean(taus, weights)
    for trim in ("vector", "tensor"):  # one tensor: both trim the same vector
        merged = merge("ties", theta_0, thetas, weights, density=density, trim=trim, **{"lambda": scale})
        np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trim", ["vector", "tensor"])
@pytest.mark.parametrize("density", [0.1, 0.35, 0.9])
def test_networks_are_trimmed_over_the_whole_vector_or_by_tensor(trim: str, density: float) -> None:
    theta_0, thetas = networks(3, [(5,), (0,), (4, 6), (3, 2, 3, 3), (1,)])
    for scale, theta in zip([1, 4, 0.5], thetas, strict=True):  # tensors and models of different sizes
        theta["2"] = theta_0["2"] + scale * (theta["2"] - theta_0["2"])
    taus = {name: numpy_taus(theta_0[name], [theta[name] for theta in thetas]) for name in theta_0}
    merged = merge_networks("ties", theta_0, thetas, density=density, trim=trim)
    whole = [np.concatenate([taus[name][model].ravel() for name in taus]) for model in range(3)]
    for name, of_models in taus.items():
        kept = [trimmed(tau, smallest_kept(tau if trim == "tensor" else vector, density)) if tau.size else tau
                for tau, vector in zip(of_models, whole, strict=True)]
        expected = theta_0[name].numpy() + plain_disjoint_mean(kept, [1, 1, 1])
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_trimming_by_hand() -> None:
    theta_0 = {"a": torch.zeros(4), "b": torch.zeros(4)}
    theta = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([10.0, 20, 30, 40])}
    for trim, expected in (("vector", [[0, 0, 0, 0], [10, 20, 30, 40]]), ("tensor", [[0, 0, 3, 4], [0, 0, 30, 40]])):
        merged = merge_networks("ties", theta_0, [theta], density=0.5, trim=trim)
        assert [tensor.tolist() for tensor in merged.values()] == expected


def test_election_by_hand() -> None:
    """The larger sum wins, not the larger number of models; what is zero takes no part; a draw stays at theta_0."""
    taus = [torch.tensor([5.0, 1.0, 2.0, -3.0, 0.0]), torch.tensor([-1.0, 0.0, -2.0, -1.0, 0.0]),
            torch.tensor([-1.0, 3.0, 0.0, 1.0, 0.0])]
    merged = merge("ties", torch.zeros(5), taus, density=1.0)
    assert merged.tolist() == [5.0, 2.0, 0.0, -2.0, 0.0]


def test_entries_as_large_as_the_smallest_kept_one_are_all_kept() -> None:
    """So that what is kept does not hang on the order of the entries."""
    tau = torch.tensor([2.0, -2.0, 1.0, 2.0, 0.0, 0.0])
    assert merge("ties", torch.zeros(6), [tau], density=0.2).tolist() == [2.0, -2.0, 0.0, 2.0, 0.0, 0.0]
    assert torch.equal(merge("ties", torch.zeros(6), [tau], density=0.8), tau)
