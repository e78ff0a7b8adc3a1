"""RegMean against explicit matrices, and against what it promises: the least squares."""
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import base_network, small_plans, write_model, write_volumes
from torch import nn

from nnunet_transplant.merging import Recipe, Volumes, merge_folders
from nnunet_transplant.merging.regmean import Sums, as_kernel, as_matrix, input_rows, is_linear

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
    product = rows @ as_matrix(layer)
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
    assert torch.equal(as_kernel(as_matrix(layer), layer), layer.weight)
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
    sums = Sums(torch.zeros(6, 4), torch.device("cpu"))
    left, right = np.zeros((6, 6)), np.zeros((6, 4))
    for x, w, weight in zip(inputs, matrices, weights, strict=True):
        for part in np.split(x, 5):
            sums.add(torch.from_numpy(part).float(), torch.from_numpy(w).float(), weight)
        gram = alpha * x.T @ x + (1 - alpha) * np.diag(np.diag(x.T @ x))
        left += weight * gram
        right += weight * gram @ w
    np.testing.assert_allclose(sums.solve(alpha).numpy(), np.linalg.solve(left, right), rtol=1e-3, atol=1e-4)


def test_inputs_that_are_never_seen_take_the_mean_and_equal_ones_do_not_explode() -> None:
    sums = Sums(torch.zeros(3, 2), torch.device("cpu"))
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    rows[:, 1], rows[:, 2] = 0, rows[:, 0]  # one input is always zero, two are always the same
    matrix = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    sums.add(rows, matrix, 1.0)
    sums.mean.add_(matrix)
    solved = sums.solve(1.0)
    assert torch.isfinite(solved).all()
    assert torch.equal(solved[1], matrix[1])
    torch.testing.assert_close(rows @ solved, rows @ matrix, rtol=1e-3, atol=1e-3)


@pytest.fixture
def volumes(tmp_path: Path, nnunet_folders: None) -> Volumes:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, shape=(16, 16, 16))
    return Volumes([501], 2)


@pytest.mark.parametrize("dim", [2, 3])
def test_one_model_and_equal_models_come_out_as_they_are(tmp_path: Path, volumes: Volumes, dim: int) -> None:
    model = write_model(tmp_path / "A", {"background": 0, "A": 1}, plans=small_plans(dim, residual=dim == 2))
    theta = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for group in ([model], [model, model]):
        merged = merge_folders(group, recipe=Recipe("regmean", volumes=volumes))["all"]
        for name, tensor in theta.items():
            torch.testing.assert_close(merged.weights[name], tensor, rtol=1e-2, atol=1e-3)


def test_the_first_layer_is_the_least_squares_of_both_models(tmp_path: Path, volumes: Volumes) -> None:
    """Its inputs are the same image in both models, so its least squares are the mean of the kernels; deeper layers,
    whose inputs differ, are not their mean."""
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i, step=0.2)
              for i, name in enumerate("AB")]
    recipe = Recipe("regmean", parameters={"off_diagonal": 1.0, "positions": 10 ** 6}, volumes=volumes)
    merged = merge_folders(models, recipe=recipe)["all"].weights
    average = merge_folders(models)["all"].weights
    first, deep = "encoder.stages.0.0.convs.0.conv.weight", "encoder.stages.2.0.convs.0.conv.weight"
    torch.testing.assert_close(merged[first], average[first], rtol=1e-2, atol=1e-3)
    assert not torch.allclose(merged[deep], average[deep], rtol=1e-2, atol=1e-2)
    assert torch.equal(merged["encoder.stages.0.0.convs.0.norm.weight"],
                       average["encoder.stages.0.0.convs.0.norm.weight"])
