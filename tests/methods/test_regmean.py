"""RegMean against explicit matrices, and against what it promises: the least squares."""
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_models import experts_of
from factory import base_network, small_plans, write_model, write_volumes
from torch import nn

from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.methods import regmean
from nnunet_transplant.methods.regmean import Sums, as_kernel, as_matrix, input_rows, is_linear
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Volumes

LAYERS = [nn.Conv3d(2, 3, 3, padding=1), nn.Conv3d(3, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
          nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.Conv3d(4, 2, 1), nn.ConvTranspose3d(3, 2, 2, stride=2),
          nn.ConvTranspose2d(4, 3, (1, 2), stride=(1, 2))]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_rows_times_matrix_is_what_the_layer_does(layer: nn.Module) -> None:
    assert is_linear(layer)
    dims = layer.weight.dim() - 2
    inputs = torch.randn(1, layer.in_channels, *(6, 5, 7)[:dims], generator=torch.Generator().manual_seed(0))
    rows = input_rows(layer, inputs, 10 ** 6, torch.Generator())
    outputs = layer(inputs) - layer.bias.reshape(1, -1, *[1] * dims)
    product = rows @ as_matrix(layer.weight, layer)
    if layer.transposed:  # (voxels, out x kernel): each input voxel makes a block of output voxels
        blocks = nn.functional.unfold(outputs, layer.kernel_size, stride=layer.stride) if dims == 2 else None
        if dims == 2:
            product, expected = product.T, blocks[0]
        else:
            cut = outputs[0].unfold(1, 2, 2).unfold(2, 2, 2).unfold(3, 2, 2)
            expected = cut.permute(1, 2, 3, 0, 4, 5, 6).reshape(len(rows), -1)
    else:
        expected = outputs[0].flatten(1).T
    torch.testing.assert_close(product, expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(as_kernel(as_matrix(layer.weight, layer), layer), layer.weight)
    assert len(input_rows(layer, inputs, 7, torch.Generator())) == 7


def test_layers_that_are_no_plain_matrices_are_left_to_the_mean() -> None:
    for layer in (nn.Conv3d(4, 4, 3, groups=2), nn.Conv3d(2, 2, 3, dilation=2), nn.ConvTranspose3d(2, 2, 3, stride=2),
                  nn.InstanceNorm3d(2, affine=True)):
        assert not is_linear(layer)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_solution_is_the_papers_formula(alpha: float) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(50, 6)) for _ in range(3)]
    inputs[1] *= 10
    matrices, weights = [rng.normal(size=(6, 4)) for _ in range(3)], [0.2, 0.3, 0.5]
    sums = Sums(torch.zeros(6, 4))
    left, right = np.zeros((6, 6)), np.zeros((6, 4))
    for x, w, weight in zip(inputs, matrices, weights, strict=True):
        sums.add(torch.from_numpy(x.T @ x).float(), torch.from_numpy(w).float(), weight, alpha)
        gram = alpha * x.T @ x + (1 - alpha) * np.diag(np.diag(x.T @ x))
        left += weight * gram
        right += weight * gram @ w
    np.testing.assert_allclose(sums.solution().numpy(), np.linalg.solve(left, right), rtol=1e-3, atol=1e-4)


def test_inputs_that_are_never_seen_take_the_mean_and_equal_ones_do_not_explode() -> None:
    sums = Sums(torch.zeros(3, 2))
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    rows[:, 1], rows[:, 2] = 0, rows[:, 0]  # one input is always zero, two are always the same
    matrix = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    sums.add(rows.T @ rows, matrix, 1.0, 1.0)
    solved = sums.solution()
    assert torch.isfinite(solved).all()
    assert torch.equal(solved[1], matrix[1])
    torch.testing.assert_close(rows @ solved, rows @ matrix, rtol=1e-3, atol=1e-3)


@pytest.fixture
def volumes(tmp_path: Path, nnunet_folders: None) -> Volumes:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, shape=(16, 16, 16))
    return Volumes([501], 2)


def test_half_of_the_products_and_a_mirror_make_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regmean, "BLOCK", 3)
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    gram = torch.zeros(8, 8)
    for _ in range(2):
        regmean.add_products(gram, rows)
    regmean.mirror(gram)
    torch.testing.assert_close(gram, 2 * rows.T @ rows)


@pytest.mark.parametrize("dim", [2, 3])
def test_gram_matrices_are_of_what_the_layers_see(tmp_path: Path, volumes: Volumes, dim: int) -> None:
    """Row by row from what comes into each layer, patch by patch; and of no more rows than a layer may take."""
    experts = experts_of([write_model(tmp_path / "A", {"background": 0, "A": 1}, plans=small_plans(dim))], volumes)
    network = experts.network(0)
    layers = {name: module for name, module in regmean.module_weights(network).items()
              if name in experts.models[0].layout.body and is_linear(module)}
    expected = {name: np.zeros([len(as_matrix(layer.weight, layer))] * 2) for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def look(name: str, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        image = inputs[0][0].double().numpy()
        if layer.transposed:
            rows = image.reshape(len(image), -1).T
        else:
            image = np.pad(image, [(0, 0), *[(pad, pad) for pad in layer.padding]])
            seen = np.lib.stride_tricks.sliding_window_view(image, layer.kernel_size, tuple(range(1, dim + 1)))
            seen = seen[(slice(None), *(slice(None, None, step) for step in layer.stride))]
            rows = np.moveaxis(seen, 0, dim).reshape(-1, len(expected[name]))
        expected[name] += rows.T @ rows
        counts[name] += len(rows)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(partial(look, name))
    for patch in experts.patches:
        network(experts.images([patch]))
    assert len(experts.patches) > 1 and len(layers) > 5 and all(counts.values())
    found = regmean.grams(experts, 0, layers, 10 ** 6, 10 ** 6, 0)
    for name, gram in expected.items():
        np.testing.assert_allclose(found[name].numpy(), gram, rtol=1e-4, atol=1e-4 * gram.max())
    for name, gram in regmean.grams(experts, 0, layers, 2, 10 ** 6, 0).items():  # two rows of each patch
        assert 0 < int(torch.linalg.matrix_rank(gram)) <= 2 * len(experts.patches)
        assert 0 < float(gram.trace()) < float(found[name].trace())


@pytest.mark.parametrize("dim", [2, 3])
def test_one_model_and_equal_models_come_out_as_they_are(tmp_path: Path, volumes: Volumes, dim: int) -> None:
    model = write_model(tmp_path / "A", {"background": 0, "A": 1}, plans=small_plans(dim, residual=dim == 2))
    theta = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for group in ([model], [model, model]):
        merged = merge_folders(group, recipe=Recipe("regmean", volumes=volumes))["all"]
        for name, tensor in theta.items():
            torch.testing.assert_close(merged.state_dict[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_first_layer_is_the_least_squares_of_both_models(tmp_path: Path, volumes: Volumes) -> None:
    """Its inputs are the same image in both models, so its least squares are the mean of the kernels; deeper layers,
    whose inputs differ, are not their mean."""
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i, step=0.2)
              for i, name in enumerate("AB")]
    recipe = Recipe("regmean", parameters={"off_diagonal": 1.0, "positions": 10 ** 6, "rows": 10 ** 6}, volumes=volumes)
    merged = merge_folders(models, recipe=recipe)["all"].state_dict
    average = merge_folders(models)["all"].state_dict
    first, deep = "encoder.stages.0.0.convs.0.conv.weight", "encoder.stages.2.0.convs.0.conv.weight"
    torch.testing.assert_close(merged[first], average[first], rtol=1e-2, atol=1e-3)
    assert not torch.allclose(merged[deep], average[deep], rtol=1e-2, atol=1e-2)
    assert torch.equal(merged["encoder.stages.0.0.convs.0.norm.weight"],
                       average["encoder.stages.0.0.convs.0.norm.weight"])


@pytest.fixture
def two(tmp_path: Path, volumes: Volumes) -> tuple[list, Recipe]:
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i, step=0.2)
              for i, name in enumerate("AB")]
    return [open_models(model) for model in models], Recipe("regmean", volumes=volumes)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Of the passes through a model's network."""
    calls, grams = [], regmean.grams

    def counted(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        return grams(*arguments)
    monkeypatch.setattr(regmean, "grams", counted)
    return calls


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_gram_matrices_are_made_once_for_many_weights(two: tuple[list, Recipe], calls: list[tuple]) -> None:
    """By a Merger that merges several times, also with another factor off the diagonal; what comes out is what a new
    one makes."""
    groups, recipe = two
    merger = Merger(groups, recipe)
    merged = {(weights, alpha): merger.merge(weights, off_diagonal=alpha).state_dict
              for weights in ((0.5, 0.5), (0.2, 0.8)) for alpha in (0.9, 0.3)}
    assert len(calls) == 2  # one for each model
    states = list(merged.values())
    assert not any(same(one, other) for i, one in enumerate(states) for other in states[:i])
    for (weights, alpha), state in merged.items():
        assert same(state, Merger(groups, replace(recipe, weights=weights)).merge(off_diagonal=alpha).state_dict)
    calls.clear()
    assert not same(merger.merge((0.5, 0.5), seed=1).state_dict, merged[(0.5, 0.5), 0.9])  # other voxels
    assert len(calls) == 2


def test_without_room_for_them_they_are_made_again_to_the_same_end(two: tuple[list, Recipe], calls: list[tuple],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers at once, or a layer at a time."""
    groups, recipe = two
    recipe = replace(recipe, parameters={"positions": 10 ** 6, "rows": 10 ** 6})  # all voxels: none are drawn
    expected = [Merger(groups, recipe).merge(weights).state_dict for weights in ((0.5, 0.5), (0.2, 0.8))]
    layers = [name for name in groups[0][0].layout.body if len(groups[0][0].layout.shapes[name]) > 1]
    for budget, passes in ((sum(4 * size ** 2 for size in inputs_of(groups[0][0])), 1), (1, len(layers))):
        monkeypatch.setattr(regmean, "memory_left", lambda device, budget=budget: math.ceil(budget / regmean.MEMORY))
        merger = Merger(groups, recipe)
        for weights, state in zip(((0.5, 0.5), (0.2, 0.8)), expected, strict=True):
            calls.clear()
            found = merger.merge(weights).state_dict
            assert len(calls) == 2 * passes
            for name, tensor in state.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def inputs_of(model: TrainedModel) -> list[int]:
    """How many numbers each layer of the body reads."""
    sizes = []
    for name in model.layout.body:
        shape = model.layout.shapes[name]
        if len(shape) > 1:
            sizes.append(shape[0] if "transpconvs" in name else int(np.prod(shape[1:])))
    return sizes
