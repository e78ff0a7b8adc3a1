"""What must hold for every method that needs no data, the linear methods, and what methods declare.

The definitions of the other methods are tested beside this file, family by family.
"""
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from cases import (
    DATA_FREE,
    SHAPES,
    Network,
    extremes,
    has_seed,
    merge,
    merge_networks,
    models_for,
    networks,
    tensors,
)
from factory import write_model

from nnunet_transplant import vectors
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merger import Merger
from nnunet_transplant.methods import METHODS, Method
from nnunet_transplant.methods.apply import merge_tensors
from nnunet_transplant.methods.registry import FREE_SUM, RATIOS
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.vectors import BLOCK

Change = Callable[..., torch.Tensor]

BY_ENTRY = [name for name in DATA_FREE if METHODS[name].by_entry]

# Settings that leave nothing of a task vector out.
ALL_KEPT: dict[str, dict[str, float]] = {
    "ties": {"density": 1.0}, "dare": {"density": 1.0}, "della": {"density": 1.0, "epsilon": 0.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0}, "pcb": {"density": 1.0}}

# Methods that change a model merged alone, by definition; their own tests say what comes out.
CHANGES_ONE = {
    "iso_c": "one singular value for all directions",
    "iso_cts": "one singular value for all directions",
    "pcb": "clips the largest entries, and the entry of the smallest score gets no weight",
}
# Methods that do not give equal models back, by definition.
CHANGES_EQUALS = CHANGES_ONE | {"tsv_m": "each of T tasks keeps 1/T of its rank"}

# Methods whose other models are merged otherwise when one more of weight 0 is there, by definition.
COUNTS_WEIGHT_0 = {
    "consensus": "masks compare each task with all others, weighted or not",
    "pcb": "scores compare each task with all others, weighted or not",
    "model_stock": "the angles between all task vectors decide",
    "tsv_m": "each task has 1/T of the rank",
    "iso_c": "the mean of T tensors where they are no matrices",
    "iso_cts": "each task has its share of the rank",
}


def equal_shares(method: Method, models: int) -> list[float] | None:
    """Weights that sum to 1 where the default ones do not."""
    return [1 / models] * models if method.weights_rule is FREE_SUM else None


def assert_close(merged: Network, expected: Network, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol)


def assert_equal(merged: Network, expected: Network) -> None:
    assert_close(merged, expected, 0, 0)


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


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "slerp", "karcher", "model_stock"])
def test_one_model_of_weight_1_comes_out_bit_for_bit(name: str) -> None:
    theta_0, thetas = tensors((64, 3, 3, 3), 1)
    assert torch.equal(merge(name, theta_0, thetas, [1.0]), thetas[0])


@pytest.mark.parametrize("name", [name for name in DATA_FREE if name not in CHANGES_ONE])
def test_one_model_alone_comes_out(name: str) -> None:
    theta_0, thetas = networks(1)
    assert_close(merge_networks(name, theta_0, thetas, [1.0], **ALL_KEPT.get(name, {})), thetas[0])


@pytest.mark.parametrize("name", [name for name in DATA_FREE if name not in CHANGES_EQUALS])
def test_equal_models_merge_to_themselves(name: str) -> None:
    method = METHODS[name]
    theta_0, (theta,) = networks(1)
    for count in {2, models_for(method)}:
        merged = merge_networks(name, theta_0, [theta] * count, equal_shares(method, count), **ALL_KEPT.get(name, {}))
        assert_close(merged, theta)


@pytest.mark.parametrize("name", DATA_FREE)
def test_zero_task_vectors_change_nothing(name: str) -> None:
    theta_0, _ = networks(0)
    for settings in extremes(METHODS[name]):
        merged = merge_networks(name, theta_0, [theta_0] * models_for(METHODS[name]), **settings)
        assert_close(merged, theta_0, 1e-6, 1e-7)


@pytest.mark.parametrize("name", DATA_FREE)
def test_the_order_of_the_models_does_not_matter(name: str) -> None:
    """Nor does that of slerp's two, as their weights swap with them. What is random goes by position."""
    method = METHODS[name]
    theta_0, thetas = networks(models_for(method))
    settings = ALL_KEPT.get(name, {}) if has_seed(method) else {}
    for weights in ([0.5, 0.2, 0.3], [1 / 3, 1 / 3, 1 / 3]):
        weights = weights if len(thetas) == 3 else [weights[0], 1 - weights[0]]
        expected = merge_networks(name, theta_0, thetas, weights, **settings)
        for order in itertools.permutations(range(len(thetas))):
            merged = merge_networks(name, theta_0, [thetas[index] for index in order],
                                    [weights[index] for index in order], **settings)
            assert_close(merged, expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in DATA_FREE if name not in COUNTS_WEIGHT_0])
def test_a_model_of_weight_0_has_no_influence(name: str) -> None:
    """Not even one that is far away, and where the others are at theta_0."""
    method = METHODS[name]
    theta_0, (other, *thetas) = networks(models_for(method))
    for theta in thetas:
        theta["6"] = theta_0["6"]
    far = {name: 100 * tensor for name, tensor in other.items()}
    weights = [1 / len(thetas)] * len(thetas)
    expected = merge_networks(name, theta_0, thetas, weights)
    assert_close(merge_networks(name, theta_0, [*thetas, far], [*weights, 0.0]), expected)
    if not has_seed(method):
        assert_close(merge_networks(name, theta_0, [far, *thetas], [0.0, *weights]), expected)


@pytest.mark.parametrize("name", [name for name in DATA_FREE if METHODS[name].weights_rule is RATIOS])
def test_only_the_ratios_of_weights_count(name: str) -> None:
    theta_0, thetas = networks(3)
    expected = merge_networks(name, theta_0, thetas, [0.5, 0.2, 1.0])
    for scale in (1e-3, 0.7, 1e4):
        assert_close(merge_networks(name, theta_0, thetas, [0.5 * scale, 0.2 * scale, scale]), expected)
    assert_close(merge_networks(name, theta_0, thetas), merge_networks(name, theta_0, thetas, [7, 7, 7]))


@pytest.mark.parametrize("name", [name for name in DATA_FREE if METHODS[name].needs_base])
def test_a_shift_of_all_networks_shifts_the_merge(name: str) -> None:
    """Only task vectors count. Entries are multiples of 1/256, so that they are the same task vectors to the bit."""
    theta_0, thetas = ([{key: (256 * tensor).round() / 256 for key, tensor in network.items()} for network in group]
                       for group in ([networks(3)[0]], networks(3)[1]))
    shifted = [{key: tensor + 3 for key, tensor in network.items()} for network in (*theta_0, *thetas)]
    expected = {key: tensor + 3 for key, tensor in merge_networks(name, theta_0[0], thetas).items()}
    assert_close(merge_networks(name, shifted[0], shifted[1:]), expected)


@pytest.mark.parametrize("name", [name for name in DATA_FREE if name != "pcb"])  # it takes tanh of task vectors
@pytest.mark.parametrize("factor", [2.0**-90, 2.0**90])
def test_a_factor_for_all_networks_is_one_for_the_merge(name: str, factor: float) -> None:
    """No method has a scale of its own at which numbers count as large or small."""
    theta_0, thetas = networks(models_for(METHODS[name]))
    scaled = [{key: factor * tensor for key, tensor in network.items()} for network in (theta_0, *thetas)]
    merged = {key: tensor / factor for key, tensor in merge_networks(name, scaled[0], scaled[1:]).items()}
    assert_close(merged, merge_networks(name, theta_0, thetas))


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_types_are_computed_in_float32_and_kept(name: str, dtype: torch.dtype) -> None:
    theta_0, thetas = networks(models_for(METHODS[name]))
    stored = [{key: tensor.to(dtype) for key, tensor in network.items()} for network in (theta_0, *thetas)]
    before = [{key: tensor.clone() for key, tensor in network.items()} for network in stored]
    single = [{key: tensor.float() for key, tensor in network.items()} for network in stored]
    expected = merge_networks(name, single[0], single[1:])
    merged = merge_networks(name, stored[0], stored[1:])
    assert all(tensor.dtype == dtype for tensor in merged.values())
    assert_equal(merged, {key: tensor.to(dtype) for key, tensor in expected.items()})
    for network, copy in zip(stored, before, strict=True):
        assert_equal(network, copy)  # inputs are maps of files, or used again: they stay as they are


@pytest.mark.parametrize("name", [name for name in DATA_FREE if not METHODS[name].needs_base])
def test_without_a_base(name: str) -> None:
    theta_0, thetas = networks(2)
    assert_equal(merge_networks(name, None, thetas), merge_networks(name, theta_0, thetas))


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("shapes", [[(0,)], [(0, 3), (2, 0, 3, 3)], []])
def test_networks_of_nothing(name: str, shapes: list) -> None:
    for settings in extremes(METHODS[name]):
        theta_0, thetas = networks(models_for(METHODS[name]), shapes)
        assert_equal(merge_networks(name, theta_0, thetas, **settings), theta_0)


def degenerate(theta_0: Network, thetas: Sequence[Network]) -> dict[str, tuple[Network, list[Network]]]:
    """Networks on the edge of what arithmetic bears, by what they are."""
    def each(change: Change, *given: Network) -> Network:
        return {name: change(*(network[name] for network in given)) for name in theta_0}

    def alternate(tensor: torch.Tensor) -> torch.Tensor:
        factors = torch.tensor([1e30, 1e-30, 0.0, 1.0]).repeat(tensor.numel() // 4 + 1)[:tensor.numel()]
        return tensor * factors.reshape(tensor.shape)

    def without_rows(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor[:1], torch.zeros_like(tensor[1:])]) if tensor.dim() else tensor

    zero, one = each(torch.zeros_like, theta_0), each(torch.ones_like, theta_0)
    taus = [each(torch.sub, theta, theta_0) for theta in thetas]
    opposite, minus = each(lambda base, tau: base - tau, theta_0, taus[0]), each(torch.neg, taus[0])
    return {
        "zeros": (zero, [zero, zero, zero]),
        "a zero task vector": (zero, [taus[0], zero, zero]),
        "identical": (theta_0, [thetas[0]] * 3),
        "opposite task vectors": (theta_0, [thetas[0], opposite, thetas[0]]),
        "opposite models": (zero, [taus[0], minus, taus[0]]),
        "opposite models of other lengths": (zero, [each(lambda tau: 3 * tau, minus), taus[0], taus[1]]),
        "constant": (zero, [one, each(torch.neg, one), one]),
        "repeated": (zero, [taus[0], taus[0], taus[1]]),
        "rows of zeros": (zero, [each(without_rows, tau) for tau in taus]),
        "large": tuple_of(each, lambda tensor: 1e30 * tensor, theta_0, thetas),
        "small": tuple_of(each, lambda tensor: 1e-30 * tensor, theta_0, thetas),
        "large and small": tuple_of(each, alternate, theta_0, thetas),
        "large on small": (each(lambda tensor: 1e-30 * tensor, theta_0), [each(alternate, tau) for tau in taus]),
    }


def tuple_of(each: Callable[..., Network], change: Change, theta_0: Network,
             thetas: Sequence[Network]) -> tuple[Network, list[Network]]:
    return each(change, theta_0), [each(change, theta) for theta in thetas]


DEGENERATE = degenerate(*networks(3, [(), (1,), (5,), (0,), (1, 1), (4, 6), (6, 4), (3, 2, 3, 3), (4, 2, 2, 2, 2)]))


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_inputs_give_finite_results(name: str, kind: str) -> None:
    """With whatever settings; and twice the same."""
    theta_0, thetas = DEGENERATE[kind]
    thetas = thetas[:models_for(METHODS[name])]
    for settings in extremes(METHODS[name]):
        merged = merge_networks(name, theta_0, thetas, **settings)
        assert all(tensor.isfinite().all() for tensor in merged.values()), settings
        assert all(merged[key].shape == tensor.shape for key, tensor in theta_0.items())
    assert_equal(merge_networks(name, theta_0, thetas), merge_networks(name, theta_0, thetas))


@pytest.mark.parametrize("name", [name for name in DATA_FREE if METHODS[name].max_models is None])
def test_more_models_than_rows_and_entries(name: str) -> None:
    theta_0, thetas = networks(100, [(5,), (2, 2, 3, 3)])
    for settings in extremes(METHODS[name]):
        merged = merge_networks(name, theta_0, thetas, **settings)
        assert all(tensor.isfinite().all() for tensor in merged.values()), settings


@pytest.mark.parametrize("name", BY_ENTRY)
def test_blocks_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is random is drawn block by block: there, it is what is kept."""
    method = METHODS[name]
    theta_0, thetas = networks(3, [(BLOCK + 5,), (7,), (0,), (BLOCK // 9 + 3, 2, 3, 3)])
    settings = ALL_KEPT.get(name, {}) if has_seed(method) else {}
    blocks = merge_networks(name, theta_0, thetas, **settings)
    monkeypatch.setattr(vectors, "BLOCK", 1 << 60)
    assert_equal(blocks, merge_networks(name, theta_0, thetas, **settings))


@pytest.mark.parametrize("name", DATA_FREE)
def test_the_number_of_threads_makes_no_difference(name: str) -> None:
    theta_0, thetas = networks(models_for(METHODS[name]), [(24, 8, 3, 3), (5,), (BLOCK + 5,)])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(merge_networks(name, theta_0, thetas))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)


@pytest.mark.parametrize(("name", "weights", "given", "message"), [
    ("average", [0.5, 0.6], {}, "must sum to 1"),
    ("average", [1.0], {}, "1 numbers for 2 models"),
    ("ties", [1, -1], {}, "must not be negative"),
    ("ties", [0, 0], {}, "not all zero"),
    ("slerp", [1.5, -0.5], {}, "must not be negative"),
    ("model_stock", [0.5, 0.6], {}, "sum to 1"),
    ("task_arithmetic", [float("nan"), 1], {}, "finite"),
    ("ties", None, {"density": 1.5}, "between 0 and 1"),
    ("ties", None, {"density": float("nan")}, "between 0 and 1"),
    ("ties", None, {"trim": "some"}, "one of vector, tensor"),
    ("dare", None, {"density": 0.0}, "between 0.0001 and 1"),
    ("della", None, {"epsilon": "much"}, "must be a number"),
    ("consensus", None, {"k": 0}, "between 1 and 1000"),
    ("average", None, {"density": 0.5}, "average has no -density"),
])
def test_wrong_weights_and_parameters_are_refused(name: str, weights: list | None, given: dict, message: str) -> None:
    theta_0, thetas = tensors((3,), 2)
    with pytest.raises(TransplantError, match=message):
        merge(name, theta_0, thetas, weights, **given)


def test_numbers_of_models_are_refused(tmp_path: Path) -> None:
    model = [open_models(write_model(tmp_path / "m"))]
    with pytest.raises(TransplantError, match="slerp merges at most 2 models, not 3"):
        Merger(model * 3, Recipe("slerp"))
    Merger(model * 2, Recipe("slerp"))
    with pytest.raises(TransplantError, match="models are aligned with each other: it needs at least two"):
        Merger(model, Recipe(align="rebasin"))
    with pytest.raises(TransplantError, match="fisher needs volumes to look at: give -d"):
        Merger(model * 2, Recipe("fisher"))


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(TransplantError, match="there is no merging method 'magic'; choose from average, "
                       "task_arithmetic, ties"):
        METHODS.find("magic")


def test_settings_are_applied_one_by_one() -> None:
    """The options of a method, by their names, are what its function is called with: of a method with and without
    whole networks."""
    theta_0, (theta,) = networks(1)
    for name, settings in (("dare", {"density": 1.0, "lambda": 0.5, "combine": "linear", "seed": 0}),
                           ("ties", {"density": 1.0, "lambda": 0.5, "trim": "vector"})):
        merged = merge_tensors(METHODS[name], settings, [1.0], theta_0, [theta]).result
        assert_close(merged, {key: torch.lerp(theta_0[key], tensor, 0.5) for key, tensor in theta.items()})
        with pytest.raises(TypeError):
            merge_tensors(METHODS[name], {**settings, "lambda": 0.5, "other": 1}, [1.0], theta_0, [theta])


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_weights_are_what_the_rule_says(method: Method) -> None:
    """Its text, as the documentation has it, says what is refused and what the default is."""
    def refused(*weights: float) -> bool:
        try:
            return method.weights(weights, len(weights)) != list(weights)
        except TransplantError:
            return True

    text = method.weights_rule.text
    assert refused(1.5, -0.5) == ("not negative" in text or text == "none")
    assert refused(0.5, 0.7) == ("sum to 1" in text or text == "none")
    assert not refused(0.5, 0.5)
    default = re.search(r"default ([\d.]+)$", text)
    for models in (1, 2, 3):
        assert method.weights(None, models) == [float(default[1]) if default else 1 / models] * models


@pytest.mark.parametrize("name", [name for name in DATA_FREE if METHODS[name].weights_rule.text.startswith("free")])
def test_the_size_of_free_weights_counts(name: str) -> None:
    theta_0, thetas = networks(3)
    merged = [merge_networks(name, theta_0, thetas, [scale * weight for weight in (0.5, 0.2, 1.0)])
              for scale in (1.0, 1.5)]
    with pytest.raises(AssertionError):
        assert_close(*merged, rtol=0.01)


def test_a_merge_beyond_the_range_of_its_type_is_refused() -> None:
    theta_0, theta = torch.zeros(3, dtype=torch.float16), torch.full((3,), 6e4, dtype=torch.float16)
    method = METHODS.find("task_arithmetic")
    with pytest.raises(TransplantError, match="beyond the range of torch.float16"):
        merge_tensors(method, {}, [2.0], {"a": theta_0}, [{"a": theta}])
