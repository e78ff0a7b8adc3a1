"""The commands as a user meets them: help with an example, and one clear line with a non-zero exit for bad input."""
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import SimpleITK
import torch
from commands import fork_command
from factory import base_network, small_plans, write_model, write_volumes

from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import predictor

COMMANDS = ("trainers", "split_tasks", "merge", "extract", "predict", "evaluate", "interference", "flatness",
            "sweep", "landscape", "report", "spec", "demo")


def test_every_installed_command_is_here() -> None:
    installed = {point.name for point in importlib.metadata.entry_points(group="console_scripts")
                 if point.value.startswith("nnunet_transplant.")}
    assert installed == {f"nnunet_transplant_{name}" for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str, run: Callable) -> None:
    status, out, _ = run(name, "-h")
    assert status == 0
    assert "example:" in out and f"nnunet_transplant_{name}" in out.partition("example:")[2]


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = base_network()
    return [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i) for i, name in enumerate("AB")]


def test_merge_says_what_it_wrote(tmp_path: Path, models: list[Path], run: Callable) -> None:
    status, out, err = run("merge", "-m", *models, "-o", tmp_path / "merged", "-method", "ties", "-density", "0.5",
                           "-lambda", "0.8", "-weights", "1", "2")
    assert (status, err) == (0, "")
    assert f"wrote {tmp_path / 'merged'} (fold_all)" in out and "structures: A, B" in out
    status, _, _ = run("merge", "-m", *models, "-o", tmp_path / "numbered", "-out_fold", 0)
    assert status == 0
    assert (tmp_path / "numbered" / "fold_0" / "checkpoint_final.pth").exists()


def test_merge_says_what_it_kept_of_the_experts(tmp_path: Path, models: list[Path], nnunet_folders: None,
                                                run: Callable) -> None:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, shape=(32, 40, 32))
    status, out, err = run("merge", "-m", *models, "-o", tmp_path / "merged", "-fit", "head", "-d", 501,
                           "-n_patches", 3, "-device", "cpu")
    assert (status, err) == (0, "")
    agreement = json.loads((tmp_path / "merged" / "merge.json").read_text())["folds"]["all"]["check"]["agreement"]
    said = out.partition("agreement with the experts (Dice) on 8 patches that no step looked at:\n")[2].splitlines()
    assert said[0].split() == ["merged", "base,", "head", "fitted"]
    for line, name in zip(said[1:], "AB", strict=False):
        assert line.split() == [name, *(f"{of[name]:.3f}" for of in agreement.values())]


BAD = {
    "unknown method": (["-method", "magic"], "no merging method 'magic'"),
    "weights that do not sum to 1": (["-weights", "0.5", "0.6"], "must sum to 1"),
    "too few weights": (["-weights", "1"], "1 numbers for 2 models"),
    "parameter of another method": (["-method", "average", "-density", "0.5"],
                                    "average has no -density: there are no options; ties, dare"),
    "missing fold": (["-f", "3"], "A has no fold_3/checkpoint_final.pth; it has fold_0/checkpoint_final.pth"),
    "missing base": (["-base", "/nowhere", "-method", "ties"], "there is no model folder"),
    "two names for one fold": (["--per_fold", "-out_fold", "1"], "-out_fold"),
}


@pytest.mark.parametrize("name", BAD)
def test_merge_refuses_in_one_line(tmp_path: Path, models: list[Path], run: Callable, name: str) -> None:
    arguments, message = BAD[name]
    status, _, err = run("merge", "-m", *models, "-o", tmp_path / "merged", *arguments)
    assert status == 1
    assert message in err and err.count("\n") == 1 and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B"]


def test_merge_never_overwrites_what_it_reads(tmp_path: Path, models: list[Path], run: Callable) -> None:
    before = sorted(tmp_path.rglob("*"))
    for output in (models[0], tmp_path, models[0] / "fold_0"):
        status, _, err = run("merge", "-m", *models, "-o", output, "--overwrite")
        assert status == 1 and err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_predict_refuses_in_one_line(tmp_path: Path, models: list[Path], run: Callable) -> None:
    (tmp_path / "images").mkdir()
    output = tmp_path / "out"
    for arguments, message in [
            (["-i", tmp_path / "nowhere"], "there is no folder"),
            (["-i", tmp_path / "images"], "has no image CASE_0000.nii.gz"),
            (["-i", tmp_path / "images", "-step_size", "2"], "-step_size"),
            (["-i", tmp_path / "images", "-part_id", "2"], "-part_id"),
            (["-i", tmp_path / "images", "-device", "tpu"], "-device must be")]:
        status, _, err = run("predict", "-m", *models, "-o", output, "-device", "cpu", *arguments)
        assert status == 1 and message in err and err.count("\n") == 1
        assert not output.exists()


def cascade(folder: Path) -> Path:
    """A second stage, whose input is the image and the labels of the first."""
    plans = small_plans()
    fullres = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {"3d_cascade_fullres": fullres | {"previous_stage": "3d_lowres"},
                               "3d_lowres": fullres | {"next_stage": "3d_cascade_fullres"}}
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    return write_model(folder, plans=plans)


def test_predict_looks_for_the_previous_stage_first(tmp_path: Path, run: Callable, nnunet_folders: None) -> None:
    images = write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "one": 1, "two": 2}, 3) / "imagesTr"
    labels = images.with_name("labelsTr")
    output = tmp_path / "out"
    arguments = ["-i", images, "-m", cascade(tmp_path / "model"), "-o", output, "-device", "cpu", "-npp", 0, "-nps", 0]
    (labels / "case_1.nii.gz").rename(tmp_path / "case_1.nii.gz")
    for more, message in (([], "give -prev_stage_predictions"),
                          (["-prev_stage_predictions", tmp_path / "nowhere"], f"there is no folder {tmp_path}/nowhere"),
                          (["-prev_stage_predictions", labels], f"{labels} has no case_1.nii.gz: predict")):
        status, _, err = run("predict", *arguments, *more)
        assert status == 1 and message in err and err.count("\n") == 1
        assert not output.exists()
    part = ["-num_parts", 3, "-part_id", 2]  # which is not waiting for the missing one
    assert run("predict", *arguments, "-prev_stage_predictions", labels, *part)[0] == 0
    assert [path.name for path in output.glob("case_*")] == ["case_2.nii.gz"]
    (tmp_path / "case_1.nii.gz").rename(labels / "case_1.nii.gz")
    assert run("predict", *arguments, "-prev_stage_predictions", labels)[0] == 0
    assert len(list(output.glob("case_*"))) == 3


def test_a_merge_of_each_fold_repeats_in_one_line_or_as_an_ensemble(tmp_path: Path, run: Callable,
                                                                    nnunet_folders: None) -> None:
    base, plans = base_network(), small_plans()
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    for fold in "01":
        for seed, name in enumerate("AB"):
            write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=10 * int(fold) + seed, fold=fold,
                        plans=plans)
    merged = tmp_path / "merged"
    assert run("merge", "-m", tmp_path / "A", tmp_path / "B", "--per_fold", "-o", merged)[0] == 0
    status, _, err = run("merge", "-from", merged, "-out_fold", 0, "-o", tmp_path / "again")
    assert status == 1 and "that earlier merge has several: 0 1" in err and err.count("\n") == 1
    images = write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, 1) / "imagesTr"
    look = ["-i", images, "-device", "cpu", "-npp", 0, "-nps", 0]
    assert run("predict", *look, "-from", merged, "-o", tmp_path / "ours")[0] == 0
    stock = predictor(open_models(merged), torch.device("cpu"), progress_bar=False)
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(images), str(tmp_path / "stock"))
    ours, theirs = (SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / name / "case_0.nii.gz"))
                    for name in ("ours", "stock"))
    assert (ours == theirs).all() and ours.any()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: the kernel refuses the write in the middle of the checkpoint."""
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [32, 64, 128]
    model = write_model(tmp_path / "model", plans=plans)
    program = Path(sys.executable).with_name("nnunet_transplant_merge")
    done = subprocess.run(
        [program, "-m", model, "-o", tmp_path / "merged"], capture_output=True, text=True, env=dict(os.environ),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "nnunet_transplant_merge: error:" in done.stderr
    assert "File too large" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_the_installed_command_refuses_code_in_a_pickle(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(path, weights_only=False) | {"more": print}, path)
    done = fork_command("nnunet_transplant_merge", "-m", model, "-o", tmp_path / "merged", expect=1)
    assert "print, which can run code" in done.stderr
    assert done.stderr.count("\n") == 1
