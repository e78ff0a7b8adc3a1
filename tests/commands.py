"""Installed commands without the seconds that Python, torch and nnU-Net take to start."""
import functools
import importlib.metadata
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


def fork_command(name: str, *args: object, expect: int = 0) -> subprocess.CompletedProcess:
    """As factory.run_command, for tests of what a command does rather than of how it starts: its entry point in a fork
    of a server that has imported nnU-Net and done nothing else."""
    with TemporaryDirectory() as folder:
        output = [Path(folder, stream) for stream in ("stdout", "stderr")]
        process = _server().Process(target=_call, args=(name, [*map(str, args)], dict(os.environ), os.getcwd(), output,
                                                        multiprocessing.get_start_method()))
        process.start()
        process.join()
        done = subprocess.CompletedProcess([name, *args], process.exitcode, *(path.read_text() for path in output))
    assert done.returncode == expect, f"{name} {args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@functools.cache
def _server() -> ForkServerContext:
    trainers = importlib.import_module("nnunetv2.training.nnUNetTrainer")  # nnU-Net's search imports all of them
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([
        "nnunetv2.run.run_training", "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints",
        *(f"nnunet_transplant.cli.{name}" for name in ("split_tasks", "merge", "predict", "evaluate", "sweep",
                                                       "flatness", "landscape", "interference", "report")),
        *(module.name for module in pkgutil.walk_packages(trainers.__path__, f"{trainers.__name__}."))])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.sep)  # it imports from where it starts: here the checkout's sources before the installed package
        forkserver.ensure_running()
    return server


def _call(name: str, args: list[str], environment: dict[str, str], folder: str, output: list[Path],
          start_method: str) -> None:
    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    multiprocessing.set_start_method(start_method, force=True)  # a server's child would start servers
    pools_of_threads(pytest.MonkeyPatch())
    _draw_fewer_intensities()
    sys.argv = [name, *args]
    command, *_ = importlib.metadata.entry_points(group="console_scripts", name=name)
    sys.exit(command.load()())


def pools_of_threads(patch: pytest.MonkeyPatch) -> None:
    """For nnU-Net: its processes import torch again, and to list the files of a folder it starts twelve."""
    patch.setattr(SpawnContext, "Pool", staticmethod(ThreadPool))
    patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)


def _draw_fewer_intensities() -> None:
    """10,000 of each image for the fingerprint. nnU-Net draws 10^8 in all, from however few voxels."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    collect = DatasetFingerprintExtractor.collect_foreground_intensities
    DatasetFingerprintExtractor.collect_foreground_intensities = staticmethod(
        lambda segmentation, images, num_samples: collect(segmentation, images, num_samples=10_000))
