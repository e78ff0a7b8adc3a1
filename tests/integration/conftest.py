import importlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from commands import fork_command
from experiment import BENCHMARKS


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as a module, its commands run in forks of a server that has imported nnU-Net."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def execute(command: Sequence[str], environment: Mapping[str, str]) -> None:
        if command[0] == "python":
            subprocess.run([sys.executable, *command[1:]], check=True)
            return
        with monkeypatch.context() as patch:
            for name in environment.keys() - os.environ.keys() | {"nnUNet_results"}:
                patch.setenv(name, environment[name])
            for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_extTrainer"):
                patch.setenv(name, environment[name])
            if command[0] == "nnUNetv2_train":
                patch.setenv("nnUNet_n_proc_DA", "0")  # workers take longer to start than so few steps
            fork_command(*command)

    monkeypatch.setattr(importlib.import_module("steps"), "execute", execute)
    return importlib.import_module("transplant_experiment")


@pytest.fixture
def documentation(experiment, tmp_path: Path) -> Path:
    """With a page that has a place for the tables of every setting."""
    folder = tmp_path / "documentation"
    folder.mkdir()
    places = "\n".join(f"<!-- {setting}: {table} -->\n<!-- end of {setting}: {table} -->"
                       for setting in ("brain", "abdomen", "maxillofacial", "mouse") for table in experiment.TABLES)
    (folder / "stable_base.md").write_text(f"# Results\n{places}")
    return folder
