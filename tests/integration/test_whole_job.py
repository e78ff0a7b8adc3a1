"""Pre-train, split, fine-tune, merge, predict, evaluate: the real commands, for each of nnU-Net's kinds of labels."""
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from commands import fork_command
from factory import run_command, write_planned_phantom

pytestmark = pytest.mark.slow

TRAINER = "1epochs_2iterations"
# nnU-Net's own prediction in one process; its command has no flag for it
NO_POOLS = ("nnUNetPredictor.predict_from_files = lambda self, images, output, **_: "
            "self.predict_from_files_sequential(images, output)")
# kind of labels -> tasks of two structures each that together are more than one task's structures
TASKS = {"plain": ["Solid=Liver,Spleen", "Both=Kidney+Aorta"],
         "ignore": ["Solid=Liver,Spleen", "Both=Kidney+Aorta"],
         "regions": ["All=AllOrgans", "Inner=SolidOrgans+Kidney"],
         "regions_ignore": ["All=AllOrgans", "Inner=SolidOrgans+Kidney"]}


def model_folder(root: Path, dataset: str, trainer: str) -> Path:
    return root / "results" / dataset / f"{trainer}__nnUNetPlans__3d_fullres"


def train(run: Callable, number: int, trainer: str, *more: object) -> None:
    run("nnUNetv2_train", number, "3d_fullres", 0, "-tr", trainer, "-device", "cpu", *more)


def predict_without_this_package(pools: int, *arguments: object) -> None:
    """Stock nnUNetv2_predict_from_modelfolder where `import nnunet_transplant` fails and no extra trainers are set."""
    code = ("import sys; sys.modules['nnunet_transplant'] = None\n"
            "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor, predict_entry_point_modelfolder\n"
            f"{NO_POOLS * (not pools)}\n"
            "if __name__ == '__main__': predict_entry_point_modelfolder()")
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments), "-npp", "1", "-nps", "1"],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def voxels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
            for path in sorted(folder.glob("*.nii.gz"))}


@pytest.mark.parametrize("kind", TASKS)
def test_the_whole_job(nnunet: Path, kind: str) -> None:
    number = 801 + 10 * list(TASKS).index(kind)
    stable, task = f"nnUNetTrainerStable_{TRAINER}", f"nnUNetTrainerTaskVector_{TRAINER}"
    # of one kind every command of ours, a training and a prediction with processes, as a user runs them
    run, pools = (run_command, 1) if kind == "plain" else (fork_command, 0)
    write_planned_phantom(nnunet, number, kind)
    train(run, number, stable)
    run("nnunet_transplant_split_tasks", "-d", number, "-tasks", *TASKS[kind],
        "-ids", number + 1, number + 2, "-np", 1)
    base = model_folder(nnunet, f"Dataset{number}_Phantom", stable) / "fold_0" / "checkpoint_final.pth"
    experts = []
    for i, text in enumerate(TASKS[kind], 1):
        train(fork_command, number + i, task, "-pretrained_weights", base)
        experts.append(model_folder(nnunet, f"Dataset{number + i}_{text.partition('=')[0]}", task))

    merged = nnunet / f"merged_{kind}"
    run("nnunet_transplant_merge", "-m", *experts, "-f", 0, "-o", merged, "-method", "ties")
    dataset = json.loads((merged / "dataset.json").read_text())
    structures = {"plain": ["Solid", "Kidney", "Aorta"], "regions": ["All", "SolidOrgans", "Kidney"]}
    assert [name for name in dataset["labels"] if name not in ("background", "ignore")] == \
        structures[kind.removesuffix("_ignore") if kind != "ignore" else "plain"]
    assert ("ignore" in dataset["labels"]) == ("ignore" in kind)

    images = nnunet / "raw" / f"Dataset{number}_Phantom" / "imagesTr"
    few = nnunet / f"images_{kind}"
    few.mkdir()
    for path in sorted(images.iterdir())[:2]:
        (few / path.name).symlink_to(path)
    fork_command("nnunet_transplant_predict", "-i", few, "-o", nnunet / f"ours_{kind}", "-m", merged, "-device", "cpu",
                 "-npp", 0, "-nps", 0)
    run("nnunet_transplant_predict", "-i", few, "-o", nnunet / f"fly_{kind}", "-m", *experts, "-f", 0,
        "-method", "ties", "-device", "cpu", "-npp", pools, "-nps", pools)
    predict_without_this_package(pools, "-i", few, "-o", nnunet / f"stock_{kind}", "-m", merged, "-f", "all",
                                 "-device", "cpu")
    ours, fly, stock = (voxels(nnunet / f"{name}_{kind}") for name in ("ours", "fly", "stock"))
    assert len(stock) == 2
    for name, expected in stock.items():
        np.testing.assert_array_equal(ours[name], expected)
        np.testing.assert_array_equal(fly[name], expected)

    run("nnunet_transplant_evaluate", "-m", merged, experts[0], "-d", number, "-f", 0,
        "-o", nnunet / f"scores_{kind}", "-device", "cpu")
    assert len(list((nnunet / f"scores_{kind}").glob("*/summary.json"))) == 2
    analyse(nnunet / f"analysis_{kind}", number, base, experts, merged, nnunet / f"scores_{kind}")


def analyse(folder: Path, number: int, base: Path, experts: list[Path], merged: Path, scores: Path) -> None:
    """Every command of analysis, as short as can be, on models of real training; the report holds all of it."""
    look = ["-d", number, "-device", "cpu"]
    fork_command("nnunet_transplant_interference", "-m", *experts, "-o", folder / "interference")
    fork_command("nnunet_transplant_flatness", "-m", base, "-tasks", *experts, "-n_patches", 2, "-n_eigenvalues", 1,
                 "-n_probes", 1, "-o", folder / "flatness", *look)
    fork_command("nnunet_transplant_landscape", "-m", *experts, "-also", base, merged, "-n_patches", 1, "-points", 2,
                 "-line_points", 2, "-o", folder / "landscape", *look)
    fork_command("nnunet_transplant_sweep", "-m", *experts, "-f", "all", "-n_cases", 2, "-trials", 2, "-o",
                 folder / "sweep", *look)
    fork_command("nnunet_transplant_merge", "-recipe", folder / "sweep" / "recipe.json", "-o", folder / "best")
    best = json.loads((folder / "best" / "merge.json").read_text())["folds"]["all"]
    assert [Path(each["path"]).parents[1] for each in best["inputs"]] == experts
    assert best["recipe"]["weights"] == json.loads((folder / "sweep" / "sweep.json").read_text())["best"]["weights"]
    parts = [part for name in ("interference", "flatness", "landscape", "sweep")
             for part in (f"-{name}", folder / name)]
    fork_command("nnunet_transplant_report", "-m", merged, "-evaluation", scores, *parts, "-o", folder / "report.html")
    assert (folder / "report.html").read_text().count("<img") >= 6


def test_merged_folder_is_exported_installed_and_predicted(nnunet: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Into nnUNet_results, out as a zip, into another nnUNet_results, and predicted there by its dataset id."""
    experts = [model_folder(nnunet, f"Dataset{number}_{name}", f"nnUNetTrainerTaskVector_{TRAINER}")
               for number, name in ((802, "Solid"), (803, "Both"))]
    output = nnunet / "results" / "Dataset899_Merged" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    fork_command("nnunet_transplant_merge", "-m", *experts, "-o", output)
    fork_command("nnUNetv2_export_model_to_zip", "-d", 899, "-c", "3d_fullres", "-f", "all",
                 "-o", tmp_path / "model.zip")
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    fork_command("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "model.zip")
    fork_command("nnUNetv2_predict", "-i", nnunet / "images_plain", "-o", tmp_path / "installed", "-d", 899,
                 "-c", "3d_fullres", "-f", "all", "-device", "cpu", "-npp", 0, "-nps", 0)
    fork_command("nnunet_transplant_predict", "-i", nnunet / "images_plain", "-o", tmp_path / "ours", "-m", output,
                 "-device", "cpu", "-npp", 0, "-nps", 0)
    ours, installed = voxels(tmp_path / "ours"), voxels(tmp_path / "installed")
    assert len(ours) == 2
    for name, expected in installed.items():
        np.testing.assert_array_equal(ours[name], expected)
