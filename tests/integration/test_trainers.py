"""nnU-Net's own commands train with our trainers and, without this package, predict with what they trained."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from commands import fork_command
from factory import write_narrow_plans

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import build_network
from nnunet_transplant.data.phantom import write_phantom_dataset
from nnunet_transplant.task_vector import RECORD, read_theta_0, theta_0_path

pytestmark = pytest.mark.slow

PLAIN, REGIONS = "Dataset811_Plain", "Dataset812_Regions"
STABLE, PLASTIC, TASK = (f"nnUNetTrainer{name}_1epochs_2iterations" for name in ("Stable", "Plastic", "TaskVector"))

# Stock nnU-Net's command where this package is not installed
WITHOUT_THE_PACKAGE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nnunet_transplant":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as Predictor, predict_entry_point_modelfolder
# in one process, for which the command has no flag
Predictor.predict_from_files = lambda self, source, output, **_: self.predict_from_files_sequential(source, output)
images, output, *models = sys.argv[1:]
for number, model in enumerate(models):
    sys.argv = ["", "-i", images, "-o", f"{output}/{number}", "-m", model, "-f", "0", "-device", "cpu", "-npp", "1",
                "-nps", "1", "--disable_progress_bar"]
    predict_entry_point_modelfolder()
"""


@pytest.fixture(scope="module")
def root(nnunet: Path) -> Path:
    """nnU-Net's three folders with two phantom datasets, preprocessed by nnU-Net's command and planned narrow."""
    for dataset, configuration, kind in ((PLAIN, "3d_fullres", "plain"), (REGIONS, "2d", "regions_ignore")):
        number = int(dataset[7:10])
        write_phantom_dataset(nnunet / "raw" / dataset, 6, "A", seed=number, labels=kind, shape=(24, 26, 28))
        fork_command("nnUNetv2_plan_and_preprocess", "-d", number, "-c", configuration, "-np", 1, "-npfp", 1)
        write_narrow_plans(nnunet / "preprocessed" / dataset / "nnUNetPlans.json", configuration)
    add_plans(nnunet / "preprocessed" / PLAIN)
    return nnunet


def add_plans(folder: Path) -> None:
    """A configuration of another name, and plans with residual encoders, on the same preprocessed images."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres"}
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    (folder / "ResEnc.json").write_text(json.dumps(plans | {"plans_name": "ResEnc"}))
    write_narrow_plans(folder / "ResEnc.json", "3d_fullres", residual=True)


def train(dataset: str, configuration: str, trainer: str, *args: object, plans: str = "nnUNetPlans") -> Path:
    fork_command("nnUNetv2_train", dataset, configuration, 0, "-tr", trainer, "-p", plans, "-device", "cpu", *args)
    return Path(os.environ["nnUNet_results"]) / dataset / f"{trainer}__{plans}__{configuration}"


def final(folder: Path) -> Path:
    return folder / "fold_0" / "checkpoint_final.pth"


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, Path]:
    """All three trainers in 3D; one of them in a configuration of another name."""
    stable = train(PLAIN, "3d_fullres", STABLE)
    return {"Stable": stable, "Plastic": train(PLAIN, "3d_lowres", PLASTIC),
            "TaskVector": train(PLAIN, "3d_fullres", TASK, "-pretrained_weights", final(stable))}


def assert_trained(folder: Path, trainer: str, base: Path | None = None) -> None:
    checkpoint = checkpoints.read(final(folder))
    assert (checkpoint["trainer_name"], checkpoint[RECORD]["trainer"]) == ("nnUNetTrainer", trainer)
    assert checkpoint["current_epoch"] == 1
    summary = json.loads((folder / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["network_weights"].values())
    if base is not None:
        theta_0 = read_theta_0(theta_0_path(folder, checkpoint[RECORD]["theta_0"]))
        before = checkpoints.read(final(base))["network_weights"]
        assert all(torch.equal(theta_0[name], before[name]) for name in theta_0)
        assert any(not torch.equal(theta_0[name], checkpoint["network_weights"][name]) for name in theta_0)


def test_three_trainers_in_3d(models: dict[str, Path]) -> None:
    assert_trained(models["Stable"], STABLE)
    assert_trained(models["Plastic"], PLASTIC)
    assert_trained(models["TaskVector"], TASK, models["Stable"])


def test_stock_nnunet_predicts_without_this_package(root: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """The validation cases come out as at the end of the training: in evaluation nothing of the trainers is left."""
    cases = sorted(path.name for path in (models["Stable"] / "fold_0" / "validation").glob("*.nii.gz"))
    (tmp_path / "images").mkdir()
    for case in cases:
        image = case.replace(".nii.gz", "_0000.nii.gz")
        (tmp_path / "images" / image).symlink_to(root / "raw" / PLAIN / "imagesTr" / image)
    environment = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE, tmp_path / "images", tmp_path / "out",
                           *models.values()], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for number, folder in enumerate(models.values()):
        for case in cases:
            ours, stock = (SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path / case)) for path in (
                folder / "fold_0" / "validation", tmp_path / "out" / str(number)))
            assert np.array_equal(ours, stock), (folder, case)


def test_continuing_a_finished_run_changes_no_weight(models: dict[str, Path]) -> None:
    before = final(models["TaskVector"]).read_bytes()
    train(PLAIN, "3d_fullres", TASK, "--c")
    assert final(models["TaskVector"]).read_bytes() == before


def test_regions_and_ignore_label_in_2d(root: Path) -> None:
    stable = train(REGIONS, "2d", STABLE)
    assert_trained(stable, STABLE)
    assert_trained(train(REGIONS, "2d", TASK, "-pretrained_weights", final(stable)), TASK, stable)


def test_residual_encoders(root: Path, tmp_path: Path) -> None:
    plans = json.loads((root / "preprocessed" / PLAIN / "ResEnc.json").read_text())
    dataset = json.loads((root / "preprocessed" / PLAIN / "dataset.json").read_text())
    torch.manual_seed(1)
    base = build_network(plans, "3d_fullres", dataset)
    torch.save({"network_weights": base.state_dict()}, tmp_path / "base.pth")
    folder = train(PLAIN, "3d_fullres", TASK, "-pretrained_weights", tmp_path / "base.pth", plans="ResEnc")
    assert_trained(folder, TASK)
    assert list(checkpoints.read(final(folder))["network_weights"]) == list(base.state_dict())


def test_a_missing_base_stops_the_command(root: Path) -> None:
    done = fork_command("nnUNetv2_train", PLAIN, "3d_fullres", 1, "-tr", TASK, "-device", "cpu", "--c", expect=1)
    assert "the weights are still random: start it with -pretrained_weights" in done.stderr
