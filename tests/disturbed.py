"""Merges that are killed, that compete for one folder, and that are repeated; prints as JSON what became of them.

    python disturbed.py kills FOLDER NUMBER
    python disturbed.py competition FOLDER ROUNDS
    python disturbed.py digests FOLDER

FOLDER holds the models a, b and c. A process of its own, because it forks: a new process for each merge would spend
seconds on imports. Raises AssertionError where a merge is neither there whole nor absent.
"""
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_transplant import checkpoint
from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.cli.merge import main as merge_command
from nnunet_transplant.merged_model import Merged
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.methods import METHODS
from nnunet_transplant.recipe import Recipe

Files = dict[str, bytes]


def fork(work: Callable[[], None]) -> int:
    """Do it in a child process, which exits with 1 if it raises."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        os._exit(status)


def wait(child: int) -> int:
    """The exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files(folder: Path) -> Files | None:
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def merge(root: Path, method: str) -> Merged:
    return merge_folders([root / "a", root / "b"], recipe=Recipe(method))


class Killed:
    """One folder that merges are written to, and killed."""

    def __init__(self, root: Path) -> None:
        self.root, self.output = root, root / "out" / "merged"
        self.merged = {method: merge(root, method) for method in ("average", "ties")}
        for method, merged in self.merged.items():
            merged.save(root / method)
        self.whole = {method: files(root / method) for method in self.merged}
        self.seen: Counter[str] = Counter()

    def work(self, overwrite: bool) -> None:
        merge(self.root, "ties").save(self.output, overwrite=overwrite)

    def prepare(self, overwrite: bool) -> None:
        """Absent, or an earlier merge to replace."""
        shutil.rmtree(self.output, ignore_errors=True)
        if overwrite:
            shutil.copytree(self.root / "average", self.output)

    def check(self, overwrite: bool) -> None:
        """Absent or whole; what was to be replaced is there, at the latest after the next merge."""
        found = files(self.output)
        state = "absent" if found is None else next((m for m in self.whole if self.whole[m] == found), "broken")
        aside = [files(path) for path in self.output.parent.glob(".merged.old.*.tmp")]
        if overwrite:
            assert state in ("average", "ties") or (state == "absent" and aside == [self.whole["average"]]), state
        else:
            assert state in ("absent", "ties"), state
        self.seen[state] += 1
        if found is not None:
            weights = checkpoint.read(self.output / "fold_all" / "checkpoint_final.pth")["network_weights"]
            expected = self.merged[state]["all"].state_dict
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
            if self.seen[state] % 10 == 1:
                predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
                predictor.initialize_from_trained_model_folder(str(self.output), ("all",))
                self.seen["loaded by nnU-Net"] += 1

    def next_run(self) -> None:
        """Nothing is left of those that were killed."""
        self.merged["ties"].save(self.output, overwrite=True)
        assert files(self.output) == self.whole["ties"]
        assert os.listdir(self.output.parent) == ["merged"]

    def at_random(self, number: int) -> None:
        self.prepare(overwrite=False)
        start = time.monotonic()
        assert wait(fork(lambda: self.work(overwrite=False))) == 0
        longest, rng = time.monotonic() - start, random.Random(0)
        for turn in range(number):
            overwrite = turn % 2 == 1
            self.prepare(overwrite)
            child = fork(lambda: self.work(overwrite))  # noqa: B023 - the child runs at once
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            killed = wait(child) == -signal.SIGKILL
            longest *= 1.03 if killed else 0.9  # about one in four ends, however busy the machine is meanwhile
            self.seen["killed"] += killed
            self.check(overwrite)
            if turn % 4 >= 2 or list(self.output.parent.glob(".merged.old.*")):
                self.next_run()

    def at_every_rename(self) -> None:
        """The moments that chance does not meet: after either rename of a merge that replaces another."""
        for turn, expected in enumerate(("absent", "ties")):
            def work(left: int = turn) -> None:
                rename, calls = os.rename, itertools.count()

                def rename_and_die(*paths: Path) -> None:
                    rename(*paths)
                    if self.output in paths and next(calls) == left:
                        os.kill(os.getpid(), signal.SIGKILL)
                os.rename = rename_and_die
                self.work(overwrite=True)
            self.prepare(overwrite=True)
            assert wait(fork(work)) == -signal.SIGKILL
            before = self.seen[expected]
            self.check(overwrite=True)
            assert self.seen[expected] == before + 1
            self.next_run()


def kills(root: Path, number: int) -> Counter[str]:
    killed = Killed(root)
    killed.at_random(number)
    killed.at_every_rename()
    return killed.seen


def competition(root: Path, rounds: int) -> list[str]:
    """The messages of those that lost."""
    context, output = multiprocessing.get_context("fork"), root / "out" / "merged"
    methods = ("average", "ties")
    whole = {}
    for method in methods:
        merge(root, method).save(root / method)
        whole[method] = files(root / method)
    merge(root, "task_arithmetic").save(root / "earlier")

    def command(method: str, start: multiprocessing.Barrier, finish: multiprocessing.Barrier, overwrite: bool) -> None:
        rename, calls = os.rename, itertools.count()

        def rename_together(*paths: Path) -> None:
            if output in paths and next(calls) == 0:
                finish.wait()
            rename(*paths)
        os.rename = rename_together
        sys.argv = ["nnunet_transplant_merge", "-m", str(root / "a"), str(root / "b"), "-o", str(output), "-method",
                    method, *["--overwrite"] * overwrite]
        for number, name in ((1, "stdout"), (2, f"{method}.stderr")):
            os.dup2(os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        start.wait()
        merge_command()

    lost = []
    for turn in range(rounds):
        overwrite, together = turn % 3 == 2, turn % 3 > 0
        shutil.rmtree(output, ignore_errors=True)
        if overwrite:
            shutil.copytree(root / "earlier", output)
        # both write their folders whole before either may rename its own; or they run as they come
        barriers = context.Barrier(2, timeout=60), context.Barrier(2 if together else 1, timeout=60)
        children = {method: fork(lambda: command(method, *barriers, overwrite))  # noqa: B023 - the child runs at once
                    for method in methods}
        status = {method: wait(child) for method, child in children.items()}
        winners = [method for method in methods if status[method] == 0]
        assert set(status.values()) <= {0, 1}, status
        assert len(winners) == 1 or (overwrite and winners), status
        assert files(output) in [whole[method] for method in winners], status
        assert os.listdir(output.parent) == ["merged"]
        for method in methods:
            said = (root / f"{method}.stderr").read_text().splitlines()
            assert len(said) == (method not in winners), said
            lost += said
    return lost


def recipes() -> dict[str, Recipe]:
    """With every method and aligner that needs no data, by name."""
    found = {name: Recipe(name) for name, method in METHODS.items() if not method.looks}
    for name, aligner in ALIGNERS.items():
        if not aligner.looks:
            found |= {name: Recipe(align=name), f"{name} zip": Recipe(align=name, parameters={"units": "zip"})}
    return found


def digests(root: Path) -> dict[str, list[str]]:
    """The SHA-256 of everything that each recipe writes, two times."""
    found = {}
    for name, recipe in recipes().items():
        found[name] = []
        for _ in range(2):
            models = [root / model for model in "abc"[:recipe.merging.max_models or 3]]
            merge_folders(models, recipe=recipe).save(root / "merged", overwrite=True)
            digest = hashlib.sha256()
            for path, content in sorted(files(root / "merged").items()):
                digest.update(path.encode() + content)
            found[name].append(digest.hexdigest())
    return found


if __name__ == "__main__":
    what, folder, *numbers = sys.argv[1:]
    result = {"kills": kills, "competition": competition, "digests": digests}[what](Path(folder), *map(int, numbers))
    print(json.dumps(result))
