"""Installed commands without the seconds that Python, torch and nnU-Net take to start."""
import importlib.metadata
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from multiprocessing.context import SpawnContext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import nnunetv2.training.nnUNetTrainer

OURS = ("split_tasks", "merge", "predict", "evaluate")
PRELOADED = [
    "nnunetv2.run.run_training", "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
    "nnunetv2.inference.predict_from_raw_data", *(f"nnunet_transplant.cli.{name}" for name in OURS),
    *(module.name for module in pkgutil.walk_packages(nnunetv2.training.nnUNetTrainer.__path__,
                                                      "nnunetv2.training.nnUNetTrainer."))]  # nnU-Net's search does so

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def fork_command(name: str, *args: object, expect: int = 0) -> subprocess.CompletedProcess:
    """As factory.run_command, for tests of what a command does rather than of its process: the command's entry point in
    a fork of a server that has imported nnU-Net, which is so fresh that it has started no thread."""
    with TemporaryDirectory() as folder:
        output = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = _server.Process(target=_call, args=(name, [*map(str, args)], dict(os.environ), os.getcwd(), output))
        process.start()
        process.join()
        done = subprocess.CompletedProcess([name, *args], process.exitcode, *(path.read_text() for path in output))
    assert done.returncode == expect, f"{name} {args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def _call(name: str, args: list[str], environment: dict[str, str], folder: str, output: list[Path]) -> None:
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    SpawnContext.Pool = lambda _, processes: ThreadPool(processes)  # its processes would import all of it again
    sys.argv = [name, *args]
    (command,) = importlib.metadata.entry_points(group="console_scripts", name=name)
    sys.exit(command.load()())
