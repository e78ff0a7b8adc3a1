"""The ensemble as a teacher: its logits, what it says of a patch, and how well a network agrees with it."""
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import write_model
from permuted import LABELS, logits
from teaching import PLANS, REGIONS, distribution, opened, plain_dice_loss, write_same, write_tasks
from torch.distributions import kl_divergence

from nnunet_transplant.ensemble import (
    Teacher,
    agreement,
    dice_loss,
    divergence,
    ensemble_logits,
    ensemble_targets,
    labels_of,
    reference_targets,
    teacher_passes,
)
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts
from nnunet_transplant.volumes import IGNORED


def own_logits(experts: Experts, model: int) -> torch.Tensor:
    """(patches, rows, x, y), by the model's own labels."""
    images = torch.stack([patch.image for patch in experts.patches])
    return logits(PLANS, experts.models[model].dataset_json["labels"], experts.models[model].stored, images)


@pytest.fixture
def same(tmp_path: Path) -> list[Path]:
    return write_same(tmp_path)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    return write_tasks(tmp_path)


def assert_half(found: Iterable[torch.Tensor], expected: torch.Tensor) -> None:
    found = list(found)
    assert all(each.dtype == torch.float16 for each in found)
    torch.testing.assert_close(torch.stack(found).float(), expected, rtol=1e-3, atol=1e-3)


def test_with_the_same_labels_it_is_the_mean(same: list[Path]) -> None:
    experts = opened(same)
    expected = sum(own_logits(experts, i) for i in range(3)) / 3
    assert_half(ensemble_logits(experts), expected)
    found = torch.stack(ensemble_targets(experts))
    assert found.shape == (3, 16, 16) and found.dtype == torch.uint8  # a byte for each voxel, however many structures
    clear = (expected.sort(1).values[:, -1] - expected.sort(1).values[:, -2] > 1e-2)  # rounding may decide the others
    for row in (1, 2):
        assert torch.equal((found == row)[clear], (expected.argmax(1) == row)[clear])


def test_of_tasks_it_is_every_structures_score_against_background(tasks: list[Path]) -> None:
    experts = opened(tasks)
    a, b = own_logits(experts, 0), own_logits(experts, 1)
    score = {"Liver": (a[:, 1] - a[:, 0] + b[:, 2] - b[:, 0]) / 2, "Spleen": a[:, 2] - a[:, 0],
             "Kidney": b[:, 1] - b[:, 0]}
    labels = experts.dataset_json["labels"]
    assert set(labels) == {"background", *score}
    names = {value: name for name, value in labels.items()}
    expected = torch.stack([torch.zeros_like(a[:, 0]), *(score[names[row]] for row in (1, 2, 3))], 1)
    assert_half(ensemble_logits(experts), expected)


@pytest.mark.parametrize(("room", "asked"), [(0, 6), (3 * 3 * 16 * 16 * 2, 3), (2 * 3 * 16 * 16 * 2, 4)])
def test_a_teacher_keeps_what_it_said_in_its_room(same: list[Path], room: int, asked: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    experts = opened(same)
    expected = torch.stack([*ensemble_logits(experts)])
    teacher, passed = Teacher(experts, room), []
    teacher.networks[0].register_forward_hook(lambda _, inputs, __: passed.extend(inputs[0]))
    first, *others = experts.patches
    torch.testing.assert_close(teacher([first, *others]), expected)
    torch.testing.assert_close(teacher([*others, first]), expected[[1, 2, 0]])
    assert len(passed) == asked
    monkeypatch.setattr("nnunet_transplant.ensemble.teacher_room", lambda: room)
    assert teacher_passes(experts, 6) == 3 * asked  # of three models


def test_regions_keep_their_own_logits(tmp_path: Path) -> None:
    parent = {"parent": "Dataset001_P", "parent_labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "in": 3},
              "parent_regions_class_order": [1, 2, 3]}
    folders = [
        write_model(tmp_path / "one", {"background": 0, "core": [1, 2]}, [1], seed=1, plans=PLANS,
                    nnunet_transplant=parent | {"classes": {"core": ["core"]}}),
        write_model(tmp_path / "two", {"background": 0, "whole": [1, 2], "in": 2}, [1, 2], seed=2, plans=PLANS,
                    nnunet_transplant=parent | {"classes": {"whole": ["whole"], "in": ["in"]}})]
    experts = opened(folders)
    each = []
    for i, (labels, order) in enumerate((({"background": 0, "core": [1, 2]}, [1]),
                                         ({"background": 0, "whole": [1, 2], "in": 2}, [1, 2]))):
        assert labels == experts.models[i].dataset_json["labels"] and order
        with torch.no_grad():
            each.append(experts.network(i)(torch.stack([patch.image for patch in experts.patches])))
    expected = torch.stack([each[1][:, 0], each[0][:, 0], each[1][:, 1]], 1)  # whole, core, in
    assert list(experts.dataset_json["labels"]) == ["background", "whole", "core", "in"]
    assert_half(ensemble_logits(experts), expected)
    found = torch.stack(ensemble_targets(experts)).bool()
    clear = expected.abs() > 1e-2
    assert torch.equal(found[clear], (expected > 0)[clear])


@pytest.mark.parametrize("seed", [0, 1])
def test_agreement_is_dice(tmp_path: Path, seed: int) -> None:
    experts = opened([write_model(tmp_path / "m", LABELS, plans=PLANS, seed=seed)])
    rng = np.random.default_rng(seed)
    targets = [torch.from_numpy(rng.choice([0, 1, 2, IGNORED], (16, 16), p=[0.3, 0.3, 0.2, 0.2])) for _ in range(3)]
    dice = []
    said = own_logits(experts, 0).argmax(1).numpy()
    for structure in range(2):
        both = mine = theirs = 0
        for patch in range(3):
            for x in range(16):
                for y in range(16):
                    truth = int(targets[patch][x, y])
                    if truth == IGNORED:
                        continue
                    truth = truth == structure + 1
                    mine += said[patch, x, y] == structure + 1
                    theirs += truth
                    both += truth and said[patch, x, y] == structure + 1
        dice.append(2 * both / (mine + theirs))
    assert agreement(experts, experts.network(0), targets) == pytest.approx(np.mean(dice))


def test_a_structure_that_nobody_sees_agrees(tmp_path: Path) -> None:
    never = {f"decoder.seg_layers.1.{part}": torch.zeros(shape) for part, shape in (("weight", (3, 4, 1, 1)),
                                                                                     ("bias", (3,)))}
    never["decoder.seg_layers.1.bias"][0] = 1
    experts = opened([write_model(tmp_path / "m", LABELS, plans=PLANS, change=never)])
    nothing = [torch.zeros(16, 16, dtype=torch.uint8) for _ in range(3)]
    assert agreement(experts, experts.network(0), nothing) == 1
    nothing[0][3, 4] = 2
    assert agreement(experts, experts.network(0), nothing) == 0.5


def test_regions_agree_by_region(tmp_path: Path) -> None:
    experts = opened([write_model(tmp_path / "m", REGIONS, [1, 2], plans=PLANS)])
    images = torch.stack([patch.image for patch in experts.patches])
    with torch.no_grad():
        said = experts.network(0)(images) > 0
    rng = np.random.default_rng(2)
    targets = [torch.from_numpy(rng.integers(0, 2, (2, 16, 16))) for _ in range(3)]
    truth = torch.stack(targets) == 1
    dice = [float(2 * (said & truth)[:, i].sum() / (said[:, i].sum() + truth[:, i].sum())) for i in range(2)]
    assert agreement(experts, experts.network(0), targets) == pytest.approx(np.mean(dice))
    assert torch.equal(labels_of(torch.tensor([[[0.1]], [[-0.1]]])[None], True)[0], torch.tensor([[[True]], [[False]]]))


def test_references_are_the_label_maps(tmp_path: Path) -> None:
    """By the merged model's rows, with the dataset's own values, what it ignores left out."""
    folders = [write_model(tmp_path / name, {"background": 0, name: 1}, plans=PLANS, seed=seed)
               for seed, name in enumerate(("Spleen", "Liver"))]
    own = {"background": 0, "Liver": 3, "Spleen": 1, "ignore": 7}
    rng = np.random.default_rng(3)
    values = [rng.choice([0, 1, 3, 7], (16, 16)) for _ in range(3)]
    experts = opened(folders, values=values, own=own)
    targets = reference_targets(experts)
    for value, target in zip(values, targets, strict=True):
        for name, row in experts.dataset_json["labels"].items():
            if name != "background":
                np.testing.assert_array_equal(target.numpy() == row, value == own[name])
        np.testing.assert_array_equal(target.numpy() == IGNORED, value == 7)
    experts = opened(folders)
    with pytest.raises(TransplantError, match="without labels"):
        reference_targets(experts)


def test_divergence_is_the_mean_kullback_leibler_divergence() -> None:
    generator = torch.Generator().manual_seed(4)
    student, teacher = (3 * torch.randn(2, 4, 5, 6, generator=generator) for _ in range(2))
    for regions in (False, True):
        expected = kl_divergence(*(distribution(each, regions) for each in (teacher, student))).mean()
        torch.testing.assert_close(divergence(student, teacher, regions), expected)
        assert abs(float(divergence(teacher, teacher, regions))) < 1e-6


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("regions", [False, True])
def test_dice_loss_is_its_definition(regions: bool, power: int) -> None:
    """Also where a patch shows some structures only, and none."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    teacher[1, 2] = -20
    teacher[2, 0 if not regions else slice(None)] = -20 if regions else 20
    expected = plain_dice_loss(student, teacher, regions, power)
    assert float(dice_loss(student, teacher, regions, power)) == pytest.approx(expected)
    assert float(dice_loss(teacher, teacher, regions, power)) == 0


@pytest.mark.parametrize("power", [1, 2])
def test_the_size_of_a_structure_counts_nothing_in_the_dice_loss(power: int) -> None:
    """A structure of one voxel and one of 36, each lost alone: the same loss. The divergence is as many times larger as
    the structure is."""
    teacher = torch.full((1, 3, 8, 8), 0.0)
    teacher[0, 0] = 20
    teacher[0, 1, 0, 0] = teacher[0, 2, 2:, 2:] = 40
    lost = [teacher.clone() for _ in range(2)]
    for row, each in enumerate(lost, start=1):
        each[0, row] = 0
    small, large = (float(dice_loss(each, teacher, False, power)) for each in lost)
    assert small == pytest.approx(1, abs=1e-4) and large == pytest.approx(1, abs=1e-4)
    assert float(divergence(lost[1], teacher, False)) > 30 * float(divergence(lost[0], teacher, False))
