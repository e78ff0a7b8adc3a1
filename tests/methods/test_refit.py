"""Least squares layer by layer against the explicit solution, and models that it must give back as they are."""
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import random_network, small_plans, write_model, write_volumes
from torch.nn import functional

from nnunet_transplant.alignment.graph import exported, input_shape, meta_network
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.methods.refit import Layer, LeastSquares, layers, rows, solve
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Volumes, open_patches

LABELS = {"background": 0, "Liver": 1, "Spleen": 2, "left": 3, "right": 4}


def batch_normed(dim: int) -> dict:
    plans = small_plans(dim)
    arch = next(iter(plans["configurations"].values()))["architecture"]["arch_kwargs"]
    arch["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{dim}d"
    return plans


@pytest.fixture
def volumes(tmp_path: Path, nnunet_folders: None) -> Volumes:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS)
    return Volumes([501], 2, n_patches=1000)  # all: the experts of these tests choose none


def opened(path: Path) -> TrainedModel:
    return open_models(path)[0]


def layers_of(model: TrainedModel) -> list[Layer]:
    return layers(exported(meta_network(model, model.trainer), input_shape(model)), model.layout.body)


@pytest.mark.parametrize(("dim", "residual"), [(2, False), (3, False), (3, True)])
def test_every_convolution_is_a_layer_but_the_heads(tmp_path: Path, dim: int, residual: bool) -> None:
    model = opened(write_model(tmp_path / "m", plans=small_plans(dim, residual)))
    kernels = {name for name in model.layout.body if len(model.layout.shapes[name]) > 1}
    found = layers_of(model)
    assert {layer.weight for layer in found} == kernels and len(found) == len(kernels)
    for layer in found:
        assert layer.transposed == ("transpconvs" in layer.weight) == (layer.norm is None)
        if layer.norm is not None:  # the norm's tensors are those of the same block
            assert layer.scale.rpartition(".all_modules")[0] == layer.weight.rpartition(".all_modules")[0]


@pytest.mark.parametrize("dim", [2, 3])
def test_rows_times_the_kernel_are_the_layers_output(tmp_path: Path, dim: int) -> None:
    model = opened(write_model(tmp_path / "m", plans=small_plans(dim)))
    tensors = model.tensors()
    for layer in layers_of(model):
        weight = tensors[layer.weight]
        channels = weight.shape[0 if layer.transposed else 1]
        inputs = torch.randn(1, channels, *[8] * dim)
        stride = [int(s) for s in (layer.node.args[3] if len(layer.node.args) > 3 else [1] * dim)]
        if layer.transposed:
            output = getattr(functional, f"conv_transpose{dim}d")(inputs, weight, stride=stride)
        else:
            output = getattr(functional, f"conv{dim}d")(inputs, weight, stride=stride, padding=1)
        x, y = rows(layer, inputs, output, 50, torch.Generator().manual_seed(1))
        matrix = weight.flatten(1) if layer.transposed else weight.flatten(1).T
        assert len(x) == min(50, output[0, 0].numel() // (2 ** dim if layer.transposed else 1))
        torch.testing.assert_close(x @ matrix, y, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_the_ridge_solution() -> None:
    """(X^T X + r I)^-1 (X^T Y + r W_0 a), X and Y without the means of each patch, a the best scale of each output."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((3, 2, 2, 2))).float()
    sums, centred_x, centred_y = LeastSquares(weight, False), [], []
    for patch in range(3):
        x = rng.standard_normal((20, 8)) + 5 * patch
        y = rng.standard_normal((20, 3)) - patch
        sums.add(torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.ones(3))
        centred_x.append(x - x.mean(0))
        centred_y.append(y - y.mean(0))
    x, y = np.concatenate(centred_x), np.concatenate(centred_y)
    prior = weight.double().numpy().reshape(3, -1).T
    fitted = x @ prior
    prior = prior * (fitted * y).sum(0) / (fitted ** 2).sum(0)
    for ridge in (1e-3, 0.5, 100.0):
        amount = ridge * np.mean(np.diag(x.T @ x))
        expected = np.linalg.solve(x.T @ x + amount * np.eye(8), x.T @ y + amount * prior)
        np.testing.assert_allclose(sums.kernel(ridge).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_the_norm_gets_the_scale_and_shift_of_least_squares(tmp_path: Path) -> None:
    """Of all scales and shifts of the normalised output of the new kernel, those nearest to the target."""
    model = opened(write_model(tmp_path / "m"))
    layer = layers_of(model)[1]
    tensors = {name: tensor.float() for name, tensor in model.tensors().items()}
    weight = tensors[layer.weight]
    sums = LeastSquares(weight, False)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, weight[0].numel(), generator=rng)
    y = x @ torch.randn(x.shape[1], len(weight), generator=rng) + 3 * torch.randn(400, len(weight), generator=rng) + 7
    sums.add(x, y, torch.ones(len(weight)))
    found = solve(layer, sums, tensors, 0.1)
    made = x @ found[layer.weight].flatten(1).T
    normalised = ((made - made.mean(0)) / made.std(0, correction=0)).double().numpy()
    for unit in range(len(weight)):
        scale, shift = np.polyfit(normalised[:, unit], y[:, unit].double().numpy(), 1)
        assert float(found[layer.scale][unit]) == pytest.approx(scale, rel=1e-3)
        assert float(found[layer.shift][unit]) == pytest.approx(shift, rel=1e-3)
    assert not found[layer.bias].any()


@pytest.mark.parametrize(("dim", "residual"), [(2, False), (3, False), (3, True)])
def test_equal_models_stay_the_same_function(tmp_path: Path, volumes: Volumes, dim: int, residual: bool) -> None:
    plans = small_plans(dim, residual)
    model = write_model(tmp_path / "m", LABELS, plans=plans, seed=3)
    merged = merge_folders([model, model], recipe=Recipe("refit", volumes=volumes, parameters={
        "positions": 10 ** 6}))["all"]
    network = random_network(plans, merged.dataset_json, 0).eval()
    image = torch.randn(1, 1, *[32] * dim)
    outputs = []
    for weights in (opened(model).state_dict(), merged.state_dict):
        network.load_state_dict(weights)
        with torch.no_grad():
            outputs.append(network(image)[0])
    # but for the norm's eps, which least squares does not know
    assert float((outputs[0] - outputs[1]).abs().max()) < 5e-3 * float(outputs[0].std())


@pytest.mark.parametrize("dim", [2, 3])
def test_batch_norms_get_the_statistics_of_what_their_new_kernels_make(tmp_path: Path, volumes: Volumes,
                                                                       dim: int) -> None:
    plans = batch_normed(dim)
    model = write_model(tmp_path / "m", LABELS, plans=plans, seed=3)
    first = layers_of(opened(model))[0]
    merged = merge_folders([model, model], recipe=Recipe("refit", volumes=volumes, parameters={
        "positions": 10 ** 6}))["all"].state_dict
    made = [getattr(functional, f"conv{dim}d")(patch.image[None], merged[first.weight], padding=1)[0].flatten(1)
            for patch in open_patches(volumes, opened(model))]
    made = torch.cat(made, 1)
    torch.testing.assert_close(merged[first.mean], made.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(merged[first.variance], made.var(1, correction=0), rtol=1e-3, atol=1e-4)


def test_it_is_nearer_to_the_models_than_their_average(tmp_path: Path, volumes: Volumes) -> None:
    """Of unrelated models: behind the first norm, where both merged models read the same image."""
    models = [write_model(tmp_path / name, LABELS, seed=seed) for seed, name in enumerate("ab")]
    opened_models = [opened(model) for model in models]
    first = layers_of(opened_models[0])[0]
    patches = open_patches(volumes, opened_models[0])

    def behind_the_norm(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = []
        for patch in patches:
            made = functional.conv3d(patch.image[None], weights[first.weight], weights[first.bias], padding=1)
            outputs.append(functional.instance_norm(made, weight=weights[first.scale], bias=weights[first.shift]))
        return torch.cat(outputs)
    target = sum(behind_the_norm(model.tensors()) for model in opened_models) / 2
    errors = {}
    for method, parameters in (("average", {}), ("refit", {"ridge": 1e-4, "positions": 10 ** 6})):
        recipe = Recipe(method, parameters=parameters, volumes=volumes if parameters else None)
        merged = merge_folders(models, recipe=recipe)["all"].state_dict
        errors[method] = float((behind_the_norm(merged) - target).square().mean())
    assert errors["refit"] < errors["average"]
