"""The ensemble as a teacher: its logits, how well a network agrees with it, and what polishing makes of it."""
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import small_plans, write_model
from permuted import LABELS, canonical, logits, network_of, noisy, tensors_of, write
from torch.distributions import Bernoulli, Categorical, kl_divergence

from nnunet_transplant.data.cases import Cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import JoinedHeads, join, merged_dataset_json
from nnunet_transplant.merging.calibration import IGNORED, Calibration, Patch, Volumes
from nnunet_transplant.merging.ensemble import (
    agreement,
    divergence,
    ensemble_logits,
    ensemble_targets,
    fit_head,
    labels_of,
    output_layer,
    polish,
    reference_targets,
)
from nnunet_transplant.merging.merge import _merge_heads
from nnunet_transplant.model_folder import open_models

PLANS = small_plans(2)
SOFTMAX = {"a": {"background": 0, "Liver": 1, "Spleen": 2}, "b": {"background": 0, "Kidney": 1, "Liver": 2}}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}


def opened(folders: Sequence[Path], patches: int = 3, values: Sequence[np.ndarray] | None = None,
           own: dict | None = None) -> tuple[Calibration, JoinedHeads]:
    """Random patches for models of equal weights. own: the labels of the dataset that they are from."""
    models = [open_models(folder)[0] for folder in folders]
    weights = [1 / len(models)] * len(models)
    joined = join(models, weights)
    tensors = [model.tensors() for model in models]
    generator = torch.Generator().manual_seed(0)
    cases = Cases("Dataset001_X", {"labels": own or LABELS}, {})
    content = [Patch(torch.randn(1, 16, 16, generator=generator), None if values is None else values[i], cases)
               for i in range(patches)]
    return Calibration(models, tensors, merged_dataset_json(models[0], joined),
                       _merge_heads(models, tensors, weights, joined), models[0].trainer, content,
                       Volumes([1])), joined


def own_logits(calibration: Calibration, model: int) -> torch.Tensor:
    """(patches, rows, x, y), by the model's own labels."""
    images = torch.stack([patch.image for patch in calibration.patches])
    return logits(PLANS, calibration.models[model].dataset_json["labels"], calibration.models[model].weights, images)


@pytest.fixture
def same(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / f"same_{seed}", LABELS, plans=PLANS, seed=seed) for seed in range(3)]


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / name, labels, plans=PLANS, seed=seed)
            for seed, (name, labels) in enumerate(SOFTMAX.items())]


def assert_half(found: Iterable[torch.Tensor], expected: torch.Tensor) -> None:
    found = list(found)
    assert all(each.dtype == torch.float16 for each in found)
    torch.testing.assert_close(torch.stack(found).float(), expected, rtol=1e-3, atol=1e-3)


def test_with_the_same_labels_it_is_the_mean(same: list[Path]) -> None:
    calibration, joined = opened(same)
    expected = sum(own_logits(calibration, i) for i in range(3)) / 3
    assert_half(ensemble_logits(calibration, joined, "ensemble"), expected)
    regions = [target.bool() for target in ensemble_targets(calibration, joined)]
    found = torch.stack(regions)
    assert found.shape == (3, 2, 16, 16)
    clear = (expected.sort(1).values[:, -1] - expected.sort(1).values[:, -2] > 1e-2)  # rounding may decide the others
    for row in (1, 2):
        assert torch.equal(found[:, row - 1][clear], (expected.argmax(1) == row)[clear])


def test_of_tasks_it_is_every_structures_score_against_background(tasks: list[Path]) -> None:
    calibration, joined = opened(tasks)
    a, b = own_logits(calibration, 0), own_logits(calibration, 1)
    score = {"Liver": (a[:, 1] - a[:, 0] + b[:, 2] - b[:, 0]) / 2, "Spleen": a[:, 2] - a[:, 0],
             "Kidney": b[:, 1] - b[:, 0]}
    labels = calibration.dataset_json["labels"]
    assert set(labels) == {"background", *score}
    names = {value: name for name, value in labels.items()}
    expected = torch.stack([torch.zeros_like(a[:, 0]), *(score[names[row]] for row in (1, 2, 3))], 1)
    assert_half(ensemble_logits(calibration, joined, "ensemble"), expected)


def test_regions_keep_their_own_logits(tmp_path: Path) -> None:
    parent = {"parent": "Dataset001_P", "parent_labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "in": 3},
              "parent_regions_class_order": [1, 2, 3]}
    folders = [
        write_model(tmp_path / "one", {"background": 0, "core": [1, 2]}, [1], seed=1, plans=PLANS,
                    nnunet_transplant=parent | {"classes": {"core": ["core"]}}),
        write_model(tmp_path / "two", {"background": 0, "whole": [1, 2], "in": 2}, [1, 2], seed=2, plans=PLANS,
                    nnunet_transplant=parent | {"classes": {"whole": ["whole"], "in": ["in"]}})]
    calibration, joined = opened(folders)
    each = []
    for i, (labels, order) in enumerate((({"background": 0, "core": [1, 2]}, [1]),
                                         ({"background": 0, "whole": [1, 2], "in": 2}, [1, 2]))):
        assert labels == calibration.models[i].dataset_json["labels"] and order
        with torch.no_grad():
            each.append(calibration.network(i)(torch.stack([patch.image for patch in calibration.patches])))
    expected = torch.stack([each[1][:, 0], each[0][:, 0], each[1][:, 1]], 1)  # whole, core, in
    assert list(calibration.dataset_json["labels"]) == ["background", "whole", "core", "in"]
    assert_half(ensemble_logits(calibration, joined, "ensemble"), expected)
    found = torch.stack(ensemble_targets(calibration, joined)).bool()
    clear = expected.abs() > 1e-2
    assert torch.equal(found[clear], (expected > 0)[clear])


@pytest.mark.parametrize("seed", [0, 1])
def test_agreement_is_dice(tmp_path: Path, seed: int) -> None:
    calibration, _ = opened([write_model(tmp_path / "m", LABELS, plans=PLANS, seed=seed)])
    rng = np.random.default_rng(seed)
    targets = [torch.from_numpy(rng.choice([0, 1, IGNORED], (2, 16, 16), p=[0.5, 0.3, 0.2])) for _ in range(3)]
    dice = []
    said = own_logits(calibration, 0).argmax(1).numpy()
    for structure in range(2):
        both = mine = theirs = 0
        for patch in range(3):
            for x in range(16):
                for y in range(16):
                    truth = int(targets[patch][structure, x, y])
                    if truth == IGNORED:
                        continue
                    mine += said[patch, x, y] == structure + 1
                    theirs += truth
                    both += truth and said[patch, x, y] == structure + 1
        dice.append(2 * both / (mine + theirs))
    assert agreement(calibration, calibration.network(0), targets) == pytest.approx(np.mean(dice))


def test_a_structure_that_nobody_sees_agrees(tmp_path: Path) -> None:
    never = {f"decoder.seg_layers.1.{part}": torch.zeros(shape) for part, shape in (("weight", (3, 4, 1, 1)),
                                                                                     ("bias", (3,)))}
    never["decoder.seg_layers.1.bias"][0] = 1
    calibration, _ = opened([write_model(tmp_path / "m", LABELS, plans=PLANS, change=never)])
    nothing = [torch.zeros(2, 16, 16, dtype=torch.int8) for _ in range(3)]
    assert agreement(calibration, calibration.network(0), nothing) == 1
    nothing[0][1, 3, 4] = 1
    assert agreement(calibration, calibration.network(0), nothing) == 0.5


def test_regions_agree_by_region(tmp_path: Path) -> None:
    calibration, _ = opened([write_model(tmp_path / "m", REGIONS, [1, 2], plans=PLANS)])
    images = torch.stack([patch.image for patch in calibration.patches])
    with torch.no_grad():
        said = calibration.network(0)(images) > 0
    rng = np.random.default_rng(2)
    targets = [torch.from_numpy(rng.integers(0, 2, (2, 16, 16))) for _ in range(3)]
    truth = torch.stack(targets) == 1
    dice = [float(2 * (said & truth)[:, i].sum() / (said[:, i].sum() + truth[:, i].sum())) for i in range(2)]
    assert agreement(calibration, calibration.network(0), targets) == pytest.approx(np.mean(dice))
    assert torch.equal(labels_of(torch.tensor([[[0.1]], [[-0.1]]])[None], True)[0], torch.tensor([[[True]], [[False]]]))


def test_references_are_the_label_maps(tmp_path: Path) -> None:
    """By the merged model's rows, with the dataset's own values, what it ignores left out."""
    folders = [write_model(tmp_path / name, {"background": 0, name: 1}, plans=PLANS, seed=seed)
               for seed, name in enumerate(("Spleen", "Liver"))]
    own = {"background": 0, "Liver": 3, "Spleen": 1, "ignore": 7}
    rng = np.random.default_rng(3)
    values = [rng.choice([0, 1, 3, 7], (16, 16)) for _ in range(3)]
    calibration, _ = opened(folders, values=values, own=own)
    targets = reference_targets(calibration)
    for value, target in zip(values, targets, strict=True):
        for name, row in calibration.dataset_json["labels"].items():
            if name != "background":
                expected = np.where(value == 7, IGNORED, value == own[name])
                np.testing.assert_array_equal(target[row - 1].numpy(), expected)
    calibration, _ = opened(folders)
    with pytest.raises(TransplantError, match="without labels"):
        reference_targets(calibration)


def test_divergence_is_the_mean_kullback_leibler_divergence() -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (3 * torch.randn(2, 4, 5, 6, generator=generator) for _ in range(2))
    for regions in (False, True):
        expected = kl_divergence(*(distribution(each, regions) for each in (teacher, student))).mean()
        torch.testing.assert_close(divergence(student, teacher, regions), expected)
        assert abs(float(divergence(teacher, teacher, regions))) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Polishing, and fitting the head

def loss_of(calibration: Calibration, joined: JoinedHeads, tensors: dict[str, torch.Tensor], regions: bool) -> float:
    teacher = torch.stack([*ensemble_logits(calibration, joined, "ensemble")]).float()
    images = torch.stack([patch.image for patch in calibration.patches])
    with torch.no_grad():
        said = calibration.merged_network(tensors)(images)
    return kl_divergence(distribution(teacher, regions), distribution(said, regions)).mean().item()


def distribution(logits: torch.Tensor, regions: bool) -> Bernoulli | Categorical:
    """Of every voxel, logits (batch, rows, ...)."""
    return Bernoulli(logits=logits) if regions else Categorical(logits=logits.movedim(1, -1))


def mean_of(calibration: Calibration) -> dict[str, torch.Tensor]:
    first = calibration.tensors[0]
    return {name: sum(tensors[name] for tensors in calibration.tensors) / len(calibration.tensors)
            if tensor.shape == calibration.tensors[-1][name].shape and tensor.is_floating_point() else tensor.clone()
            for name, tensor in first.items()} | calibration.heads


@pytest.mark.parametrize("kind", ["folds", "tasks", "regions"])
def test_polishing_brings_the_merged_model_nearer_to_the_ensemble(tmp_path: Path, kind: str, same: list[Path],
                                                                  tasks: list[Path]) -> None:
    folders = {"folds": same, "tasks": tasks, "regions": [
        write_model(tmp_path / f"r{seed}", REGIONS, [1, 2], plans=PLANS, seed=seed) for seed in range(2)]}[kind]
    calibration, joined = opened(folders)
    merged = mean_of(calibration)
    kept = {name: tensor.clone() for name, tensor in merged.items()}
    before = loss_of(calibration, joined, merged, kind == "regions")
    polished = polish(calibration, joined, merged, 20, 1e-3)
    assert loss_of(calibration, joined, polished, kind == "regions") < 0.8 * before
    assert all(torch.equal(merged[name], kept[name]) for name in kept)  # the merged one itself stays
    assert set(polished) == set(merged)
    again = polish(calibration, joined, merged, 20, 1e-3)
    assert all(torch.equal(polished[name], again[name]) for name in polished)
    other = polish(calibration, joined, merged, 20, 1e-3, seed=1)
    assert any(not torch.equal(polished[name], other[name]) for name in polished)
    # the lower head is not looked at when a model predicts
    low = "decoder.seg_layers.0.weight"
    assert torch.equal(polished[low], merged[low]) and not torch.equal(polished["decoder.seg_layers.1.weight"],
                                                                       merged["decoder.seg_layers.1.weight"])


def test_polishing_the_ensemble_itself_changes_next_to_nothing(tmp_path: Path) -> None:
    """What is left are the roundings of the ensemble's logits to half precision."""
    folders = [write_model(tmp_path / str(seed), LABELS, plans=PLANS, seed=seed) for seed in range(2)]
    calibration, joined = opened(folders[:1])
    merged = mean_of(calibration)
    polished = polish(calibration, joined, merged, 10, 1e-3)
    other = mean_of(opened(folders[1:])[0])
    assert loss_of(calibration, joined, polished, False) < 1e-3 * loss_of(calibration, joined, other, False)
    for name, tensor in merged.items():
        assert float((polished[name] - tensor).abs().max()) < 5.5e-3, name  # ten steps of 0.001 and less, at most


HEAD = ("decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias")


@pytest.mark.parametrize("kind", ["folds", "regions"])
def test_a_fitted_head_is_the_best_of_all_heads(tmp_path: Path, kind: str) -> None:
    """Where all voxels are taken, and those that the ensemble is not sure of once more: the gradient of the mean
    divergence by the head vanishes, and nothing but the head has changed."""
    regions = kind == "regions"
    bias = torch.full((2,), -5.0) if regions else torch.tensor([5.0, 0, 0])  # much is background for sure
    folders = [write_model(tmp_path / str(seed), REGIONS if regions else LABELS, [1, 2] if regions else None, seed=seed,
                           plans=PLANS, change={HEAD[1]: bias, HEAD[0]: 3 * torch.randn(
                               len(bias), 4, 1, 1, generator=torch.Generator().manual_seed(seed))})
               for seed in range(2)]
    calibration, joined = opened(folders)
    merged = mean_of(calibration)
    fitted = fit_head(calibration, joined, merged)
    assert all(torch.equal(fitted[name], merged[name]) for name in merged if name not in HEAD)
    teacher = torch.stack([*ensemble_logits(calibration, joined, "ensemble")]).float()
    sure = (teacher.sigmoid() < 0.01).all(1) if regions else teacher.softmax(1)[:, 0] > 0.99
    assert 0.1 < sure.float().mean() < 0.9
    counts = torch.where(sure, 1.0, 2.0)
    images = torch.stack([patch.image for patch in calibration.patches])

    def loss_and_slope(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
        network = calibration.merged_network(tensors).requires_grad_(True)
        said = network(images)
        each = kl_divergence(*(distribution(logits, regions) for logits in (teacher, said)))
        loss = (counts * (each.mean(1) if regions else each)).sum() / counts.sum()
        loss.backward()
        head = network.decoder.seg_layers[1]
        return loss.item(), torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm().item()
    before, slope = loss_and_slope(merged)
    after, flat = loss_and_slope(fitted)
    assert after < before and flat < 1e-3 * slope
    for seed in range(5):  # no other head near by is better
        other = noisy({name: fitted[name] for name in HEAD}, 0.02, seed)
        assert loss_and_slope(fitted | other)[0] > after
    again = fit_head(calibration, joined, merged)
    assert all(torch.equal(fitted[name], again[name]) for name in HEAD)


def test_a_head_that_says_what_the_ensemble_says_stays(tmp_path: Path) -> None:
    calibration, joined = opened([write_model(tmp_path / "m", LABELS, plans=PLANS)])
    merged = mean_of(calibration)
    fitted = fit_head(calibration, joined, merged)
    assert loss_of(calibration, joined, fitted, False) < 1e-6
    images = torch.stack([patch.image for patch in calibration.patches])
    with torch.no_grad():
        one, other = (calibration.merged_network(tensors)(images).softmax(1) for tensors in (merged, fitted))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_tasks_share_a_fitted_head(tasks: list[Path]) -> None:
    """A few voxels of each patch help, all of them help more."""
    calibration, joined = opened(tasks)
    merged = mean_of(calibration)
    losses = [loss_of(calibration, joined, tensors, False) for tensors in (
        merged, fit_head(calibration, joined, merged, positions=64), fit_head(calibration, joined, merged))]
    assert losses[2] < losses[1] < losses[0]


def test_the_head_is_the_layer_whose_output_is_the_networks() -> None:
    network = network_of(PLANS)
    network.decoder.deep_supervision = False
    image = torch.randn(1, 1, 16, 16)
    assert output_layer(network, image) is network.decoder.seg_layers[1]
    for hooks in (module._forward_hooks for module in network.modules()):
        assert not hooks
    conv = torch.nn.Conv2d
    for last in (torch.nn.Sigmoid(), conv(2, 2, 3)):
        odd = torch.nn.Sequential(conv(1, 2, 1), last)
        with pytest.raises(TransplantError, match="convolution of single voxels"):
            output_layer(odd, image)


def test_polishing_keeps_types(tmp_path: Path) -> None:
    tensors = [{name: tensor.half() for name, tensor in tensors_of(network_of(PLANS, seed=seed),
                                                                   canonical(PLANS)).items()} for seed in range(2)]
    folders = [write(tmp_path / str(i), PLANS, each) for i, each in enumerate(tensors)]
    calibration, joined = opened(folders)
    for done in (polish(calibration, joined, mean_of(calibration), 3, 1e-3),
                 fit_head(calibration, joined, mean_of(calibration))):
        assert all(tensor.dtype == torch.float16 for tensor in done.values())


def test_polishing_that_diverges_is_refused(same: list[Path]) -> None:
    calibration, joined = opened(same)
    with pytest.raises(TransplantError, match="smaller -polish_lr"):
        polish(calibration, joined, mean_of(calibration), 5, 1e30)


def test_noise_is_polished_away(tmp_path: Path) -> None:
    """A student that is not the merged one but near to a lone teacher comes back to it."""
    calibration, joined = opened([write_model(tmp_path / "m", LABELS, plans=PLANS)], patches=4)
    student = noisy(mean_of(calibration), 0.1, 6)
    before = loss_of(calibration, joined, student, False)
    assert loss_of(calibration, joined, polish(calibration, joined, student, 40, 3e-3), False) < 0.3 * before
