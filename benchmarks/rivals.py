"""mergekit and fusion_bench on state dicts in memory: the same merges as ours, run by their own code.

Neither is a dependency; RIVALS says what each has. Every function here is called as

    function(theta_0, thetas, weight=..., **settings) -> merged state dict

with one weight for all models and the settings of our method of that name. It calls the part of the other package that
merges, unmodified, in the fastest way its code allows: no model is loaded, copied or saved. Checked with mergekit 0.1.5
and fusion_bench 0.2.33.
"""
import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rival:
    package: str
    source: str             # the code that merges
    merge: Callable[..., StateDict]
    differs: str            # where its definition is not ours; empty: it is, and results agree


RIVALS: dict[str, list[Rival]] = {}  # by the name of the row in the table of merge_speed.py


def rival(row: str, source: str, differs: str = "") -> Callable[[Callable], Callable]:
    """Register a function as what a package has for a row; the package is the one `source` lies in."""
    def register(function: Callable[..., StateDict]) -> Callable[..., StateDict]:
        RIVALS.setdefault(row, []).append(Rival(source.partition(".")[0], source, function, differs))
        return function
    return register


def installed() -> dict[str, str]:
    """The versions of the packages that are there."""
    found = {}
    for package in ("mergekit", "fusion_bench"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """fusion_bench narrates every tensor: its words go nowhere, so that a terminal does not slow it down."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


def as_matrices(tensors: StateDict) -> StateDict:
    """Kernels as matrices (out, in * kernel), which is what the packages' matrix methods know; a view."""
    return {name: tensor.flatten(1) if tensor.dim() > 2 else tensor for name, tensor in tensors.items()}


def shaped_as(tensors: StateDict, like: StateDict) -> StateDict:
    return {name: tensor.reshape(like[name].shape) for name, tensor in tensors.items()}


# mergekit: merge_state_dicts is its interface for networks in memory.

_TASK_ARITHMETIC = "mergekit.merge_methods.generalized_task_arithmetic.GeneralizedTaskArithmeticMerge"


def _mergekit(method: str, theta_0: StateDict | None, thetas: Sequence[StateDict], **parameters: Any) -> StateDict:
    from mergekit.merge_methods import merge_state_dicts
    models = dict(enumerate(thetas))
    if theta_0 is None:
        return merge_state_dicts(models, method, parameters=parameters)
    return merge_state_dicts({"base": theta_0, **models}, method, parameters=parameters, base="base")


@rival("average", "mergekit.merge_methods.linear.linear_merge")
def mergekit_average(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, **_: Any) -> StateDict:
    return _mergekit("linear", None, thetas, weight=weight, normalize=False)


@rival("task_arithmetic", _TASK_ARITHMETIC)
def mergekit_task_arithmetic(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, **_: Any) -> StateDict:
    return _mergekit("task_arithmetic", theta_0, thetas, weight=weight)


@rival("ties, trimmed by tensor", _TASK_ARITHMETIC + ", mergekit.sparsify.magnitude",
       "rounds the number of kept entries down; a weighted sum of exactly zero elects +")
def mergekit_ties(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, density: float,
                  **others: Any) -> StateDict:
    return _mergekit("ties", theta_0, thetas, weight=weight, density=density, **{"lambda": others["lambda"]})


@rival("dare, then linear", _TASK_ARITHMETIC + ", mergekit.sparsify.bernoulli",
       "random; restores each tensor's L1 norm where DARE divides by the density")
def mergekit_dare_linear(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, density: float,
                         **others: Any) -> StateDict:
    return _mergekit("dare_linear", theta_0, thetas, weight=weight, density=density, **{"lambda": others["lambda"]})


@rival("dare, then ties", _TASK_ARITHMETIC + ", mergekit.sparsify.bernoulli",
       "random; restores each tensor's L1 norm where DARE divides by the density")
def mergekit_dare_ties(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, density: float,
                       **others: Any) -> StateDict:
    return _mergekit("dare_ties", theta_0, thetas, weight=weight, density=density, normalize=True,
                     **{"lambda": others["lambda"]})


@rival("della", _TASK_ARITHMETIC + ", mergekit.sparsify.della_magprune",
       "random; restores each tensor's L1 norm where DELLA divides each entry by its chance")
def mergekit_della(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, density: float, epsilon: float,
                   **others: Any) -> StateDict:
    # its epsilon is half the width of the window of chances; ours, as in the paper, the whole
    merged = _mergekit("della", as_matrices(theta_0), [as_matrices(theta) for theta in thetas], weight=weight,
                       density=density, epsilon=epsilon / 2, **{"lambda": others["lambda"]})
    return shaped_as(merged, theta_0)


@rival("breadcrumbs", _TASK_ARITHMETIC + ", mergekit.sparsify.magnitude_outliers", "rounds numbers of entries down")
def mergekit_breadcrumbs(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, density: float,
                         gamma: float, **_: Any) -> StateDict:
    return _mergekit("breadcrumbs", theta_0, thetas, weight=weight, density=density, gamma=gamma)


@rival("model_stock", "mergekit.merge_methods.model_stock.model_stock_merge_method")
def mergekit_model_stock(theta_0: StateDict, thetas: Sequence[StateDict], **_: Any) -> StateDict:
    return _mergekit("model_stock", theta_0, thetas)


@rival("slerp", "mergekit.merge_methods.slerp.slerp_merge_method", "the plain mean where the cosine is above 0.9995")
def mergekit_slerp(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, **_: Any) -> StateDict:
    return _mergekit("slerp", thetas[0], thetas[1:], t=weight)


@rival("karcher", "mergekit.merge_methods.karcher.karcher_merge_method",
       "at most its 10 steps: in float32 small angles are noise, and it does not notice that it has converged")
def mergekit_karcher(theta_0: StateDict, thetas: Sequence[StateDict], **_: Any) -> StateDict:
    return _mergekit("karcher", None, thetas)


# fusion_bench: its functions on state dicts; where a method is one with its algorithm class, that class on networks
# that are nothing but a state dict.


class InMemory(torch.nn.Module):
    """A state dict in the shape of a module, so that reading and writing it costs nothing."""

    def __init__(self, tensors: StateDict) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, **_: Any) -> StateDict:
        return self.tensors

    def load_state_dict(self, tensors: StateDict, strict: bool = True) -> torch.nn.modules.module._IncompatibleKeys:
        self.tensors = tensors
        return torch.nn.modules.module._IncompatibleKeys([], [])


def _plus(theta_0: StateDict, tau: StateDict, scale: float) -> StateDict:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul
    return state_dict_add(theta_0, tau if scale == 1 else state_dict_mul(tau, scale))


def _taus(theta_0: StateDict, thetas: Sequence[StateDict]) -> list[StateDict]:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_sub
    return [state_dict_sub(theta, theta_0) for theta in thetas]


def _vectors(networks: Sequence[StateDict]) -> torch.Tensor:
    from fusion_bench.utils.parameters import state_dict_to_vector
    return torch.vstack([state_dict_to_vector(network) for network in networks])


def _as_state_dict(vector: torch.Tensor, like: StateDict) -> StateDict:
    from fusion_bench.utils.parameters import vector_to_state_dict
    # it gives the tensors of `like` other contents: give it tensors of our own
    return vector_to_state_dict(vector, {name: tensor.detach() for name, tensor in like.items()})


@rival("average", "fusion_bench.method.simple_average.simple_average")
def fusion_bench_average(theta_0: StateDict, thetas: Sequence[StateDict], **_: Any) -> StateDict:
    from fusion_bench.method.simple_average import simple_average
    return simple_average(list(thetas))


@rival("task_arithmetic", "fusion_bench.method.task_arithmetic.task_arithmetic.task_arithmetic_merge")
def fusion_bench_task_arithmetic(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float,
                                 **_: Any) -> StateDict:
    from fusion_bench.method.task_arithmetic.task_arithmetic import task_arithmetic_merge
    return task_arithmetic_merge(InMemory(theta_0), [InMemory(theta) for theta in thetas], weight).tensors


@rival("ties, trimmed over the vector", "fusion_bench.method.ties_merging.ties_merging_utils.ties_merging",
       "keeps one entry more; a sum of exactly zero elects the sign of the whole sum")
def fusion_bench_ties(theta_0: StateDict, thetas: Sequence[StateDict], *, density: float, **others: Any) -> StateDict:
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
    base = _vectors([theta_0])[0]
    merged = ties_merging(_vectors(thetas) - base, reset_thresh=density, merge_func="mean")
    return _as_state_dict(base + others["lambda"] * merged, theta_0)


def _fusion_bench_dare(theta_0: StateDict, thetas: Sequence[StateDict], density: float) -> list[StateDict]:
    from fusion_bench.method.dare.utils import module_random_drop_, module_sub_
    taus = [module_sub_({name: tensor.detach() for name, tensor in theta.items()}, theta_0, trainable_only=False)
            for theta in thetas]
    for tau in taus:
        module_random_drop_(tau, 1 - density, rescale=True)
    return taus


@rival("dare, then linear", "fusion_bench.method.dare.utils.module_random_drop_", "random")
def fusion_bench_dare_linear(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, density: float,
                             **others: Any) -> StateDict:
    from fusion_bench.utils.state_dict_arithmetic import state_dict_sum
    taus = _fusion_bench_dare(theta_0, thetas, density)
    return _plus(theta_0, state_dict_sum(taus), weight * others["lambda"])


@rival("dare, then ties", "fusion_bench.method.dare.utils.module_random_drop_, "
       "fusion_bench.method.ties_merging.ties_merging_utils.disjoint_merge",
       "random; trims what DARE left a second time, which is left out here")
def fusion_bench_dare_ties(theta_0: StateDict, thetas: Sequence[StateDict], *, density: float,
                           **others: Any) -> StateDict:
    from fusion_bench.method.ties_merging.ties_merging_utils import disjoint_merge, resolve_sign
    vectors = _vectors(_fusion_bench_dare(theta_0, thetas, density))
    merged = disjoint_merge(vectors, "mean", resolve_sign(vectors))
    return _as_state_dict(_vectors([theta_0])[0] + others["lambda"] * merged, theta_0)


@rival("consensus", "fusion_bench.method.tall_mask.utils.generate_task_masks",
       "makes the masks; counts them only from files, so that here one line counts them")
def fusion_bench_consensus(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, tall_lambda: float,
                           k: int, **_: Any) -> StateDict:
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    base, vectors = _vectors([theta_0])[0], _vectors(thetas)
    taus = vectors - base
    total = taus.sum(0)
    masks = generate_task_masks(taus, vectors, base, total, tall_lambda)
    return _as_state_dict(base + weight * total * (masks.sum(0) >= k), theta_0)


@rival("model_stock", "fusion_bench.method.model_stock.model_stock.ModelStock",
       "averages angles where the paper averages cosines")
def fusion_bench_model_stock(theta_0: StateDict, thetas: Sequence[StateDict], **_: Any) -> StateDict:
    from fusion_bench import BaseModelPool
    from fusion_bench.method.model_stock import ModelStock
    models = {str(number): InMemory(theta) for number, theta in enumerate(thetas)}
    return ModelStock().run(BaseModelPool({"_pretrained_": InMemory(theta_0), **models})).tensors


@rival("slerp", "fusion_bench.method.slerp.slerp.slerp_on_state_dicts",
       "the plain mean where the cosine is above 0.9995")
def fusion_bench_slerp(theta_0: StateDict, thetas: Sequence[StateDict], *, weight: float, **_: Any) -> StateDict:
    from fusion_bench.method.slerp.slerp import slerp_on_state_dicts
    return slerp_on_state_dicts(weight, *thetas)


@rival("tsv_m", "fusion_bench.method.task_singular_vector.utils.TSVM_utils.compute_and_sum_svd_mem_reduction")
def fusion_bench_tsv_m(theta_0: StateDict, thetas: Sequence[StateDict], **others: Any) -> StateDict:
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    taus = [as_matrices(tau) for tau in _taus(theta_0, thetas)]
    merged = compute_and_sum_svd_mem_reduction(taus, accelerator="cpu")
    return _plus(theta_0, shaped_as(merged, theta_0), others["lambda"])


@rival("iso_c", "fusion_bench.method.isotropic_merging.iso_utils.iso_c")
def fusion_bench_iso_c(theta_0: StateDict, thetas: Sequence[StateDict], **others: Any) -> StateDict:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    taus = [as_matrices(tau) for tau in _taus(theta_0, thetas)]
    return _plus(theta_0, shaped_as(iso_c(taus, accelerator="cpu"), theta_0), others["lambda"])


@rival("iso_cts", "fusion_bench.method.isotropic_merging.iso_utils.iso_cts")
def fusion_bench_iso_cts(theta_0: StateDict, thetas: Sequence[StateDict], *, common: float,
                         **others: Any) -> StateDict:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_cts
    taus = [as_matrices(tau) for tau in _taus(theta_0, thetas)]
    merged = iso_cts(taus, common_space_fraction=common, accelerator="cpu")
    return _plus(theta_0, shaped_as(merged, theta_0), others["lambda"])


@rival("magmax", "fusion_bench.method.magmax.magmax.magmax_merge")
def fusion_bench_magmax(theta_0: StateDict, thetas: Sequence[StateDict], **others: Any) -> StateDict:
    from fusion_bench.method.magmax.magmax import magmax_merge
    return magmax_merge(InMemory(theta_0), [InMemory(theta) for theta in thetas], others["lambda"]).tensors
