"""Importing the package changes nothing in the process that imports it."""
import os
import subprocess
import sys

import pytest

EVERYTHING = """
import importlib, os, pkgutil, sys
import matplotlib
def state():
    return (dict.__getitem__(matplotlib.rcParams, "backend"),  # without resolving it
            {name: value for name, value in os.environ.items() if name.startswith("nnUNet")})
before = state()
import nnunet_transplant
for module in pkgutil.walk_packages(nnunet_transplant.__path__, "nnunet_transplant."):
    if "trainers" not in module.name:  # nnU-Net imports those
        importlib.import_module(module.name)
assert state() == before
matplotlib.use("svg")
assert matplotlib.get_backend() == "svg"
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "pdf"])
def test_importing_changes_neither_backend_nor_nnunets_variables(backend: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", EVERYTHING], capture_output=True, text=True,
                          env=environment | ({} if backend is None else {"MPLBACKEND": backend}))
    assert done.returncode == 0, done.stderr
