"""TALL masks, MagMax and competition balancing, entry by entry."""
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from cases import merge, merge_networks, networks, numpy_taus, tensors

SHAPES = [(1,), (2,), (5,), (4, 6), (3, 2, 3, 3), (2, 2, 3, 2, 2)]


def entries_of(taus: Sequence[np.ndarray]) -> list[tuple[float, ...]]:
    return list(zip(*(tau.ravel().tolist() for tau in taus), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tall_lambda", "k", "weights"), [
    (0.4, 2, None), (0.4, 1, [1.0, 1.0, 1.0]), (1.0, 3, [1.0, -0.5, 2.0]), (0.0, 3, None), (10.0, 1, None),
    (0.2, 4, None), (0.5, 1000, [1.0, 0.0, 1.0])])
def test_consensus_keeps_what_enough_tasks_use(shape: tuple, tall_lambda: float, k: int, weights: list | None) -> None:
    theta_0, thetas = tensors(shape, 3)
    taus = numpy_taus(theta_0, thetas)
    change = []
    for entries in entries_of(taus):
        users = sum(abs(entry) >= tall_lambda * abs(sum(entries) - entry) for entry in entries)
        total = sum(w * entry for w, entry in zip(weights or [1 / 3] * 3, entries, strict=True))
        change.append(total if users >= min(k, 3) else 0.0)
    merged = merge("consensus", theta_0, thetas, weights, tall_lambda=tall_lambda, k=k)
    np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + np.reshape(change, shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("weights", "scale"), [([1, 1, 1], 1.0), ([0.3, 2.0, 1.0], 0.5), ([0, 1, 1], -1.0)])
def test_magmax_takes_the_largest(shape: tuple, weights: list[float], scale: float) -> None:
    theta_0, thetas = tensors(shape, 3)
    change = []
    for entries in entries_of(numpy_taus(theta_0, thetas)):
        _, largest = max(zip(weights, entries, strict=True), key=lambda pair: pair[0] * abs(pair[1]))
        change.append(scale * largest)
    merged = merge("magmax", theta_0, thetas, weights, **{"lambda": scale})
    np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + np.reshape(change, shape), rtol=1e-5, atol=1e-6)


def test_magmax_gives_a_model_of_weight_0_no_say_where_the_others_are_zero() -> None:
    taus = [torch.tensor([5.0, 5.0]), torch.tensor([0.0, 1.0])]
    assert merge("magmax", torch.zeros(2), taus, [0, 1]).tolist() == [0.0, 1.0]
    assert merge("magmax", torch.zeros(2), taus[::-1], [1, 0]).tolist() == [0.0, 1.0]


def plain_pcb(taus: Sequence[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    """The published code's pcb_merging on flat task vectors, step by step, in float64. It clips one entry more at the
    top where 0.01 % of the entries are no whole number."""
    size, total, scales, clipped = taus[0].size, sum(taus), [], []
    few = round(size * 0.0001)
    for tau in taus:
        ascending = np.sort(abs(tau))
        magnitudes = np.clip(abs(tau), ascending[few], ascending[size - 1 - few])
        normalised = (magnitudes - magnitudes.min()) / (magnitudes.max() - magnitudes.min())
        score = np.exp(len(taus) * normalised**2) * np.tanh(tau * total)
        kept = np.maximum(score, np.sort(score)[int(size * (1 - density))])
        scales.append((kept - kept.min()) / (kept.max() - kept.min()))
        clipped.append(np.sign(tau) * magnitudes)
    claims = sum(weight * scale for weight, scale in zip(weights, scales, strict=True))
    summed = sum(weight * scale * tau for weight, scale, tau in zip(weights, scales, clipped, strict=True))
    return summed / np.maximum(claims, 1e-12)


@pytest.mark.parametrize(("size", "models", "spread"), [(30, 2, 0.1), (200, 3, 3.0), (20000, 4, 1.0)])
@pytest.mark.parametrize(("density", "scale", "weights"), [(0.1, 1.0, [1, 1, 1, 1]), (0.5, 0.7, [0.5, 0.2, 1.0, 3.0]),
                                                           (1.0, -1.0, [1, 1, 1, 1])])
def test_pcb_is_the_published_code(size: int, models: int, spread: float, density: float, scale: float,
                                   weights: list[float]) -> None:
    """Sizes too small for 0.01 % of the entries to be one, and one where two are clipped at either end."""
    theta_0, thetas = tensors((size,), models)
    thetas = [theta_0 + 10 * spread * (theta - theta_0) for theta in thetas]
    change = scale * plain_pcb(numpy_taus(theta_0, thetas), weights[:models], density)
    merged = merge("pcb", theta_0, thetas, weights[:models], density=density, **{"lambda": scale})
    np.testing.assert_allclose(merged.numpy(), theta_0.numpy() + change, rtol=1e-4, atol=1e-5)


def test_pcb_ranks_entries_over_the_whole_network() -> None:
    theta_0, thetas = networks(3, [(5,), (0,), (4, 6), (3, 2, 3, 3), (1,)])
    flat = [np.concatenate([(theta[name] - theta_0[name]).double().numpy().ravel() for name in theta_0])
            for theta in thetas]
    change = plain_pcb(flat, [1, 1, 1], 0.25)
    merged = merge_networks("pcb", theta_0, thetas, density=0.25)
    start = 0
    for name, tensor in merged.items():
        part = change[start:start + tensor.numel()].reshape(tensor.shape)
        np.testing.assert_allclose(tensor.numpy(), theta_0[name].numpy() + part, rtol=1e-4, atol=1e-5)
        start += tensor.numel()


def test_pcb_of_one_model_is_its_clipped_task_vector() -> None:
    """All entries compete: the one of the smallest score gets nothing, the 0.01 % at either end are clipped."""
    theta_0, (theta,) = tensors((20000,), 1)
    tau = numpy_taus(theta_0, [theta])[0]
    ascending = np.sort(abs(tau))
    merged = merge("pcb", theta_0, [theta], density=1.0)
    untouched = (abs(tau) >= ascending[2]) & (abs(tau) <= ascending[-3])
    assert untouched.sum() == 20000 - 4
    np.testing.assert_allclose(merged.numpy()[untouched], theta.numpy()[untouched], rtol=1e-5, atol=1e-6)
    largest = abs(tau) >= ascending[-2]
    np.testing.assert_allclose(abs(merged - theta_0).numpy()[largest], ascending[-3], rtol=1e-3)


def test_pcb_merges_more_models_than_exp_can_count() -> None:
    """exp(T n^2) overflows float32 from T = 89 on; scores are scaled afterwards, so that only ratios count."""
    theta_0, thetas = tensors((40,), 120)
    expected = theta_0.numpy() + plain_pcb(numpy_taus(theta_0, thetas), [1] * 120, 0.5)
    np.testing.assert_allclose(merge("pcb", theta_0, thetas, density=0.5).numpy(), expected, rtol=1e-4, atol=1e-5)
