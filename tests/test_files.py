"""Files and folders are there whole or not at all, whatever interrupts their writer."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import DEEPEST, MOST_TEXT, atomic_path, file_sha256, parse_json, read_json


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_of_two_writers_of_one_folder_one_wins_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with pytest.raises(TransplantError, match="by somebody else"), atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "mine").touch()
        path.mkdir()
        (path / "theirs").touch()
    assert [file.name for file in path.iterdir()] == ["theirs"] and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_replaced_again_at_once_leaves_no_earlier_one(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last rename and the clean-up another writer has moved the new folder aside."""
    path, aside = tmp_path / "folder", tmp_path / f".folder.old.{os.getppid()}.tmp"
    path.mkdir()
    (path / "earlier").touch()
    rename = os.rename

    def rename_and_lose(source: Path, target: Path) -> None:
        rename(source, target)
        if target == path:
            rename(path, aside)

    with monkeypatch.context() as patch, atomic_path(path, replace=True) as temporary:
        patch.setattr(os, "rename", rename_and_lose)
        temporary.mkdir()
        (temporary / "mine").touch()
    assert list(tmp_path.iterdir()) == [aside]  # what the other one puts back, or removes
    assert [file.name for file in aside.iterdir()] == ["mine"]


def test_a_killed_writer_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    code = ("import sys, time\nfrom pathlib import Path\nfrom nnunet_transplant.files import atomic_path\n"
            "with atomic_path(Path(sys.argv[1])) as folder:\n    folder.mkdir()\n    time.sleep(600)")
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not list(tmp_path.glob(".folder.*.tmp")):
        assert writer.poll() is None
        time.sleep(0.05)
    with atomic_path(path) as temporary:  # the other one still runs: its folder stays
        temporary.mkdir()
        assert len(list(tmp_path.glob(".folder.*.tmp"))) == 2
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with atomic_path(path, replace=True) as temporary:
        temporary.mkdir()
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_moved_aside_by_a_killed_writer_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".folder.old.{gone.pid}.tmp").mkdir()
    (tmp_path / f".folder.old.{gone.pid}.tmp" / "precious").touch()
    with pytest.raises(KeyError), atomic_path(path, replace=True):
        raise KeyError
    assert [file.name for file in path.iterdir()] == ["precious"] and list(tmp_path.iterdir()) == [path]


def test_json_is_an_object_or_a_list_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for content, kind, message in (("{}", list, "holds no JSON list"), ("[]", dict, "holds no JSON object"),
                                   ("{", dict, "is not valid JSON"), ("\xff", dict, "is not valid JSON"),
                                   ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), list, "nested too deep")):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(TransplantError, match=f"{path} .*{message}"):
            read_json(path, kind)
    with pytest.raises(TransplantError, match=r"source is too long: 10 MB"):
        parse_json(" " * (MOST_TEXT + 1), "source")
    with pytest.raises(TransplantError, match="there is no file"):
        read_json(tmp_path / "none.json")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes('{"é": [1]}'.encode(encoding))
        assert read_json(path) == {"é": [1]}


def test_sha256_of_a_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 9000)
    assert file_sha256(path) == subprocess.check_output(["sha256sum", path], text=True).split()[0]
