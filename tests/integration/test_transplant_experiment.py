"""The papers' experiment at its toy scale, on volumes of a few spheres: it shows nothing but that it runs."""
import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from experiment import BENCHMARKS, row_of
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

pytestmark = pytest.mark.slow


@pytest.fixture
def label_maps(tmp_path: Path) -> Path:
    """Of 16 subjects, in FreeSurfer's numbers: a grid of boxes, 24 mm each."""
    folder = tmp_path / "label_maps"
    folder.mkdir()
    labels = np.array([0, 2, 3, 4, 10, 16, 8, 0, 42, 43, 49, 16, 47, 41, 24, 7], np.int16)
    places = np.stack(np.meshgrid(*[np.arange(48) // 12] * 3, indexing="ij"))
    for subject in range(16):
        image = SimpleITK.GetImageFromArray(labels[(places[0] + 4 * places[1] + 3 * places[2]) % len(labels)])
        image.SetSpacing([2.0] * 3)
        SimpleITK.WriteImage(image, str(folder / f"head_{subject:02d}.nii.gz"))
    return folder


def test_the_whole_experiment(experiment, tmp_path: Path, label_maps: Path, documentation: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["transplant_experiment.py", str(tmp_path / "work"), "--scale", "toy", "-brain",
                                      str(label_maps), "-documentation", str(documentation)])
    experiment.main()

    text = (documentation / "stable_base.md").read_text()
    pairs = ["Thalamus, LateralVentricle", "Thalamus, Cerebellum", "LateralVentricle, Cerebellum"]
    for regime in ("Stable", "Plastic"):
        for tasks in (*pairs, "Thalamus, LateralVentricle, Cerebellum"):
            cells = row_of(documentation, regime, tasks)
            dice = [float(cell) for cell in cells if cell.strip()]  # six merges, joint, experts
            assert len(cells) == 8 and len(dice) >= 7 and all(0 <= each <= 1 for each in dice), cells
            assert re.search(rf"^\| {regime} \| 0 \| {tasks} \|", text, re.M) or tasks not in pairs
    figures = {path.name for path in documentation.glob("*.png")}
    assert figures == {"transplant.png", "transplant_bases.png", "brain_flatness.png", "brain_merged.png", *(
        f"brain_{name}_{regime}.png" for name in ("map", "map_fitted") for regime in ("stable", "plastic"))}

    settings = ("splits_final.json", "nnUNetPlansSmall.json")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")
              if path.is_file() and path.name not in settings}
    experiment.main()  # all is there: nothing is made again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (documentation / "stable_base.md").read_text() == text


def test_the_figure_of_all_tasks(experiment, tmp_path: Path) -> None:
    tables = importlib.import_module("transplant_tables")
    scores = pd.DataFrame([{"regime": regime, "kind": kind, "tasks": "A-B-C", "seed": 0, "structure": structure,
                            "case": "1", "dice": 0.5}
                           for regime in ("Stable", "Plastic") for kind in ("average default", "average learned")
                           for structure in "ABC"])
    tables.save_all_tasks_figure(scores, ("Stable", "Plastic"), "ABC", tmp_path / "merged.png")
    assert (tmp_path / "merged.png").stat().st_size > 10_000


def test_no_case_has_two_roles(experiment) -> None:
    settings = importlib.import_module("transplant_settings")
    cases = [f"hippocampus_{i:03d}" for i in range(200)]
    splits = settings.hippocampus_splits(cases)
    base, tasks = (set(splits[fold]["train"]) for fold in (settings.BASE, settings.TEST))
    tests, searched = (set(splits[fold]["val"]) for fold in (settings.TEST, settings.SEARCH))
    assert [len(each) for each in (base, tasks, tests, searched)] == [80, 80, 24, 16]
    assert base | tasks | tests | searched == set(cases)
    assert set(splits[settings.BASE]["val"]) == tests and set(splits[settings.SEARCH]["train"]) == tasks


@pytest.mark.parametrize(("name", "batch", "dropout", "rate"), [
    ("PlasticBatch4", 4, 0, 1e-4), ("PlasticDropout", 8, 0.5, 1e-4), ("PlasticRate", 8, 0, 1e-3)])
def test_one_thing_changes_at_a_time(monkeypatch: pytest.MonkeyPatch, name: str, batch: int, dropout: float,
                                     rate: float) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(BENCHMARKS / "trainers"))
    trainer = recursive_find_trainer_class_by_name(f"nnUNetTrainer{name}_3epochs_5iterations_NoMirroring")
    assert (trainer.effective_batch_size, trainer.dropout, trainer.learning_rate) == (batch, dropout, rate)
    assert (trainer.epochs, trainer.iterations_per_epoch, trainer.mirroring) == (3, 5, False)


def test_stock_is_nnunets_own_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(BENCHMARKS / "trainers"))
    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerStockBatch4_3epochs_5iterations_NoMirroring")
    assert (trainer.effective_batch_size, trainer.dropout, trainer.learning_rate) == (4, 0, 1e-2)
    network = torch.nn.Linear(1, 1)
    optimizer, scheduler = trainer.configure_optimizers(SimpleNamespace(network=network, initial_lr=1e-2, num_epochs=3))
    assert isinstance(optimizer, torch.optim.SGD) and isinstance(scheduler, PolyLRScheduler)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (1e-2, 0.99, True, 3e-5)


def test_without_forgetting_sees_no_old_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(BENCHMARKS / "trainers"))
    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerWithoutForgetting_3epochs_5iterations_NoMirroring")
    # labels: 0 background, 1 old, 2 new, 3 old; the base's rows: background, 1, 3. It says: row 2 everywhere
    said = torch.tensor([0.0, 0.0, 9.0]).view(1, 3, 1, 1, 1).expand(1, 3, 2, 2, 2)
    seen = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(target)
        return output.sum() * 0
    network = torch.nn.Conv3d(1, 4, 1)
    self = SimpleNamespace(
        device=torch.device("cpu"), teacher=lambda data: said, network=network, loss=loss, num_micro_batches=1,
        of_row=torch.tensor([0, 1, 3]), is_new=torch.tensor([False, False, True, False]))
    labels = torch.tensor([0, 1, 2, 3, 2, 2, 1, 0]).view(1, 1, 2, 2, 2)
    value = trainer._backward(self, {"data": torch.randn(1, 1, 2, 2, 2), "target": labels})
    assert seen[0].flatten().tolist() == [3, 3, 2, 3, 2, 2, 3, 3]
    assert value > 0
    network.weight.data.zero_()
    network.bias.data = torch.tensor([0.0, 0.0, 5.0, 9.0])  # what the base says; of the new row nothing is asked
    assert float(trainer._backward(self, {"data": torch.randn(1, 1, 2, 2, 2), "target": labels})) < 1e-6
