"""Opens damaged and hostile model folders by the thousand, and says what came of it.

    python tests/fuzz.py [--files 20000] [--seed 0] [--reader plans.json] [--json]

Every file that a model folder is read from is mutated (tests/mutation.py), opened, and some of them merged with a sound
model. What may come out is what a user can act on: the model, TransplantError, OSError. Failures are any other
exception, code that ran, files left elsewhere, a process that died, more than 10 seconds or 2 GB for one file. The exit
status is 1 if there was any; each names the reader and the seed that repeat it.

The files are opened in a process of its own whose address space is limited, so that a file that kills it, or asks for
all memory, counts as a failure and nothing more happens. Memory is counted above what the process has at its start.
"""
import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mutation import MUTATIONS, RAN_CODE, write_originals

from nnunet_transplant import checkpoint
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import Merger, merge_groups
from nnunet_transplant.methods import METHODS
from nnunet_transplant.model_folder import TrainedModel, open_models, open_theta_0
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import read_merge
from nnunet_transplant.task_vector import read_theta_0

SECONDS, GIGABYTES = 10, 2
SHARES = {"checkpoint_final.pth": 0.35, "theta_0.safetensors": 0.15, "task_vector.safetensors": 0.15,
          "plans.json": 0.15, "dataset.json": 0.1, "merge.json": 0.1}


OURS = {"models", "merged", f"{RAN_CODE}_at_import.py", "__pycache__"}  # what may lie in the folder this runs in


class TooLong(BaseException):  # no Exception: nothing may catch it on its way
    """The time for one file is over."""


class Originals:
    """Sound model folders, one of whose files is replaced by a mutation at a time."""

    def __init__(self, root: Path) -> None:
        self.folders = write_originals(root)
        self.models = {name: open_models(folder)[0] for name, folder in self.folders.items()}

    def file(self, model: str, reader: str) -> Path:
        folder = self.folders[model]
        if reader == "theta_0.safetensors":
            return next(folder.glob("theta_0_*.safetensors"))
        return next(folder.rglob(reader))


def read_checkpoint(path: Path, *_: Any) -> None:
    for tensor in checkpoint.read(path)["network_weights"].values():
        tensor.sum(dtype=torch.float64)


def open_model(path: Path, *_: Any) -> None:
    open_models(path.parent)


def read_earlier(path: Path, *_: Any) -> None:
    for each in read_merge(path.parent).inputs:
        each.check()


def repeat_merge(path: Path) -> None:
    """The whole job that a merge.json records."""
    earlier = read_merge(path.parent)
    groups = []
    for each in earlier.inputs:
        each.check()
        groups.append([model for file in each.files for model in open_models(file)])
    if groups:  # else the command asks for some
        theta_0 = None if earlier.base is None else open_theta_0(earlier.base)
        merge_groups(groups, earlier.recipe, theta_0, earlier.base, earlier.per_fold)


def merge(path: Path, sound: TrainedModel, rng: random.Random) -> None:
    """The whole job on the model that the file belongs to."""
    if path.name == "merge.json":
        return repeat_merge(path)
    model = path if path.name.startswith("task_vector") else path.parents[1] if path.suffix == ".pth" else path.parent
    groups = [open_models(model), [sound]]
    rng.shuffle(groups)
    recipe = rng.choice([*(Recipe(method.name) for method in METHODS.values() if not method.looks),
                         *(Recipe(align="rebasin", parameters={"units": units}) for units in ("match", "zip"))])
    merged = Merger(groups, recipe).merge()
    if rng.random() < 0.1:
        write_merge({groups[0][0].fold: merged}, Path("merged"), overwrite=True)


# by file: what reads it, and how many of the mutated ones go through a whole merge instead
READERS: dict[str, tuple[Callable[..., None], float]] = {
    "checkpoint_final.pth": (read_checkpoint, 0.3),
    "theta_0.safetensors": (lambda path, *_: read_theta_0(path), 0.2),
    "task_vector.safetensors": (lambda path, *_: open_models(path), 0.3),
    "plans.json": (open_model, 0.3),
    "dataset.json": (open_model, 0.6),
    "merge.json": (read_earlier, 0.3),
}


def open_one(originals: Originals, reader: str, seed: int) -> None:
    """Mutate a file and open it; the same for the same seed."""
    rng = random.Random(f"{reader} {seed}")
    kind = rng.choice(["plain", "regions"])
    path = originals.file(kind, reader)
    original = path.read_bytes()
    read, share = READERS[reader]
    mutated = MUTATIONS[reader](rng, original)
    try:
        path.unlink()  # maps of the last file stay what they are
        path.write_bytes(mutated)
        (merge if rng.random() < share else read)(path, originals.models[f"{kind}_2"], rng)
    finally:
        path.unlink()
        path.write_bytes(original)


def outcome(originals: Originals, reader: str, seed: int) -> tuple[str, str]:
    """What came of it in a word, and for failures the reason."""
    word, reason = "opened", ""
    try:
        with time_limit(SECONDS):
            open_one(originals, reader, seed)
    except (TransplantError, OSError) as error:
        word, reason = "refused" if isinstance(error, TransplantError) else "OSError", asked_too_much(error)
        if not reason and not 10 < len(str(error)) < 2000:
            reason = f"a message of {len(str(error))} characters"
    except TooLong:
        word, reason = "failed", f"more than {SECONDS} s\n{traceback.format_exc()}"
    except Exception:
        word, reason = "failed", traceback.format_exc()
    if Path(RAN_CODE).exists():
        Path(RAN_CODE).unlink()
        reason = "code ran"
    for left in {path.name for path in Path().iterdir()} - OURS:
        (shutil.rmtree if Path(left).is_dir() else os.remove)(left)
        reason = f"left {left} behind"
    return ("failed" if reason else word), reason


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True)  # for what does not return to Python
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()


def asked_too_much(error: BaseException | None) -> str:
    """An allocation that only the limit of this process has stopped is a failure, whatever it was turned into."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, MemoryError) or "bad_alloc" in text or "allocate memory" in text:
            return f"asked for more than {GIGABYTES} GB: {str(error)[:200]}"
        error = error.__cause__ or error.__context__
    return ""


def serve(originals: Originals, reader: str, seeds: range, pipe: int) -> None:
    """The child process: a line for every seed that it starts, and one for what came of it."""
    def stop(*_: Any) -> None:
        raise TooLong
    signal.signal(signal.SIGALRM, stop)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GIGABYTES * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with os.fdopen(pipe, "w") as out, open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence), \
            warnings.catch_warnings(action="ignore"):
        for seed in seeds:
            print(json.dumps([seed]), file=out, flush=True)
            start = time.monotonic()
            word, reason = outcome(originals, reader, seed)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(json.dumps([seed, word, reason[-3000:], time.monotonic() - start, peak]), file=out, flush=True)


def run(originals: Originals, reader: str, seeds: range) -> dict[str, Any]:
    """All seeds of a reader, in as many processes as it takes."""
    result: dict[str, Any] = {"outcomes": Counter(), "failures": [], "slowest": (0.0, -1), "peak": 0}
    todo = seeds
    while todo:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receive)
            status = 1
            try:
                serve(originals, reader, todo, send)
                status = 0
            finally:
                os._exit(status)
        os.close(send)
        current = todo.start
        with os.fdopen(receive) as lines:
            for line in map(json.loads, lines):
                current = line[0]
                if len(line) > 1:
                    seed, word, reason, seconds, peak = line
                    result["outcomes"][word] += 1
                    result["slowest"] = max(result["slowest"], (seconds, seed))
                    result["peak"] = max(result["peak"], peak)
                    if reason:
                        result["failures"].append((reader, seed, reason))
                    current += 1
        status = os.waitpid(child, 0)[1]
        if current < todo.stop:
            result["outcomes"]["failed"] += 1
            code = os.waitstatus_to_exitcode(status)
            result["failures"].append((reader, current, f"the process died with status {code}"))
            current += 1
        todo = range(current, todo.stop)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="mutated files in all")
    parser.add_argument("--seed", type=int, default=0, help="the first seed of each reader")
    parser.add_argument("--reader", choices=READERS, help="only this file of a model folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()

    torch.set_num_threads(1)
    shares = {args.reader: 1.0} if args.reader else SHARES
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        sys.path.insert(0, folder)
        Path(f"{RAN_CODE}_at_import.py").write_text(f"open({RAN_CODE!r}, 'w')\n")  # for plans that import it
        originals = Originals(Path("models"))
        result = {reader: run(originals, reader, range(args.seed, args.seed + round(args.files * share)))
                  for reader, share in shares.items()}
        os.chdir("/")
    failures = [failure for one in result.values() for failure in one["failures"]]
    if args.json:
        print(json.dumps({"readers": result, "seconds": time.monotonic() - start}))
    else:
        print("| file | opened | refused | OSError | failed | slowest, s (seed) | peak memory, MB |")
        print("|---|---|---|---|---|---|---|")
        for reader, one in result.items():
            words = " | ".join(str(one["outcomes"][word]) for word in ("opened", "refused", "OSError", "failed"))
            print(f"| {reader} | {words} | {one['slowest'][0]:.1f} ({one['slowest'][1]}) | {one['peak'] / 1e6:.0f} |")
        print(f"\n{time.monotonic() - start:.0f} s")
        for reader, seed, reason in failures:
            print(f"\npython tests/fuzz.py --reader {reader} --seed {seed} --files 1\n{reason}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
