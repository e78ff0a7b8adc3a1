"""The demo at a toy scale: the same commands, hardly any training."""
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import matplotlib.image
import pytest
from commands import fork_command

from nnunet_transplant import demo
from nnunet_transplant.data.phantom import ORGANS
from nnunet_transplant.demo import DemoSize, run_demo
from nnunet_transplant.errors import TransplantError

pytestmark = pytest.mark.slow


def run_quickly(command: list[str], env: dict[str, str], stdout: TextIO, stderr: int) -> subprocess.CompletedProcess:
    """Only our own command as a user runs it."""
    name = Path(command[0]).name
    if not name.startswith("nnUNetv2_"):
        return subprocess.run(command, env=env, stdout=stdout, stderr=stderr)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in env.items():
            patch.setenv(variable, value)
        done = fork_command(name, *command[1:])
    stdout.write(done.stdout + done.stderr)
    return done


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "set by the demo itself")  # and undone after the test
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run_quickly, STDOUT=subprocess.STDOUT))
    table = run_demo(tmp_path / "demo", DemoSize(cases=5, features=2, variant="_1epochs_2iterations"))
    assert list(table.index) == list(ORGANS)
    assert list(table.columns) == ["LiverSpleen", "KidneyAorta", "average", "base, head fitted", "default", "Joint"]
    assert table[["average", "base, head fitted", "default", "Joint"]].notna().all(axis=None)
    assert table["LiverSpleen"].isna().tolist() == [False, False, True, True]  # an expert knows its organs only
    image = matplotlib.image.imread(tmp_path / "demo" / "demo.png")
    assert image.shape[0] > 400 and image.shape[1] > 1500 and image[..., :3].std() > 0.1
    with pytest.raises(TransplantError, match="exists already"):
        run_demo(tmp_path / "demo")
