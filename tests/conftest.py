import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import pools_of_threads

from nnunet_transplant.environment import ext_trainer_value


@pytest.fixture(scope="session", autouse=True)
def few_processes() -> Iterator[None]:
    """Tests and the commands that they start share few cores."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE"}.items():
            patch.setenv(name, value)
        pools_of_threads(patch)
        yield


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small networks are faster so, and sums have one order. Predicting on a CPU sets as many as there are cores."""
    torch.set_num_threads(1)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net's three folders are raw, preprocessed and results in the test's own."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """A command of ours in this process: exit status, stdout, stderr."""
    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"nnunet_transplant_{name}", *map(str, arguments)])
        try:
            importlib.import_module(f"nnunet_transplant.cli.{name}").main()
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return run


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with nnU-Net's three folders, and the environment that commands started by tests run in."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_extTrainer", ext_trainer_value())
        yield root
