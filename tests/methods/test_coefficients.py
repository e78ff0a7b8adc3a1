"""Coefficients found by gradient descent: the gradient, the losses, and what comes out."""
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_models import experts_of, with_merged_heads
from factory import base_network, write_model, write_volumes

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts
from nnunet_transplant.loss import Loss, segmentation_loss
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.methods.coefficients import START, descend, entropy
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.vectors import TaskVectors
from nnunet_transplant.volumes import Volumes

LABELS = {"background": 0, "A": 1, "B": 2}


@pytest.fixture
def models(tmp_path: Path, nnunet_folders: None) -> list[Path]:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(16, 16, 16))
    base = base_network()
    return [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i) for i, name in enumerate("AB")]


def plain_entropy(logits: np.ndarray, rows: list[int], regions: bool) -> float:
    """Voxel by voxel: -p log p - (1 - p) log (1 - p), the mean weighted with p, then over structures."""
    each = []
    for row in rows:
        total = weight = 0.0
        scores = logits[:, row] - (0 if regions else logits[:, 0])
        for z in scores.ravel():
            p = 1 / (1 + np.exp(-z))
            total += p * (-p * np.log(p) - (1 - p) * np.log(1 - p))
            weight += p
        each.append(total / weight)
    return float(np.mean(each))


@pytest.mark.parametrize("regions", [False, True])
def test_entropy_is_its_definition(regions: bool) -> None:
    logits = 3 * torch.randn(2, 3, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    rows = [0, 1, 2] if regions else [1, 2]
    assert float(entropy(logits, rows, regions)) == pytest.approx(plain_entropy(logits.double().numpy(), rows, regions),
                                                                  rel=1e-4)
    extreme = torch.full((1, 3, 2, 2), 500.0)
    extreme[:, 1] = -500.0
    assert torch.isfinite(entropy(extreme, rows, regions))


def loss_of(experts: Experts) -> Loss:
    return segmentation_loss(experts.plans, experts.dataset_json, experts.configuration.batch_dice, experts.device)


@pytest.mark.parametrize("per", ["task", "tensor"])
def test_the_gradient_is_that_of_the_coefficients(tmp_path: Path, models: list[Path], per: str) -> None:
    """Adam's first step goes by lr against the sign of the gradient: compared with differences of the loss."""
    experts = experts_of(models, Volumes([501], 1))
    thetas = [{name: model.tensors()[name] for name in model.layout.body} for model in experts.models]
    vectors = TaskVectors(experts.models[0].theta_0(), thetas, [0.4, 0.2])
    found = descend(vectors, experts, lambda logits, _: logits.square().mean(), per, iterations=1, lr=1e-3, seed=0)
    network = experts.merged_network(with_merged_heads(experts)).double()
    parameters = dict(network.named_parameters(remove_duplicate=False))
    image = experts.images(experts.patches[:1]).double()

    def loss(coefficients: dict[str, list[float]]) -> float:
        for name in vectors.names:
            base = vectors.theta_0[name].double()
            parameters[name].data = base + sum(
                c * (theta[name].double() - base) for c, theta in zip(coefficients[name], thetas, strict=True))
        return float(network(image).square().mean())
    checked = vectors.names if per == "task" else ["decoder.stages.1.convs.0.all_modules.1.weight"]
    for task in (0, 1):
        values = []
        for sign in (1, -1):
            moved = {name: [0.4, 0.2] for name in vectors.names}
            for name in checked:
                moved[name] = [c + sign * 1e-4 * (t == task) for t, c in enumerate((0.4, 0.2))]
            values.append(loss(moved))
        slope = (values[0] - values[1]) / 2e-4
        assert abs(slope) > 1e-6
        assert float(found[checked[0]][task]) == pytest.approx((0.4, 0.2)[task] - 1e-3 * np.sign(slope), abs=1e-5)
    same = {tuple(each.tolist()) for each in found.values()}
    assert len(same) == 1 if per == "task" else len(same) > 2


def test_learned_coefficients_lower_nnunets_loss_and_are_recorded(tmp_path: Path, models: list[Path]) -> None:
    experts = experts_of(models, Volumes([501], 2))
    loss = loss_of(experts)

    def of(weights: dict[str, torch.Tensor]) -> float:
        network = experts.merged_network(with_merged_heads(experts))
        network.load_state_dict(weights)
        with torch.no_grad():
            return float(loss(network(experts.images(experts.patches)), list(experts.patches)))
    start = merge_folders(models, recipe=Recipe("task_arithmetic", weights=[START, START]))["all"]
    recipe = Recipe("learned", parameters={"per": "task", "iterations": 20, "lr": 0.05}, volumes=Volumes([501], 2))
    learned = merge_folders(models, recipe=recipe)["all"]
    assert of(learned.state_dict) < of(start.state_dict)
    coefficients = learned.provenance["found"]["coefficients"]
    assert len(coefficients) == 2 and coefficients != [START, START]
    by_hand = merge_folders(models, recipe=Recipe("task_arithmetic", weights=coefficients))["all"]
    body = open_models(models[0])[0].layout.body
    for name in body:
        torch.testing.assert_close(learned.state_dict[name], by_hand.state_dict[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["adamerging", "learned"])
def test_without_a_step_the_start_comes_out(models: list[Path], method: str) -> None:
    """lr 0: the weights are where the search starts."""
    merged = merge_folders(models, recipe=Recipe(method, weights=[1.0, 0.0], parameters={"iterations": 1, "lr": 0.0},
                                                 volumes=Volumes([501], 1)))["all"]
    first = open_models(models[0])[0]
    for name in first.layout.body:
        torch.testing.assert_close(merged.state_dict[name], first.tensors()[name], rtol=1e-5, atol=1e-6)


def test_adamerging_makes_the_model_more_decided(tmp_path: Path, models: list[Path]) -> None:
    experts = experts_of(models, Volumes([501], 1))

    def of(weights: dict[str, torch.Tensor]) -> float:
        network = experts.merged_network(with_merged_heads(experts))
        network.load_state_dict(weights)
        with torch.no_grad():
            return float(entropy(network(experts.images(experts.patches)), [1, 2], False))
    start = merge_folders(models, recipe=Recipe("task_arithmetic", weights=[START, START]))["all"]
    recipe = Recipe("adamerging", parameters={"iterations": 15, "lr": 0.05}, volumes=Volumes([501], 1))
    assert of(merge_folders(models, recipe=recipe)["all"].state_dict) < of(start.state_dict)


def test_the_loss_leaves_out_ignored_voxels(tmp_path: Path, models: list[Path]) -> None:
    raw = tmp_path / "raw"
    write_volumes(raw, "Dataset502_Ignore", {**LABELS, "ignore": 3}, cases=1, shape=(16, 16, 16))
    write_volumes(raw, "Dataset503_RegionIgnore", {"background": 0, "a": 1, "b": 2, "ignore": 3}, cases=1,
                  shape=(16, 16, 16))
    regions = write_model(tmp_path / "regions", {"background": 0, "whole": [1, 2], "core": 2}, [1, 2],
                          nnunet_transplant={"classes": {"whole": ["a", "b"], "core": ["b"]}})
    for group, dataset in ((models, 502), ([regions], 503)):
        experts = experts_of(group, Volumes([dataset], 1))
        loss, patches = loss_of(experts), list(experts.patches)
        logits = torch.randn(1, 3 if dataset == 502 else 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        changed = torch.where(torch.from_numpy(patches[0].values == 3), 7.0, logits)
        assert float(loss(changed, patches)) == pytest.approx(float(loss(logits, patches)), rel=1e-6)


def test_labels_that_are_missing_are_refused_before_the_work(tmp_path: Path, models: list[Path]) -> None:
    write_volumes(tmp_path / "raw", "Dataset502_Other", {"background": 0, "A": 1}, shape=(16, 16, 16))
    with pytest.raises(TransplantError, match="has no label B"):
        merge_folders(models, recipe=Recipe("learned", volumes=Volumes([502], 1)))
