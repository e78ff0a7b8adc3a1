"""The papers' experiment at its toy scale, on volumes of a few spheres: it shows nothing but that it runs."""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from commands import fork_command
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATA = Path(__file__).parents[2].parent / "shared" / "data"
@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as a module, its commands run in forks of a server that has imported nnU-Net."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    def execute(command: Sequence[str], environment: Mapping[str, str]) -> None:
        if command[0] == "python":
            subprocess.run([sys.executable, *command[1:]], check=True)
            return
        with monkeypatch.context() as patch:
            for name in environment.keys() - os.environ.keys() | {"nnUNet_results"}:
                patch.setenv(name, environment[name])
            for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_extTrainer"):
                patch.setenv(name, environment[name])
            if command[0] == "nnUNetv2_train":
                patch.setenv("nnUNet_n_proc_DA", "0")  # workers take longer to start than so few steps
            fork_command(*command)

    monkeypatch.setattr(importlib.import_module("steps"), "execute", execute)
    return importlib.import_module("transplant_experiment")


@pytest.fixture
def documentation(experiment, tmp_path: Path) -> Path:
    """With a page that has a place for the tables of every setting."""
    folder = tmp_path / "documentation"
    folder.mkdir()
    places = "\n".join(f"<!-- {setting}: {table} -->\n<!-- end of {setting}: {table} -->"
                       for setting in ("brain", "abdomen", "maxillofacial", "mouse") for table in experiment.TABLES)
    (folder / "stable_base.md").write_text(f"# Results\n{places}")
    return folder


def row_of(documentation: Path, regime: str, tasks: str) -> list[str]:
    """The cells of a table of merges."""
    text = (documentation / "stable_base.md").read_text()
    return re.search(rf"^\| {regime} \| {tasks} \| (.+) \|$", text, re.M)[1].split(" | ")


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


AMOS = ("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota", "postcava",
        "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus")
BTCV = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland")
JAWS = ("Lower Jawbone", "Upper Jawbone", "Left Inferior Alveolar Canal", "Right Inferior Alveolar Canal",
        "Left Maxillary Sinus", "Right Maxillary Sinus", "Pharynx", "Bridge", "Crown", "Implant")
TEETH = ("Central Incisor", "Lateral Incisor", "Canine", "First Premolar", "Second Premolar", "First Molar",
         "Second Molar", "Third Molar (Wisdom Tooth)")
SIDES = ("Upper Right", "Upper Left", "Lower Left", "Lower Right")  # 11 to 18, 21 to 28, ...; 19 and 20 are no teeth
TOOTHFAIRY = (*JAWS, *(name for side in SIDES for name in (*(f"{side} {tooth}" for tooth in TEETH), f"NA {side} 9",
                                                           f"NA {side} 10")))[:48]
PAPERS = {"abdomen": ((AMOS, 7), (BTCV, 10)), "maxillofacial": ((TOOTHFAIRY, 7), (TOOTHFAIRY, 10))}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_own_datasets(experiment, tmp_path: Path, documentation: Path, monkeypatch: pytest.MonkeyPatch,
                                 name: str) -> None:
    """Their files, on miniatures with their label names: boxes side by side."""
    file = BENCHMARKS / "settings" / f"{name}.json"
    told = json.loads(file.read_text())
    for part, (labels, cases) in zip(("base", "tasks"), PAPERS[name], strict=True):
        write_boxes(tmp_path / "data" / told[part]["dataset"], labels, cases)
    monkeypatch.setattr(sys, "argv", ["transplant_experiment.py", str(tmp_path / "work"), "--scale", "toy",
                                      "--setting", str(file), "-data", str(tmp_path / "data"),
                                      "-documentation", str(documentation)])
    experiment.main()
    check_setting(documentation, told)


@pytest.mark.skipif(not (DATA / "Dataset005_MouseBrain").exists(), reason=f"no mouse brains in {DATA}")
def test_the_mouse_brains(experiment, tmp_path: Path, documentation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, with two structures and few of its animals."""
    told = json.loads((BENCHMARKS / "settings" / "mouse.json").read_text())
    told["base"]["train"] = told["base"]["train"][:2]
    for part, count in (("train", 2), ("test", 1), ("search", 1)):
        told["tasks"][part] = told["tasks"][part][:count]
    told["tasks"]["structures"] = dict(list(told["tasks"]["structures"].items())[:2])
    (tmp_path / "mouse.json").write_text(json.dumps(told))
    source, raw = (folder / "Dataset005_MouseBrain" for folder in (DATA, tmp_path / "data"))
    for case in (*told["base"]["train"], *(case for part in ("train", "test", "search")
                                           for case in told["tasks"][part])):
        for file in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            (raw / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, raw / file)
    description = json.loads((source / "dataset.json").read_text()) | {"numTraining": 6}
    (raw / "dataset.json").write_text(json.dumps(description))
    monkeypatch.setattr(sys, "argv", ["transplant_experiment.py", str(tmp_path / "work"), "--scale", "toy",
                                      "--setting", str(tmp_path / "mouse.json"), "-data", str(tmp_path / "data"),
                                      "-documentation", str(documentation)])
    experiment.main()
    check_setting(documentation, told)


def check_setting(documentation: Path, told: Mapping) -> None:
    """The merges of the first two tasks have all their numbers, and the paper's stand beside them."""
    tasks = ", ".join(list(told["tasks"]["structures"])[:2])
    dice = [float(cell) for cell in row_of(documentation, "Stable", tasks)]  # ten merges, joint, experts
    assert len(dice) == 12 and all(0 <= each <= 1 for each in dice)
    for row in told.get("paper", {}).get("Stable", {}):
        assert row_of(documentation, "Stable, the paper's", row)


def test_the_figure_of_all_tasks(experiment, tmp_path: Path) -> None:
    tables = importlib.import_module("transplant_tables")
    scores = pd.DataFrame([{"regime": regime, "kind": kind, "tasks": "A-B-C", "seed": 0, "structure": structure,
                            "case": "1", "dice": 0.5}
                           for regime in ("Stable", "Plastic") for kind in ("average default", "average learned")
                           for structure in "ABC"])
    tables.save_all_tasks_figure(scores, ("Stable", "Plastic"), "ABC", tmp_path / "merged.png")
    assert (tmp_path / "merged.png").stat().st_size > 10_000


def write_boxes(folder: Path, labels: Sequence[str], cases: int) -> None:
    """A dataset in nnU-Net's raw format: a grid of boxes of 8 voxels, a label each, in noise."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    places = np.stack(np.meshgrid(*[np.arange(32) // 8] * 3, indexing="ij"))
    box = places[0] + 4 * places[1] + 16 * places[2]
    for number in range(cases):
        rng = np.random.default_rng(number)
        reference = np.where(box < len(labels), box + 1, 0).astype(np.uint8)
        image = (reference % 7 + rng.normal(0, 0.2, box.shape)).astype(np.float32)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), folder / "imagesTr" / f"case_{number:02d}_0000.nii.gz")
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(reference), folder / "labelsTr" / f"case_{number:02d}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "labels": {"background": 0, **{name: i for i, name in enumerate(labels, 1)}},
        "numTraining": cases, "file_ending": ".nii.gz"}))


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
