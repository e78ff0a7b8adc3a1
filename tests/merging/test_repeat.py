"""A merge repeated from its merge.json, with a task more or less."""
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from factory import base_network, write_model, write_volumes

from nnunet_transplant.cli import merge as command
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extract import extract
from nnunet_transplant.merging.repeat import read_merge


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Path]:
    """Task folders in nnU-Net's layout; A has two folds."""
    base = base_network()
    folders = {name: tmp_path / f"Dataset90{i}_{name}" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
               for i, name in enumerate("ABC")}
    for i, (name, folder) in enumerate(folders.items()):
        for fold in ("0", "1") if name == "A" else ("0",):
            write_model(folder, {"background": 0, name: 1}, base=base, seed=10 * i + int(fold), fold=fold)
    return folders


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """nnunet_transplant_merge in this process: what it says on stderr."""
    def merge(output: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["nnunet_transplant_merge", "-o", str(tmp_path / output),
                                          *map(str, arguments)])
        try:
            command.main()
        except SystemExit as leave:
            assert leave.code == 1
        return capsys.readouterr().err
    return merge


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merge_repeats_byte_for_byte(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    options = ["-method", "ties", "-density", "0.4", "-weights", "1", "2", "-stage_weights", "1", "1", "1", "0.5", "1",
               "-keep_base_for", "*norm*"]
    assert merge("first", "-m", tasks["A"], tasks["B"], *options) == ""
    assert merge("again", "-from", tmp_path / "first") == ""
    assert content(tmp_path / "again") == content(tmp_path / "first")


def test_per_fold_and_task_vector_files_repeat(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("folds", "-m", tasks["A"], "-f", "0", "1", "--per_fold") == ""
    assert merge("folds_again", "-from", tmp_path / "folds") == ""
    assert content(tmp_path / "folds_again") == content(tmp_path / "folds")
    write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base_network().state_dict())
    extract(tasks["B"], tmp_path / "b.safetensors")
    assert merge("file", "-m", tmp_path / "b.safetensors", tasks["C"], "-base", tmp_path / "base") == ""
    assert merge("file_again", "-from", tmp_path / "file") == ""  # merge.json knows the base
    assert content(tmp_path / "file_again") == content(tmp_path / "file")


def test_tasks_are_added_and_dropped(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("ab", "-m", tasks["A"], tasks["B"], "-method", "ties") == ""
    assert merge("bc_by_hand", "-m", tasks["B"], tasks["C"], "-method", "ties") == ""
    for i, name in enumerate(("A", "Dataset900_A", tasks["A"])):
        assert merge(f"bc{i}", "-from", tmp_path / "ab", "-drop", name, "-m", tasks["C"]) == ""
        assert content(tmp_path / f"bc{i}") == content(tmp_path / "bc_by_hand")
    assert merge("abc_by_hand", "-m", *tasks.values()) == ""
    assert merge("abc", "-from", tmp_path / "ab", "-method", "average", "-m", tasks["C"]) == ""
    assert content(tmp_path / "abc") == content(tmp_path / "abc_by_hand")  # A's folds still share one weight


def test_volumes_are_remembered(tmp_path: Path, tasks: dict[str, Path], merge: Callable,
                                nnunet_folders: None) -> None:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "B": 1, "C": 2}, shape=(16, 16, 16))
    assert merge("fisher", "-m", tasks["B"], tasks["C"], "-method", "fisher", "-d", "501", "-n_cases", "1") == ""
    assert merge("again", "-from", tmp_path / "fisher") == ""
    assert content(tmp_path / "again") == content(tmp_path / "fisher")


def test_what_cannot_be_repeated_is_refused(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("ab", "-m", tasks["A"], tasks["B"]) == ""
    assert merge("weighted", "-m", tasks["A"], tasks["B"], "-weights", "0.4", "0.6") == ""
    for arguments, message in (
            (["-from", tmp_path / "ab", "-drop", "Liver"], "-drop Liver: the merge has no such model (it has A, B)"),
            (["-from", tmp_path / "ab", "-drop", "A", "B"], "no model is left"),
            (["-from", tmp_path / "nowhere"], "merge.json"), ([], "give the models to merge with -m"),
            (["-drop", "A", "-m", tasks["A"]], "-drop A"),
            (["-from", tmp_path / "weighted", "-drop", "A"], "had -weights of its own")):
        error = merge("out", *arguments)
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    path = tasks["B"] / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes() + b" ")
    assert "has changed since it was merged" in merge("out", "-from", tmp_path / "ab")
    path.unlink()
    assert "is not there any more" in merge("out", "-from", tmp_path / "ab")


def test_damaged_records_are_refused(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("ab", "-m", tasks["A"], tasks["B"]) == ""
    record = tmp_path / "ab" / "merge.json"
    whole = json.loads(record.read_text())
    for damage in ({}, {"folds": {}}, {"folds": []}, {"folds": {"all": {}}}, {"folds": {"all": {"inputs": [3]}}},
                   {"folds": {"all": whole["folds"]["all"] | {"volumes": 3}}},
                   {"folds": {"all": whole["folds"]["all"] | {"stage_weights": "x"}}}):
        record.write_text(json.dumps(damage))
        with pytest.raises(TransplantError, match="is not the record of a merge"):
            read_merge(tmp_path / "ab")
