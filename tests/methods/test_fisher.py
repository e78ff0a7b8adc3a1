"""Fisher-weighted averaging against the definition, patch by patch."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_models import experts_of
from factory import base_network, write_model, write_volumes

from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.methods import fisher
from nnunet_transplant.methods.fisher import FLOOR, diagonal, log_likelihood, sampled
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import IGNORED, Volumes

LABELS = {"background": 0, "Liver": 1, "Spleen": 2}


@pytest.fixture
def models(tmp_path: Path, nnunet_folders: None) -> list[Path]:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(16, 16, 16))
    base = base_network()
    return [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i)
            for i, name in enumerate(("Liver", "Spleen"))]


def test_the_diagonal_is_the_mean_squared_gradient(tmp_path: Path, models: list[Path]) -> None:
    """Against differences of the log-likelihood, (log p(theta + h) - log p(theta - h)) / 2 h, entry by entry."""
    experts = experts_of(models, Volumes([501], 2))
    name, h = "encoder.stages.0.0.convs.0.all_modules.0.weight", 1e-3
    names = list(experts.models[0].layout.body)
    name = experts.models[0].layout.canonical[name]
    found = diagonal(experts, 0, names, "dataset", 0)
    network = experts.network(0).double()
    weight = dict(network.named_parameters(remove_duplicate=False))[name]
    entries = [(0, 0, 0, 0, 0), (1, 0, 1, 2, 1), (3, 0, 2, 2, 2)]
    squares = []
    for entry in entries:
        total = 0.0
        for patch in experts.patches:
            image = experts.images([patch]).double()
            target = torch.from_numpy((patch.values == 1).astype(np.int64))[None]
            values = []
            for sign in (1, -1):
                weight.data[entry] += sign * h
                log_p = torch.log_softmax(network(image), 1)
                values.append(float(log_p.gather(1, target[:, None]).mean()))
                weight.data[entry] -= sign * h
            total += ((values[0] - values[1]) / (2 * h)) ** 2
        squares.append(total)
    ours = [float(found[name][entry]) for entry in entries]
    np.testing.assert_allclose(np.array(ours) / ours[1], np.array(squares) / squares[1], rtol=2e-2)
    everything = torch.cat([each.reshape(-1) for each in found.values()])
    assert abs(float(everything.mean()) - 1) < 1e-3 and float(everything.min()) >= 0


def test_the_merge_is_the_weighted_mean(tmp_path: Path, models: list[Path]) -> None:
    experts = experts_of(models, Volumes([501], 2))
    names = list(experts.models[0].layout.body)
    information = [diagonal(experts, model, names, "model", 0) for model in (0, 1)]
    thetas = [model.tensors() for model in experts.models]
    merged = merge_folders(models, recipe=Recipe("fisher", weights=[0.3, 0.7], volumes=Volumes([501], 2)))["all"]
    for name in names:
        weights = [w * (each[name].double() + FLOOR) for w, each in zip((0.3, 0.7), information, strict=True)]
        expected = sum(w * theta[name].double() for w, theta in zip(weights, thetas, strict=True)) / sum(weights)
        torch.testing.assert_close(merged.state_dict[name].double(), expected, rtol=1e-4, atol=1e-6)
    assert merged.provenance["volumes"] == {"Dataset501_Boxes": ["case_0", "case_1"]}


def test_it_is_computed_once_for_many_weights(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a Merger that merges several times; what comes out is what a new one makes."""
    calls = []

    def counted(*arguments: object) -> fisher.Fisher:
        calls.append(arguments)
        return diagonal(*arguments)
    monkeypatch.setattr(fisher, "diagonal", counted)
    groups, recipe = [open_models(model) for model in models], Recipe("fisher", volumes=Volumes([501], 2))
    merger = Merger(groups, recipe)
    merged = {weights: merger.merge(weights).state_dict for weights in ((0.5, 0.5), (0.2, 0.8), (1.0, 0.0))}
    assert len(calls) == 2  # one for each model
    for weights, state in merged.items():
        fresh = Merger(groups, replace(recipe, weights=weights)).merge().state_dict
        assert all(torch.equal(state[name], tensor) for name, tensor in fresh.items())
    calls.clear()
    other = merger.merge((0.2, 0.8), seed=1).state_dict  # other draws, other information
    assert len(calls) == 2
    assert not all(torch.equal(merged[0.2, 0.8][name], tensor) for name, tensor in other.items())
    assert len({str(state) for state in merged.values()}) == 3
    merger.merge((0.5, 0.5), labels="dataset")
    assert len(calls) == 4


def test_one_model_and_equal_models_come_out_as_they_are(models: list[Path]) -> None:
    recipe = Recipe("fisher", volumes=Volumes([501], 1))
    theta = torch.load(models[0] / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    for group in ([models[0]], [models[0], models[0]]):
        merged = merge_folders(group, recipe=recipe)["all"]
        for name, tensor in theta.items():
            torch.testing.assert_close(merged.state_dict[name], tensor, rtol=1e-5, atol=1e-7)


def test_labels_are_drawn_as_often_as_predicted() -> None:
    logits = torch.tensor([0.5, -1.0, 1.5]).reshape(1, 3, 1, 1).expand(1, 3, 200, 200)
    generator = torch.Generator().manual_seed(0)
    drawn = sampled(logits, False, generator)
    shares = torch.bincount(drawn.reshape(-1), minlength=3) / drawn.numel()
    torch.testing.assert_close(shares, logits[0, :, 0, 0].softmax(0), rtol=0, atol=0.01)
    drawn = sampled(logits, True, generator)
    torch.testing.assert_close(drawn.float().mean((0, 2, 3)), logits[0, :, 0, 0].sigmoid(), rtol=0, atol=0.01)


def test_ignored_voxels_say_nothing() -> None:
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, :2] = IGNORED
    expected = logits.log_softmax(1)[:, 0, 2:].mean()
    torch.testing.assert_close(log_likelihood(logits, target, False), expected)
    regions = torch.ones(1, 3, 4, 4, dtype=torch.long)
    regions[:, :, :2] = IGNORED
    torch.testing.assert_close(log_likelihood(logits, regions, True), logits.sigmoid().log()[:, :, 2:].sum(1).mean())
