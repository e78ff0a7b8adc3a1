"""Merged models as folders: what is written, and that they are there whole or not at all."""
import json
import os
from pathlib import Path

import pytest
import torch
from factory import base_network, small_plans, write_model

from nnunet_transplant import checkpoint
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import file_sha256
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.recipe import Recipe


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    base = base_network()
    return [write_model(tmp_path / "a", {"background": 0, "A": 1}, base=base, seed=1, axes=(0, 1, 2)),
            write_model(tmp_path / "b", {"background": 0, "B": 1, "C": 2}, base=base, seed=2, axes=(0, 2))]


def test_what_a_merge_writes(tmp_path: Path, tasks: list[Path]) -> None:
    dataset = json.loads((tasks[0] / "dataset.json").read_text())
    dataset["dataset"] = {"patient": {"images": ["/secret/patient.nii.gz"]}}
    (tasks[0] / "dataset.json").write_text(json.dumps(dataset))
    merge_folders(tasks, recipe=Recipe("ties")).save(tmp_path / "one")
    merge_folders(tasks, recipe=Recipe("ties")).save(tmp_path / "two")
    files = {str(path.relative_to(tmp_path / "one")): path.read_bytes()
             for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert set(files) == {"plans.json", "dataset.json", "dataset_fingerprint.json", "merge.json",
                          "fold_all/checkpoint_final.pth", "fold_all/progress.png", "fold_all/validation/summary.json"}
    for name, content in files.items():  # same inputs, same bytes
        assert (tmp_path / "two" / name).read_bytes() == content, name
        assert b"secret" not in content, name
    content = checkpoint.read(tmp_path / "one" / "fold_all" / "checkpoint_final.pth")
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["inference_allowed_mirroring_axes"] == (0, 2)
    inputs = json.loads(files["merge.json"])["folds"]["all"]["inputs"]
    for i, (one, task, structures) in enumerate(zip(inputs, tasks, [["A"], ["B", "C"]], strict=True)):
        path = task / "fold_0" / "checkpoint_final.pth"
        assert one == {"path": str(path), "sha256": file_sha256(path), "fold": "0", "group": i, "weight": 0.5,
                       "structures": structures}
    sources = json.loads(files["dataset.json"])["nnunet_transplant"]
    assert sources["classes"] == {"A": ["A"], "B": ["B"], "C": ["C"]}


def test_tied_tensors_stay_tied_and_are_stored_once(tmp_path: Path, tasks: list[Path]) -> None:
    """31 M parameters: the file is at most 1.05 times its unique weights."""
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        n_stages=6, features_per_stage=[32, 64, 128, 256, 320, 320], kernel_sizes=[[3] * 3] * 6,
        strides=[[1] * 3] + [[2] * 3] * 5, n_conv_per_stage=[2] * 6, n_conv_per_stage_decoder=[2] * 5)
    model = write_model(tmp_path / "big", plans=plans)
    merged = merge_folders([model])
    weights = merged["all"].state_dict
    unique = {id(tensor): tensor for tensor in weights.values()}
    parameters = sum(tensor.numel() for tensor in unique.values())
    assert 30e6 < parameters < 32e6
    merged.save(tmp_path / "merged")
    path = tmp_path / "merged" / "fold_all" / "checkpoint_final.pth"
    assert path.stat().st_size <= 1.05 * 4 * parameters
    loaded = checkpoint.read(path)["network_weights"]
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == len(unique)


def test_output_is_whole_or_absent(tmp_path: Path, tasks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    merged = merge_folders(tasks)
    output = tmp_path / "out" / "merged"

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            merged.save(output)
    assert list(output.parent.iterdir()) == []
    merged.save(output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(TransplantError, match="exists already"):
        merged.save(output)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            merged.save(output, overwrite=True)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    merge_folders(tasks, recipe=Recipe("ties")).save(output, overwrite=True)
    assert json.loads((output / "merge.json").read_text())["folds"]["all"]["recipe"]["method"] == "ties"
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(TransplantError, match="replaces nothing else"):
        merged.save(precious, overwrite=True)
    assert (precious / "thesis.txt").exists()


def test_a_fold_may_have_a_number(tmp_path: Path, tasks: list[Path]) -> None:
    """For tools that take only numbers: the same model, under another name."""
    merged = merge_folders(tasks)
    plain, numbered = merged.save(tmp_path / "plain"), merged.save(tmp_path / "numbered", fold=3)
    assert sorted(path.name for path in numbered.glob("fold_*")) == ["fold_3"]
    one, other = (checkpoint.read(folder / name / "checkpoint_final.pth")
                  for folder, name in ((plain, "fold_all"), (numbered, "fold_3")))
    assert other["init_args"]["fold"] == "3" and one["init_args"]["fold"] == "all"
    assert all(torch.equal(one["network_weights"][name], tensor) for name, tensor in other["network_weights"].items())
    assert list(json.loads((numbered / "merge.json").read_text())["folds"]) == ["3"]
    assert list(merged) == ["all"]
    folds = merge_folders([tasks[0]], per_fold=True)
    shared = merge_folders(tasks, recipe=Recipe(align="rebasin", share=["encoder.*"]))
    for wrong, fold, message in ((merged, -1, "-out_fold must not be negative, not -1"),
                                 (folds, 1, "-out_fold names the one fold that is written; here are several: 0"),
                                 (shared, 1, "-out_fold names the one fold that is written; here are several models")):
        with pytest.raises(TransplantError, match=message):
            wrong.save(tmp_path / "wrong", fold=fold)
        assert not (tmp_path / "wrong").exists()
