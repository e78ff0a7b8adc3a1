"""Merges that are killed, that compete for one folder, and that are repeated on other numbers of threads."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import fork_command
from disturbed import recipes
from factory import base_network, small_plans, write_model

SCRIPT = Path(__file__).with_name("disturbed.py")


def disturbed(what: str, folder: Path, *numbers: int, threads: int = 1) -> Any:
    done = subprocess.run([sys.executable, SCRIPT, what, folder, *map(str, numbers)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"})
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def write_models(folder: Path, features: list[int]) -> None:
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        n_stages=2, features_per_stage=features, kernel_sizes=[[3] * 3] * 2, strides=[[1] * 3, [2] * 3],
        n_conv_per_stage=[1, 2], n_conv_per_stage_decoder=[1])
    base = base_network(plans=plans)
    for seed, name in enumerate("abc"):
        write_model(folder / name, {"background": 0, name: 1}, plans=plans, base=base, seed=seed)


def test_a_killed_merge_is_absent_or_whole(tmp_path: Path) -> None:
    write_models(tmp_path, [4, 8])
    seen = disturbed("kills", tmp_path, 100)
    assert seen["absent"] + seen["average"] + seen["ties"] == 102
    assert seen["killed"] >= 50 and seen["loaded by nnU-Net"] >= 2  # else most came too late, or too early


def test_of_two_merges_at_once_one_wins_whole(tmp_path: Path) -> None:
    write_models(tmp_path, [4, 8])
    lost = disturbed("competition", tmp_path, 9)
    assert len(lost) >= 6
    for line in lost:
        assert line.startswith("nnunet_transplant_merge: error: ") and str(tmp_path / "out" / "merged") in line
        assert "exists already" in line or "was written by somebody else in the meantime" in line, line


@pytest.mark.slow
def test_of_two_commands_at_once_one_wins_whole(tmp_path: Path) -> None:
    """As above with the commands as they are installed, each in a process that a shell would start."""
    write_models(tmp_path, [4, 8])
    program = Path(sys.executable).with_name("nnunet_transplant_merge")
    running = [subprocess.Popen([program, "-m", tmp_path / "a", tmp_path / "b", "-method", method,
                                 "-o", tmp_path / "merged"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                text=True) for method in ("average", "ties")]
    said = [process.communicate()[1].splitlines() for process in running]
    assert sorted(process.returncode for process in running) == [0, 1], said
    winner = [process.returncode for process in running].index(0)
    assert len(said[1 - winner]) == 1 and "error: " in said[1 - winner][0], said
    provenance = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert provenance["folds"]["all"]["recipe"]["method"] == ("average", "ties")[winner]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "merged"]
    fork_command("nnunet_transplant_merge", "-m", tmp_path / "merged", "-o", tmp_path / "again")


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each recipe wrote: two merges on one thread and two on two."""
    folder = tmp_path_factory.mktemp("digests")
    write_models(folder, [16, 80])  # the largest tensor has 172,800 entries: torch and the package share it out
    on_one, on_two = (disturbed("digests", folder, threads=threads) for threads in (1, 2))
    return {name: {*on_one[name], *on_two[name]} for name in on_one}


@pytest.mark.parametrize("recipe", recipes())
def test_the_same_merge_gives_the_same_bytes_on_any_number_of_threads(recipe: str,
                                                                      digests: dict[str, set[str]]) -> None:
    assert len(digests[recipe]) == 1
