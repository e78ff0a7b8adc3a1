"""nnunet_transplant_evaluate against nnU-Net's own validation of the same model, and its errors as a user sees them."""
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import fork_command
from factory import run_command, write_planned_phantom
from nnunetv2.evaluation.evaluate_predictions import key_to_label_or_region, load_summary_json

pytestmark = pytest.mark.slow

TRAINER = "nnUNetTrainerStable_1epochs_2iterations"
NUMBERS = {"plain": 811, "regions_ignore": 812}


@pytest.fixture(scope="module")
def models(nnunet: Path) -> dict[str, Path]:
    """Kind of labels -> a model folder whose fold 0 nnU-Net trained for a moment and validated, and that says more than
    background."""
    return {kind: train(nnunet, number, kind) for kind, number in NUMBERS.items()}


def train(root: Path, number: int, kind: str) -> Path:
    name = write_planned_phantom(root, number, kind, cases=6)
    command = ["nnUNetv2_train", number, "3d_fullres", 0, "-tr", TRAINER, "-device", "cpu"]
    fork_command(*command)
    model = root / "results" / name / f"{TRAINER}__nnUNetPlans__3d_fullres"
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    bias = max(key for key in checkpoint["network_weights"] if re.fullmatch(r"decoder.seg_layers.\d.bias", key))
    checkpoint["network_weights"][bias] += torch.tensor([-100.0, 0, 0, 0, 0]) if kind == "plain" else 2.0
    torch.save(checkpoint, path)
    fork_command(*command, "--val")
    return model


@pytest.mark.parametrize("kind", NUMBERS)
def test_dice_is_that_of_nnunets_validation(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Same model, same cases: once from the preprocessed data and once from the raw images."""
    done = fork_command("nnunet_transplant_evaluate", "-m", models[kind], "-d", NUMBERS[kind], "-f", 0,
                        "-o", tmp_path / "out", "-device", "cpu")
    label = f"Dataset{NUMBERS[kind]}_Phantom__{TRAINER}"
    ours = load_summary_json(str(tmp_path / "out" / label / "summary.json"))
    stock = load_summary_json(str(models[kind] / "fold_0" / "validation" / "summary.json"))
    assert [Path(case["prediction_file"]).name for case in ours["metric_per_case"]] == [
        Path(case["prediction_file"]).name for case in stock["metric_per_case"]]
    for mine, theirs in zip(ours["metric_per_case"], stock["metric_per_case"], strict=True):
        assert mine["metrics"].keys() == theirs["metrics"].keys()
        for key, metrics in theirs["metrics"].items():
            assert mine["metrics"][key] == pytest.approx(metrics, nan_ok=True)
    assert max(mean["Dice"] for mean in ours["mean"].values()) > 0
    scores = pd.read_csv(tmp_path / "out" / "evaluation.csv")
    for structure, key in ours["structures"].items():
        mean = ours["mean"][key_to_label_or_region(key)]["Dice"]
        assert scores.loc[scores["structure"] == structure, "dice"].mean() == pytest.approx(mean)
        assert f"{mean:.4f}" in next(line for line in done.stdout.splitlines() if line.split()[:1] == [structure])
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table.startswith(done.stdout.partition("\nwrote ")[0].rstrip())  # and nothing of what nnU-Net prints


@pytest.mark.parametrize(("run", "arguments", "message"), [
    (run_command, ["-d", "999"], "-d 999: Could not find a dataset with the ID 999"),
    (fork_command, ["-d", "811", "-m", "no_such_model"], "there is no model folder no_such_model"),
])
def test_errors_are_one_line(models: dict[str, Path], tmp_path: Path, run: Callable, arguments: list[str],
                             message: str) -> None:
    done = run("nnunet_transplant_evaluate", "-m", models["plain"], "-o", tmp_path / "out", "-device", "cpu",
               *arguments, expect=1)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
    assert done.stderr.startswith("nnunet_transplant_evaluate: error: ")
    assert list(tmp_path.iterdir()) == []
