"""DARE, DELLA and Model Breadcrumbs: what they keep, how often, and what they make of it."""
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import merge, merge_networks, numpy_taus, plain_disjoint_mean, tensors

from nnunet_transplant.vectors import BLOCK

SIGMAS = 5  # random numbers are of fixed seeds: what holds once holds always


def thinned(name: str, theta_0: torch.Tensor, thetas: Sequence[torch.Tensor], **given: object) -> list[torch.Tensor]:
    """What the method makes of each task vector: merged alone, at its position among the others."""
    zeros = torch.zeros_like(theta_0)
    taus = [theta - theta_0 for theta in thetas]
    return [merge(name, zeros, taus, [float(model == other) for other in range(len(taus))], **given)
            for model in range(len(taus))]


def assert_share(kept: torch.Tensor, chance: float) -> None:
    deviation = (chance * (1 - chance) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - chance) <= SIGMAS * deviation


@pytest.mark.parametrize("density", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_dare_keeps_a_share_and_scales_it_up(density: float) -> None:
    theta_0, thetas = tensors((100, 20, 3, 3), 1)
    tau = thetas[0] - theta_0
    result = thinned("dare", theta_0, thetas, density=density)[0]
    kept = result != 0
    assert_share(kept, density)
    torch.testing.assert_close(result[kept], tau[kept] / density, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "given"), [("dare", {"density": 0.4}), ("dare", {"density": 0.4, "combine": "ties"}),
                                             ("della", {"density": 0.5, "epsilon": 0.4}),
                                             ("della", {"density": 0.5, "epsilon": 0.0})])
def test_the_mean_over_seeds_is_the_task_vector(name: str, given: dict) -> None:
    """Scaling up what is kept makes up for what is dropped: the estimate of every entry is unbiased."""
    theta_0, thetas = torch.zeros(4, 6), tensors((4, 6), 1, seed=3)[1]
    results = torch.stack([merge(name, theta_0, thetas, [1.0], seed=seed, **given) for seed in range(400)]).double()
    deviation = results.std(0) / len(results) ** 0.5
    assert ((results.mean(0) - thetas[0]).abs() <= SIGMAS * deviation).all()
    assert (results == 0).any(0).all() and (results != 0).any(0).all()  # every entry is kept and dropped in turn


@pytest.mark.parametrize(("name", "combine"), [("dare", "linear"), ("dare", "ties"), ("della", None)])
@pytest.mark.parametrize(("shape", "weights", "scale"), [((40,), [1, 1, 1], 1.0), ((6, 7), [0.5, 0.2, 1.0], 0.7),
                                                         ((3, 2, 3, 3), [2, 0, 1], -1.5),
                                                         ((3, 2, 3, 2, 2), [1, 1, 1], 2.0), ((1,), [1, 1, 1], 1.0)])
def test_thinned_task_vectors_are_added_or_elected(name: str, combine: str | None, shape: tuple, weights: list[float],
                                                   scale: float) -> None:
    theta_0, thetas = tensors(shape, 3)
    given = {"density": 0.6, "seed": 5} | ({"combine": combine} if combine else {})
    taus = [tau.double().numpy() for tau in thinned(name, theta_0, thetas, **given)]
    if combine == "linear":
        change = scale * sum(weight * tau for weight, tau in zip(weights, taus, strict=True))
    else:
        change = scale * plain_disjoint_mean(taus, weights)
    merged = merge(name, theta_0, thetas, weights, **given, **{"lambda": scale})
    np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + change, rtol=1e-5, atol=1e-6)


def test_dare_with_ties_forgets_a_task_of_negative_weight() -> None:
    """A negative weight is that weight without its sign for the task vector turned round, so that what is divided by
    is never near zero: the sum of the weights is, where they cancel."""
    taus = [torch.tensor([2.0, -2.0, 1.0]), torch.tensor([1.0, 1.0, -4.0])]
    merged = merge("dare", torch.zeros(3), taus, [1.0, -0.75], density=1.0, combine="ties")
    turned = plain_disjoint_mean([taus[0].numpy(), -taus[1].numpy()], [1.0, 0.75])
    torch.testing.assert_close(merged, torch.tensor(turned).float())
    assert torch.equal(merge("dare", torch.zeros(3), taus, [0.0, 0.0], density=1.0, combine="ties"), torch.zeros(3))


@pytest.mark.parametrize("name", ["dare", "della"])
def test_the_seed_decides_what_is_kept(name: str) -> None:
    theta_0, thetas = tensors((30, 50), 2)
    first = merge(name, theta_0, thetas, density=0.5, seed=7)
    assert torch.equal(first, merge(name, theta_0, thetas, density=0.5, seed=7))
    torch.rand(3)  # the global generator has no say
    assert torch.equal(first, merge(name, theta_0, thetas, density=0.5, seed=7))
    for seed in (0, 8, 2**31 - 1):
        assert not torch.equal(first, merge(name, theta_0, thetas, density=0.5, seed=seed))


@pytest.mark.parametrize("name", ["dare", "della"])
def test_choices_for_models_tensors_blocks_and_seeds_are_independent(name: str) -> None:
    """The same task vector for all: two of them keep an entry both, or drop it both, as often as chance has it."""
    ones = torch.ones(2 * BLOCK + 5) if name == "dare" else torch.ones(30, 5000)
    zero = {"a": torch.zeros_like(ones), "b": torch.zeros_like(ones)}
    tau = {"a": ones, "b": ones}
    density = 0.3
    given = {"density": density} | ({} if name == "dare" else {"epsilon": 0.0})
    alone = [merge_networks(name, zero, [tau, tau], weights, **given) for weights in ([1, 0], [0, 1])]
    seeded = merge_networks(name, zero, [tau, tau], [1, 0], seed=1, **given)
    chosen = [alone[0]["a"], alone[0]["b"], alone[1]["a"], alone[1]["b"], seeded["a"], seeded["b"]]
    if name == "dare":
        chosen = [part for each in chosen for part in (each[:BLOCK], each[BLOCK:2 * BLOCK])]
    for index, one in enumerate(chosen):
        assert_share(one != 0, density)
        for other in chosen[:index]:
            assert_share((one != 0) == (other != 0), density**2 + (1 - density)**2)


@pytest.mark.parametrize("shape", [(300,), (20, 6), (10, 2, 3), (8, 2, 2, 2), (6, 2, 1, 3, 1)])
def test_della_divides_by_a_chance_that_grows_evenly_with_the_rank_in_the_row(shape: tuple) -> None:
    density, epsilon = 0.5, 0.6
    theta_0, thetas = tensors(shape, 1)
    tau = numpy_taus(theta_0, thetas)[0]
    result = thinned("della", theta_0, thetas, density=density, epsilon=epsilon)[0].double().numpy()
    rows = (tau, result) if len(shape) > 1 else (tau[None], result[None])
    for row, kept in zip(*(each.reshape(len(each), -1) for each in rows), strict=True):
        for entry, value in zip(row, kept, strict=True):
            rank = sum(abs(other) < abs(entry) for other in row)
            chance = density - epsilon / 2 + epsilon * rank / (len(row) - 1)
            assert value == 0 or value == pytest.approx(entry / chance, rel=1e-5)


def test_della_keeps_large_entries_more_often() -> None:
    """Over many seeds every entry is kept as often as its rank in its row says, however large other rows are."""
    density, epsilon, seeds = 0.4, 0.6, 300
    generator = torch.Generator().manual_seed(0)
    magnitudes = torch.stack([torch.randperm(6, generator=generator) + 1.0 for _ in range(8)])
    tau = magnitudes * torch.tensor([1.0, -1.0]).repeat(3) * torch.logspace(-3, 3, 8)[:, None]
    kept = sum((merge("della", torch.zeros_like(tau), [tau], density=density, epsilon=epsilon, seed=seed) != 0).double()
               for seed in range(seeds))
    for rank in range(6):
        chance = density + epsilon * (rank / 5 - 0.5)
        each = kept[magnitudes == rank + 1]
        deviation = (chance * (1 - chance) * seeds) ** 0.5
        assert ((each - chance * seeds).abs() <= SIGMAS * deviation).all()
        assert abs(each.mean() - chance * seeds) <= SIGMAS * deviation / len(each) ** 0.5


def test_della_where_chances_reach_0_and_1() -> None:
    tau = torch.arange(1.0, 12.0)
    largest = [merge("della", torch.zeros(11), [tau], density=1.0, epsilon=1.0, seed=seed)[5:] for seed in range(20)]
    assert all(torch.equal(each, tau[5:]) for each in largest)  # chance 1: kept, and not scaled
    smallest = [merge("della", torch.zeros(11), [tau], density=1e-4, epsilon=1.0, seed=seed)[:5] for seed in range(20)]
    assert not torch.stack(smallest).any()                       # chance 0: dropped, and 0 / 0 is not computed


def plain_middle(tau: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Sort by magnitude, leave out the gamma share from the top, keep the density share below it; at least one."""
    order = sorted(range(tau.size), key=lambda index: -abs(tau.ravel()[index]))
    out = min(round(gamma * tau.size), tau.size - 1)
    keep = order[out:out + max(1, round(density * tau.size))]
    return np.array([entry if index in keep else 0.0 for index, entry in enumerate(tau.ravel())]).reshape(tau.shape)


@pytest.mark.parametrize("shape", [(1,), (2,), (10,), (6, 7), (3, 2, 3, 3), (2, 2, 3, 2, 2)])
@pytest.mark.parametrize(("density", "gamma", "weights"), [
    (0.15, 0.01, None), (0.5, 0.2, [1.0, -0.5, 2.0]), (1.0, 0.0, None), (1.0, 0.3, None), (0.0, 0.0, None),
    (0.0, 1.0, None), (1.0, 1.0, None), (0.4, 0.8, None)])
def test_breadcrumbs_keeps_the_middle(shape: tuple, density: float, gamma: float, weights: list | None) -> None:
    theta_0, thetas = tensors(shape, 3)
    change = sum(weight * plain_middle(tau, density, gamma)
                 for weight, tau in zip(weights or [1 / 3] * 3, numpy_taus(theta_0, thetas), strict=True))
    merged = merge("breadcrumbs", theta_0, thetas, weights, density=density, gamma=gamma)
    np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + change, rtol=1e-5, atol=1e-6)


def test_breadcrumbs_looks_at_each_tensor_on_its_own() -> None:
    tau = {"a": torch.tensor([1.0, -2.0, 3.0, -4.0]), "b": 100 * torch.tensor([4.0, 3.0, -2.0, -1.0])}
    zero = {name: torch.zeros(4) for name in tau}
    merged = merge_networks("breadcrumbs", zero, [tau], [1.0], density=0.5, gamma=0.25)
    assert [tensor.tolist() for tensor in merged.values()] == [[0, -2, 3, 0], [0, 300, -200, 0]]
