"""Methods that weigh, entry by entry, what the tasks say about it: TALL masks, MagMax, competition balancing."""
import numpy as np
import torch

from nnunet_transplant.merging.registry import FREE_MEAN, LAMBDA, RATIOS, Method, Parameter, register
from nnunet_transplant.merging.vectors import (
    TINY,
    TaskVectors,
    Tensors,
    add_weighted,
    at_least,
    in_parallel,
    kept,
    kth_largest,
    where_one,
)

CLIPPED = 1e-4  # share of smallest and of largest magnitudes that competition balancing clips
LARGEST_EXPONENT = 60  # exp of 89 is Inf in float32


def consensus(tensors: Tensors, state: None, tall_lambda: float, k: int) -> torch.Tensor:
    """Task t uses an entry where |tau_t| >= tall_lambda |sum_s tau_s - tau_t| (its TALL mask); entries that fewer than
    k tasks use (at most all of them) stay at theta_0."""
    total = sum(tensors.taus)
    users = sum(at_least(tau.abs(), (total - tau).abs_().mul_(tall_lambda)) for tau in tensors.taus)
    agreed = at_least(users, torch.tensor(float(min(k, len(tensors.taus)))))
    merged = add_weighted(torch.zeros_like(total), tensors.taus, tensors.weights)
    return merged.mul_(agreed).add_(tensors.theta_0)


def magmax(tensors: Tensors, state: None, **parameters: float) -> torch.Tensor:
    """theta_0 + lambda tau_s, where entry by entry s is the task of the largest w_s |tau_s|, the first of equals;
    tasks of weight 0 are left out."""
    weighted = [(tau, weight) for tau, weight in zip(tensors.taus, tensors.weights, strict=True) if weight > 0]
    best, largest = weighted[0][0], weighted[0][1] * weighted[0][0].abs()
    for tau, weight in weighted[1:]:
        magnitude = tau.abs().mul_(weight)
        best = where_one(at_least(largest, magnitude), best, tau)
        largest = torch.maximum(largest, magnitude)
    return tensors.theta_0.add(best, alpha=parameters["lambda"])


def competition(vectors: TaskVectors, density: float, **_: float) -> list[tuple[float, float, float, float]]:
    """For each model, over its whole task vector: the bounds that its magnitudes are clipped to (the 0.01 % smallest
    and largest), the smallest score that is kept and the largest score."""
    models = range(len(vectors.thetas))
    total = np.zeros(sum(tensor.numel() for tensor in vectors.thetas[0].values()), np.float32)
    for model in models:
        total += vectors.flat_tau(model)

    def of_model(model: int) -> tuple[float, float, float, float]:
        tau = torch.from_numpy(vectors.flat_tau(model))
        magnitudes, few = tau.abs().numpy(), round(CLIPPED * tau.numel())
        low, high = kth_largest(magnitudes, magnitudes.size - few), kth_largest(magnitudes, 1 + few)
        scores = score(tau, torch.from_numpy(total), low, high, len(models)).numpy()
        return low, high, kth_largest(scores, kept(density, scores.size)), float(scores.max(initial=-np.inf))
    return list(in_parallel(of_model, models))


def score(tau: torch.Tensor, total: torch.Tensor, low: float, high: float, models: int) -> torch.Tensor:
    """How strongly a task claims each entry: intra-balancing exp(T n^2), where n is |tau_t| clipped and scaled to
    [0, 1], times inter-balancing tanh(tau_t sum_s tau_s). Of many models all scores are smaller by one factor, which
    cancels out."""
    exponent = (tau.abs().clamp_(low, high) - low).div_(max(high - low, TINY)).square_().mul_(models)
    if models > LARGEST_EXPONENT:
        exponent.sub_(models - LARGEST_EXPONENT)
    return exponent.exp_().mul_((tau * total).tanh_())


def pcb(tensors: Tensors, state: list[tuple[float, float, float, float]], density: float,
        **parameters: float) -> torch.Tensor:
    """theta_0 + lambda sum_t b_t tau_t / sum_t b_t, entry by entry, where b_t is the task's score, zero where it is not
    among the density share of its task's largest, scaled to [0, 1]."""
    total = sum(tensors.taus)
    merged, claims = torch.zeros_like(total), torch.zeros_like(total)
    for tau, weight, (low, high, smallest, largest) in zip(tensors.taus, tensors.weights, state, strict=True):
        claim = score(tau, total, low, high, len(tensors.taus)).sub_(smallest).clamp_(min=0.0)
        claim.mul_(weight / max(largest - smallest, TINY))
        merged.addcmul_(claim, tau.abs().clamp_(low, high).mul_(tau.sgn()))
        claims.add_(claim)
    return merged.div_(claims.clamp_(min=TINY)).mul_(parameters["lambda"]).add_(tensors.theta_0)


register(Method(
    name="consensus", summary="keep what at least k tasks use (TALL masks), at theta_0 what fewer do",
    reference="Localizing Task Information for Improved Model Merging and Compression, Wang et al., ICML 2024",
    merge=consensus, weights_rule=FREE_MEAN, by_entry=True,
    parameters=(Parameter("tall_lambda", 0.4, "how strict a task's mask is; higher keeps less", 0.0, 10.0),
                Parameter("k", 2, "an entry is kept where at least this many tasks use it", 1, 1000))))
register(Method(
    name="magmax", summary="entry by entry the task vector of largest magnitude",
    reference="MagMax: Leveraging Model Merging for Seamless Continual Learning, Marczak et al., ECCV 2024",
    merge=magmax, weights_rule=RATIOS, by_entry=True, parameters=(LAMBDA,)))
register(Method(
    name="pcb", summary="parameter competition balancing: entry by entry weights from magnitude and agreement",
    reference="Parameter Competition Balancing for Model Merging, Du et al., NeurIPS 2024 (as its published code "
              "computes it)",
    merge=pcb, weights_rule=RATIOS, by_entry=True, prepare=competition,
    parameters=(Parameter("density", 0.1, "share of a task vector's entries that compete", 0.0, 1.0), LAMBDA)))
