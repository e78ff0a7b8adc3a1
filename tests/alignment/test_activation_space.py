"""Correlations of activations against numpy.corrcoef of what ordinary hooks on the modules see."""
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from permuted import canonical, network_of, plans_of, spec_of, tensors_of
from torch import nn

from nnunet_transplant.alignment.activation_space import VOXELS, Moments, activation_similarity, some
from nnunet_transplant.alignment.graph import Run, exported

# Which modules' outputs show the units of each group, after the nonlinearity; of a residual stream every output that
# other layers read; of a transposed convolution what it makes, which meets no nonlinearity of its own.
PLAIN = {"encoder.stages.0.0.convs.0": ["encoder.stages.0.0.convs.0"],
         "encoder.stages.1.0.convs.0": ["encoder.stages.1.0.convs.0"],
         "encoder.stages.2.0.convs.0": ["encoder.stages.2.0.convs.0"],
         "stages.0.convs.0": ["stages.0.convs.0"], "stages.1.convs.0": ["stages.1.convs.0"],
         "transpconvs.0": ["transpconvs.0"], "transpconvs.1": ["transpconvs.1"]}
RESIDUAL = {"encoder.stem.convs.0": ["encoder.stem.convs.0", "encoder.stages.0.blocks.0"],
            "encoder.stages.0.blocks.0.conv1": ["encoder.stages.0.blocks.0.conv1"],
            "encoder.stages.1.blocks.0.conv1": ["encoder.stages.1.blocks.0.conv1"],
            "encoder.stages.1.blocks.0.conv2": ["encoder.stages.1.blocks.0"],
            "encoder.stages.2.blocks.0.conv1": ["encoder.stages.2.blocks.0.conv1"],
            "encoder.stages.2.blocks.0.conv2": ["encoder.stages.2.blocks.0"],
            "stages.0.convs.0": ["stages.0.convs.0"], "stages.1.convs.0": ["stages.1.convs.0"],
            "transpconvs.0": ["transpconvs.0"], "transpconvs.1": ["transpconvs.1"]}


def seen_by_hooks(network: nn.Module, modules: set[str], images: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """(units, voxels of all images) of each module's output, float64."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in modules}

    def watch(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            seen[name].append(output[0].flatten(1).double().numpy().copy())  # before anything overwrites it
        return hook
    handles = [network.decoder.get_submodule(name).register_forward_hook(watch(name)) for name in modules]
    with torch.no_grad():
        for image in images:
            network(image)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts, axis=1) for name, parts in seen.items()}


@pytest.mark.parametrize(("kind", "shows"), [("plain3d", PLAIN), ("residual2d", RESIDUAL), ("batch2d", PLAIN)])
def test_equals_corrcoef_of_what_hooks_see(kind: str, shows: dict[str, list[str]]) -> None:
    """Patches with very different means: a batch norm does not take them away."""
    plans = plans_of(kind)
    dim = int(kind[-2])
    networks = [network_of(plans, seed=seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(1, 1, *[16] * dim, generator=generator) + offset for offset in (0.0, 40.0, -15.0)]
    found = activation_similarity(spec_of(plans), exported(network_of(plans).to("meta"), images[0].shape),
                                  [tensors_of(network, canonical(plans)) for network in networks], iter(images))
    assert set(found) == {f"decoder.{name}" + ".all_modules.0" * ("transp" not in name) for name in shows}
    hooked = [seen_by_hooks(network, {name for names in shows.values() for name in names}, images)
              for network in networks]
    for group, modules in shows.items():
        expected = np.mean([np.corrcoef(np.concatenate([each[module] for each in hooked])) for module in modules],
                           axis=0)
        name = f"decoder.{group}" + ".all_modules.0" * ("transp" not in group)
        np.testing.assert_allclose(found[name], expected, atol=2e-5)


def random_values(voxels: int, offset: float, rng: np.random.Generator) -> list[torch.Tensor]:
    """Of two models with 4 units each, half of what they say in common."""
    common = rng.normal(size=(1, voxels))
    return [torch.from_numpy(common + rng.normal(size=(4, voxels)) + offset * np.arange(1, 5)[:, None]).float()
            for _ in range(2)]


@pytest.mark.parametrize("offset", [0.0, 1e3, -3e4])
def test_large_offsets_cost_no_precision(offset: float) -> None:
    """Sums of squares in float32 would have lost all of the variance."""
    rng = np.random.default_rng(0)
    moments, patches = Moments(), [random_values(4 * 20 * 25, offset + shift, rng) for shift in (0.0, 0.5, -2.0)]
    for values in patches:
        moments.add(values)
    everything = np.concatenate([torch.cat(values).double().numpy() for values in patches], axis=1)
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(everything), atol=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.1, -1234.567])
def test_constant_units_are_like_nothing(level: float) -> None:
    rng = np.random.default_rng(2)
    moments = Moments()
    for _ in range(3):
        values = random_values(1000, 5.0, rng)
        values[0][1], values[1][3] = level, level
        moments.add(values)
    found = moments.correlation()
    for dead in (1, 7):
        assert not found[dead].any() and not found[:, dead].any()
    alive = [0, 2, 3, 4, 5, 6]
    assert np.abs(found[np.ix_(alive, alive)]).min() > 0.1 and np.isfinite(found).all()
    np.testing.assert_allclose(found.diagonal()[alive], 1, atol=1e-6)


def test_where_all_units_are_constant_nothing_is_alike() -> None:
    moments = Moments()
    for _ in range(2):
        moments.add([torch.linspace(-3, 7.7, 4)[:, None].expand(4, 999)] * 2)
    assert not moments.correlation().any()


def test_memory_does_not_grow_with_voxels() -> None:
    """Two models of 4 units: sums of 8 units and of their 8 x 8 products, after one voxel or many."""
    rng = np.random.default_rng(3)
    for voxels in (1, 10, 2 * VOXELS + 5):
        moments = Moments()
        for _ in range(2):
            moments.add(random_values(voxels, 0.0, rng))
        kept = [value for value in vars(moments).values() if isinstance(value, torch.Tensor)]
        assert sum(value.untyped_storage().nbytes() // value.element_size() for value in kept) == 8 + 8 + 8 * 8


def test_of_many_voxels_some_are_taken_the_same_of_every_model() -> None:
    """Which say nearly what all of them say. Few are taken as they are."""
    rng = np.random.default_rng(4)
    one, other = random_values(4 * VOXELS, 3.0, rng)
    taken = [some(values, torch.Generator().manual_seed(7)) for values in (one, other)]
    columns = {tuple(column): index for index, column in enumerate(one.T.tolist())}
    places = [columns[tuple(column)] for column in taken[0].T.tolist()]
    assert len(places) == VOXELS and len(set(places)) > 0.8 * VOXELS
    assert torch.equal(taken[1], other[:, places])
    moments = Moments()
    moments.add(taken)
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(torch.cat([one, other]).double().numpy()), atol=0.03)
    few = one[:, :VOXELS]
    assert torch.equal(some(few, torch.Generator()), few)


def test_one_model_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that memory is that of one, however many there are."""
    plans = plans_of("plain2d")
    networks = [tensors_of(network_of(plans, seed=seed), canonical(plans)) for seed in range(3)]
    program = exported(network_of(plans).to("meta"), (1, 1, 16, 16))
    at_once: list[int] = []
    run = Run.__call__

    def watched(self: Run, networks: list, image: torch.Tensor) -> Iterator:
        at_once.append(len(networks))
        return run(self, networks, image)
    monkeypatch.setattr(Run, "__call__", watched)
    activation_similarity(spec_of(plans), program, networks, iter([torch.randn(1, 1, 16, 16)] * 2))
    assert at_once == [1] * 6
