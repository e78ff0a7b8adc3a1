"""What is opened as a model, and what is refused with which words."""
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import base_network, write_model
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_transplant.errors import TransplantError, TransplantNote
from nnunet_transplant.extraction import extract
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.model_folder import model_labels, open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import read_merge
from nnunet_transplant.report_page import write_report


def changed(model: Path, fold: str = "0", **changes: Any) -> Path:
    """The model with other entries in its checkpoint; a callable makes a new entry of the old one."""
    path = model / f"fold_{fold}" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    torch.save(content | {key: value(content[key]) if callable(value) else value for key, value in changes.items()},
               path)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# What is opened

@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_ddp_and_compile_are_stripped(tmp_path: Path, prefix: str) -> None:
    plain, wrapped = (write_model(tmp_path / name, seed=3) for name in ("plain", "wrapped"))
    changed(wrapped, network_weights=lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    (one,), (other,) = open_models(plain), open_models(wrapped)
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_prefixes_stay_where_names_do_not_all_fit_then(tmp_path: Path) -> None:
    model = changed(write_model(tmp_path / "model"), network_weights=lambda weights: {
        f"module.{name}": tensor for name, tensor in weights.items()} | {"module.more": torch.ones(1)})
    with pytest.raises(TransplantError, match="does not fit the network of its plans.json"):
        open_models(model)


def test_a_trainer_that_nobody_has_is_taken_for_stock_where_the_network_is(tmp_path: Path) -> None:
    model = changed(write_model(tmp_path / "model"), trainer_name="nnUNetTrainerOfSomebody")
    with pytest.warns(TransplantNote, match="does not find the trainer nnUNetTrainerOfSomebody of .*model; its tensors "
                                            "are those of the stock network"):
        (opened,) = open_models(model)
    assert opened.trainer is nnUNetTrainer
    changed(model, network_weights=lambda weights: weights | {"more": torch.ones(1)})
    with pytest.raises(TransplantError, match="does not find the trainer 'nnUNetTrainerOfSomebody'"):
        open_models(model)


def test_the_note_is_one_line_of_a_command(tmp_path: Path, run: Callable) -> None:
    for fold in "01":
        changed(write_model(tmp_path / "model", fold=fold), fold, trainer_name="nnUNetTrainerOfSomebody")
    status, _, err = run("merge", "-m", tmp_path / "model", "-o", tmp_path / "merged")
    assert status == 0
    assert err.startswith("note: nnU-Net does not find the trainer nnUNetTrainerOfSomebody") and err.count("\n") == 1
    content = torch.load(tmp_path / "merged" / "fold_all" / "checkpoint_final.pth", weights_only=False)
    assert content["trainer_name"] == "nnUNetTrainer"


def test_a_task_vector_of_such_a_trainer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", base=base_network())
    file = tmp_path / "model" / "tau.safetensors"
    extract(model, file)
    changed_file = file.read_bytes().replace(b'nnUNetTrainer\\"', b'nnUNetTraineR\\"')
    assert len(changed_file) == file.stat().st_size and changed_file != file.read_bytes()
    file.write_bytes(changed_file)
    with pytest.warns(TransplantNote, match="trainer nnUNetTraineR"):
        (opened,) = open_models(file)
    assert opened.trainer is nnUNetTrainer


@pytest.mark.parametrize("axes", [(np.int64(0), np.int64(2)), [np.int32(2), np.int32(0)], (0, 2)])
def test_axes_of_numpy_are_axes(tmp_path: Path, axes: Any) -> None:
    model = changed(write_model(tmp_path / "model"), inference_allowed_mirroring_axes=axes)
    opened = open_models(model)[0].mirroring_axes
    assert opened is not None and sorted(opened) == [0, 2] and {type(axis) for axis in opened} == {int}


@pytest.mark.parametrize("axes", [(True,), (3,), (0.0,), ("0",), (np.float32(1),)])
def test_what_is_no_axis_is_refused(tmp_path: Path, axes: Any) -> None:
    model = changed(write_model(tmp_path / "model"), inference_allowed_mirroring_axes=axes)
    with pytest.raises(TransplantError, match="are no axes of an image"):
        open_models(model)


def test_paths_may_be_strings(tmp_path: Path) -> None:
    base = base_network()
    models = [str(write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i))
              for i, name in enumerate("ab")]
    theta_0 = str(next((tmp_path / "a").glob("theta_0*")))
    write_merge(merge_folders(models, base=theta_0, recipe=Recipe("ties")), str(tmp_path / "merged"))
    assert open_models(str(tmp_path / "merged"))[0].fold == "all"
    extract(models[0], str(tmp_path / "a.safetensors"), base=theta_0)
    write_report(str(tmp_path / "merged"), str(tmp_path / "report.html"))
    assert read_merge(str(tmp_path / "merged")).base == Path(theta_0)
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert record["folds"]["all"]["base"] == theta_0


def test_model_labels_are_short_and_unique(tmp_path: Path) -> None:
    standard = "nnUNetTrainerStable__nnUNetPlans__3d_fullres"
    folders = [tmp_path / "Dataset901_Liver" / standard, tmp_path / "other" / "Dataset901_Liver" / standard,
               tmp_path / "merged", tmp_path / "x" / "MERGED", tmp_path / "x" / standard, tmp_path / "table.txt",
               tmp_path / "Dice.png"]
    checkpoint = folders[0] / "fold_1" / "checkpoint_best.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    files = ("table.txt", "dice.png")  # beside which they become folders
    assert model_labels([*folders, checkpoint, tmp_path / "x" / ".." / "merged"], files) == [
        "Dataset901_Liver__nnUNetTrainerStable", "Dataset901_Liver__nnUNetTrainerStable_2", "merged", "MERGED_2",
        standard, "table.txt_2", "Dice.png_2", "Dataset901_Liver__nnUNetTrainerStable__fold_1", "merged_3"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

def only_best(folder: Path) -> None:
    (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "checkpoint_best.pth")


def of_version_1(folder: Path) -> None:
    (folder / "plans.json").unlink()
    (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "model_final_checkpoint.model")
    (folder / "plans.pkl").touch()


def one_level_up(folder: Path) -> None:
    inside = folder / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    inside.mkdir()
    for path in list(folder.iterdir()):
        if path != inside:
            path.rename(inside / path.name)


UNTRUE = {only_best: r"not a trained .*: it has no fold_X/checkpoint_final.pth, only fold_0/checkpoint_best.pth: give "
                     r"-chk checkpoint_best.pth, or that file",
          of_version_1: "is a model of nnU-Net v1",
          one_level_up: "Give one of the models in it: nnUNetTrainer__nnUNetPlans__3d_fullres"}


@pytest.mark.parametrize("change", UNTRUE, ids=lambda change: change.__name__)
def test_what_is_there_is_said(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = write_model(tmp_path / "model")
    change(model)
    with pytest.raises(TransplantError, match=UNTRUE[change]) as raised:
        open_models(model)
    assert "\n" not in str(raised.value)


def test_what_is_suggested_works(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    only_best(model)
    assert open_models(model, checkpoint_name="checkpoint_best.pth")[0].fold == "0"
    assert open_models(model / "fold_0" / "checkpoint_best.pth")[0].fold == "0"
    with pytest.raises(TransplantError, match="has no fold_0/checkpoint_final.pth, only fold_0/checkpoint_best.pth"):
        open_models(model, ["0"])


def test_a_missing_fold_names_those_that_are_there(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(TransplantError, match="has no fold_3/checkpoint_final.pth; it has fold_0/checkpoint_fin"):
        open_models(model, ["0", "3"])


def test_an_archive_is_to_be_installed(tmp_path: Path) -> None:
    (tmp_path / "model.zip").touch()
    with pytest.raises(TransplantError, match="nnUNetv2_install_pretrained_model_from_zip"):
        open_models(tmp_path / "model.zip")


# ---------------------------------------------------------------------------------------------------------------------
# What others can read

@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        model = write_model(tmp_path / "model", base=base_network())
        extract(model, tmp_path / "tau.safetensors")
        write_merge(merge_folders([model]), tmp_path / "merged")
    finally:
        os.umask(before)
    written = [tmp_path / "tau.safetensors", *model.glob("theta_0*"), *(tmp_path / "merged").rglob("*")]
    assert len(written) > 6
    for path in written:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
