"""Whole sweeps with small networks: what is written, goes on, merges, and is refused."""
import importlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pytest
from factory import base_network, dataset_json, small_plans, write_model, write_volumes
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.analysis import sweep as sweeps
from nnunet_transplant.analysis.scoring import MergedNetwork
from nnunet_transplant.analysis.sweep import Plan, split_cases, sweep
from nnunet_transplant.checkpoint import read
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures import sweep as drawing
from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.steps import N_PATCHES
from nnunet_transplant.volumes import N_CASES, Volumes

DATASET = "Dataset700_Small"
LABELS = {"background": 0, "one": 1, "two": 2, "three": 3}
GRID_OF_3 = Plan(grid=3)
FILES = ["recipe.json", "study.log", "sweep.csv", "sweep.json", "sweep.png", "table.txt"]
ARITHMETIC = Recipe("task_arithmetic")
FITTED = Recipe("task_arithmetic", fit=["head"])


@pytest.fixture
def dataset(tmp_path: Path, nnunet_folders: None) -> Path:
    folder = write_volumes(tmp_path / "raw", DATASET, LABELS, cases=6, shape=(16, 16, 16))
    write_splits([{"train": ["case_5"], "val": ["case_0", "case_1", "case_2", "case_3"]},
                  {"train": ["case_0"], "val": ["case_5"]}], tmp_path)
    return folder


@pytest.fixture
def figures() -> None:
    """For tests that look at them: to draw takes longer than everything else."""


@pytest.fixture(autouse=True)
def no_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "figures" not in request.fixturenames:
        for name in ("save_maps_figure", "save_slices_figure", "save_front_figure"):
            monkeypatch.setattr(sweeps, name, lambda *arguments: None)


def write_splits(splits: list, root: Path) -> None:
    path = root / "preprocessed" / DATASET / "splits_final.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(splits))


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    plans = small_plans()
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    return [write_model(tmp_path / name, {"background": 0, **labels}, seed=seed, base=base_network(), plans=plans)
            for name, labels, seed in (("A", {"one": 1}, 1), ("B", {"two": 1, "three": 2}, 2))]


def run(models: list[Path], output: Path, plan: Plan = GRID_OF_3, **options: object) -> dict:
    return sweep(models, DATASET, output=output, plan=plan, **{"device": "cpu", "step_size": 1.0, **options})


def never(*_: object) -> None:
    pytest.fail("this was evaluated already")


def test_a_grid_sweep(dataset: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                      figures: None) -> None:
    """Everything that is written says the same; the same call evaluates nothing again."""
    drawn = []

    def save(figure: Figure, file: BinaryIO) -> None:
        figure.savefig(file)
        drawn.append(figure)

    monkeypatch.setattr(drawing, "save_figure", save)
    found = run(models, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == found
    frame = pd.read_csv(tmp_path / "out" / "sweep.csv")
    # the grid of 0, 1, 2 and the default
    assert set(zip(frame["w_1"], frame["w_2"], strict=True)) == \
        {(0.5, 0.5), *itertools.product((0.0, 1.0, 2.0), repeat=2)} and len(frame) == found["evaluations"] == 10
    dice = frame[["dice_one", "dice_two", "dice_three"]]
    np.testing.assert_allclose(dice.mean(axis=1), frame["dice_mean"])
    best = frame.loc[frame["dice_mean"].idxmax()]
    assert found["best"]["weights"] == [best["w_1"], best["w_2"]]
    assert found["best"]["dice"]["tuning"] == pytest.approx(
        {name: best[f"dice_{name}"] for name in ("one", "two", "three", "mean")})
    assert best["dice_mean"] > 0 and frame["dice_mean"].nunique() > 5  # it makes a difference
    assert found["default"]["weights"] == [0.5, 0.5]
    assert found["best"]["dice"]["tuning"]["mean"] >= found["default"]["dice"]["tuning"]["mean"]
    tuning, reporting = found["cases"]["tuning"], found["cases"]["reporting"]
    assert sorted(tuning + reporting) == ["case_0", "case_1", "case_2", "case_3"] and len(tuning) == 2
    text = (tmp_path / "out" / "table.txt").read_text()
    for part in ("tuning", "reporting"):
        for which in ("default", "best"):
            assert f"{part} {which}" in text and f"{found[which]['dice'][part]['one']:.4f}" in text
    assert "w_1 (one)" in text and "w_2 (two, three)" in text
    titles = [axes.get_title() for axes in drawn[-1].axes]
    assert [title.split("\n")[0] for title in titles[:4]] == ["one", "two", "three", "mean"]
    assert f"{found['best']['dice']['tuning']['three']:.3f}" in titles[2]

    results = [path for path in (tmp_path / "out").iterdir() if path.name != "study.log"]
    written = [path.read_bytes() for path in results]
    monkeypatch.setattr(sweeps._Job, "evaluate", never)
    again = run(models, tmp_path / "out")
    assert again == found
    assert [path.read_bytes() for path in results] == written


@pytest.mark.parametrize("fit", [False, True])
def test_scores_are_those_of_the_merge(dataset: Path, models: list[Path], tmp_path: Path, fit: bool) -> None:
    """The reporting cases of the best, from the recipe file through the merge command and a network of its own."""
    found = run(models, tmp_path / "out", Plan(trials=4, sampler="tpe"), recipe=FITTED if fit else ARITHMETIC)
    assert found["recipe"]["fit"] == (["head"] if fit else [])
    table = (tmp_path / "out" / "table.txt").read_text()
    assert ("Sweep of task_arithmetic + head on " if fit else "Sweep of task_arithmetic on ") in table
    run_merge("-recipe", tmp_path / "out" / "recipe.json", "-o", tmp_path / "merged", "-device", "cpu")
    weights = read(tmp_path / "merged" / "fold_all" / "checkpoint_final.pth")["network_weights"]
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())["folds"]["all"]
    assert (record["recipe"]["method"], record["recipe"]["weights"]) == ("task_arithmetic", found["best"]["weights"])
    assert [each["path"] for each in record["inputs"]] == [
        str(model / "fold_0" / "checkpoint_final.pth") for model in models]
    assert record["volumes"] == ({DATASET: ["case_5"]} if fit else {})  # of those that the fold trains on
    groups = [sweeps.open_models(path) for path in models]
    network = MergedNetwork(Merger(groups, ARITHMETIC), sweeps.torch_device("cpu"), 1.0)
    network.predictor.network.load_state_dict(weights)
    cases = sweeps.evaluation_cases(DATASET, 0)
    labelled = sweeps.open_labelled_cases(cases, groups[0][0])
    (targets,), _ = sweeps.name_targets(["merged"], [[network.merged]], cases)
    for part in ("tuning", "reporting"):
        chosen = [case for case in labelled if case.name in found["cases"][part]]
        dice = network.dice(chosen, targets)
        for name, values in dice.items():
            # fitted by an optimiser, that ends where it ends
            assert found["best"]["dice"][part][name] == pytest.approx(np.mean(values), abs=0.01 if fit else 1e-6)


def test_an_interrupted_sweep_goes_on(dataset: Path, models: list[Path], tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what it would have given in one go."""
    plan = Plan(grid=2)
    whole = run(models, tmp_path / "whole", plan)
    evaluate, calls = sweeps._Job.evaluate, itertools.count()

    def interrupted(self: object, *args: object) -> dict:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self, *args)
    monkeypatch.setattr(sweeps._Job, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path / "out", plan)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.log"]
    found = run(models, tmp_path / "out", plan)
    assert next(calls) == 2 + 1 + 3  # the one that was interrupted, and what was left
    assert found["evaluations"] == 5
    for which in ("default", "best"):
        assert {**found[which], "trial": 0} == {**whole[which], "trial": 0}


def test_overwrite_starts_anew(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    run(models, tmp_path / "out", Plan(trials=2, objective="structures"))
    assert (tmp_path / "out" / "pareto.csv").exists()
    with pytest.raises(TransplantError, match="was started with other objective: its results"):
        run(models, tmp_path / "out", Plan(trials=2))
    found = run(models, tmp_path / "out", Plan(trials=1), overwrite=True)
    assert found["evaluations"] == 1 and found["best"] == found["default"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert run(models, tmp_path / "out", Plan(trials=3))["evaluations"] == 3  # more of the same


@pytest.mark.parametrize(("change", "message"), [
    (lambda labels: {"plan": Plan(grid=3, weight_range=(0, 1))}, "other ranges"),
    (lambda labels: {"plan": Plan(grid=3, seed=1)}, "other cases"),
    (lambda labels: {"n_cases": 2}, "other cases"),
    (lambda labels: {"mirroring": True}, "other prediction options"),
    (lambda labels: {"plan": Plan(trials=3), "recipe": Recipe("breadcrumbs")}, "other steps or parameters"),
    (lambda labels: {"recipe": FITTED}, "other steps or parameters, volumes"),
    (lambda labels: {"fold": "all"}, "other cases"),
    (lambda labels: [shutil.copy(labels / "case_5.nii.gz", labels / f"case_{i}.nii.gz") for i in (0, 1, 2, 3)] and {},
     "other cases"),
])
def test_a_study_of_something_else_is_refused(dataset: Path, models: list[Path], tmp_path: Path, change: Callable,
                                              message: str) -> None:
    run(models, tmp_path / "out", Plan(trials=1))
    with pytest.raises(TransplantError, match=f"was started with {message}: its results cannot be compared"):
        run(models, tmp_path / "out", **change(dataset / "labelsTr"))


def test_workers_with_a_storage_of_their_own(dataset: Path, models: list[Path], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls with one journal: the second has nothing to do, and writes the same results."""
    plan = Plan(trials=3, storage=str(tmp_path / "shared" / "journal.log"), study="both")
    first = run(models, tmp_path / "one", plan)
    monkeypatch.setattr(sweeps._Job, "evaluate", never)
    assert run(models, tmp_path / "two", plan) == first
    assert not (tmp_path / "one" / "study.log").exists()
    assert (tmp_path / "one" / "sweep.csv").read_bytes() == (tmp_path / "two" / "sweep.csv").read_bytes()
    with pytest.raises(TransplantError, match="--overwrite would take a shared study"):
        run(models, tmp_path / "one", plan, overwrite=True)


def test_parameters_are_searched_and_written(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    """Three models, one of them of two folds, and numbers of the method; merged from the file they are the same."""
    models.append(write_model(tmp_path / "C", {"background": 0, "one": 1}, seed=3, base=base_network()))
    write_model(tmp_path / "C", {"background": 0, "one": 1}, seed=4, fold="1", base=base_network())
    plan = Plan(trials=3, searched={"density": (0.1, 0.9), "lambda": (0.5, 1.5)})
    found = run(models, tmp_path / "out", plan, recipe=Recipe("ties", None, {"trim": "tensor", "density": 0.5}))
    assert found["default"]["parameters"] == {"density": 0.5, "lambda": 1.0}
    assert found["recipe"]["parameters"] == {"ties.density": 0.5, "ties.lambda": 1.0, "ties.trim": "tensor"}
    frame = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert {"w_1", "w_2", "w_3", "density", "lambda"} <= set(frame.columns)
    np.testing.assert_allclose(frame[["w_1", "w_2", "w_3"]].sum(axis=1), 1)
    content = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert content["parameters"] == found["best"]["parameters"] | {"trim": "tensor"}
    assert content["weights"] == found["best"]["weights"] and content["models"] == list(map(str, models))
    run_merge("-recipe", tmp_path / "out" / "recipe.json", "-o", tmp_path / "merged")
    merged = read(tmp_path / "merged" / "fold_all" / "checkpoint_final.pth")["network_weights"]
    expected = merge_folders(models, recipe=Recipe("ties", content["weights"], content["parameters"]))["all"].state_dict
    for name, tensor in expected.items():
        assert merged[name].equal(tensor)


def test_a_method_that_looks_at_volumes_sees_other_cases(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    """Those that the fold trains on."""
    fisher = Recipe("fisher")
    found = run(models, tmp_path / "out", Plan(trials=1), recipe=fisher)
    assert found["best"]["weights"] == [0.5, 0.5] and found["recipe"]["parameters"]["fisher.seed"] == 0
    assert found["recipe"]["volumes"] == {"datasets": [DATASET], "cases": "train:0", "n_cases": N_CASES,
                                            "n_patches": N_PATCHES}
    assert sweeps._volumes(DATASET, "0", None).cases == "train:0"
    for change in ({"fold": "all"}, {"cases": "val:0"}):
        with pytest.raises(TransplantError, match="not those it is scored on: give -f the number of a fold"):
            run(models, tmp_path / "all", Plan(trials=1), recipe=fisher, **change)
    told = Recipe("fisher", volumes=Volumes([DATASET], cases="train:0"))
    of_all = run(models, tmp_path / "told", Plan(trials=1, seed=7), recipe=told, fold="all")
    assert of_all["recipe"]["volumes"]["cases"] == "train:0"
    assert of_all["recipe"]["parameters"]["fisher.seed"] == 7  # of the steps' random choices, too


def test_fitted_heads_are_another_study_and_need_other_cases(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    run(models, tmp_path / "out", Plan(trials=1))
    with pytest.raises(TransplantError, match="started with other steps or parameters, volumes: its"):
        run(models, tmp_path / "out", Plan(trials=1), recipe=FITTED)
    with pytest.raises(TransplantError, match="nobody says which are not those it is scored on"):
        run(models, tmp_path / "all", Plan(trials=1), recipe=FITTED, fold="all")


def test_the_cases_may_be_chosen(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cases.txt").write_text("case_4\ncase_0\ncase_2\ncase_1\n")
    found = run(models, tmp_path / "out", Plan(trials=1), cases=str(tmp_path / "cases.txt"), n_cases=2)
    assert sorted(found["cases"]["tuning"] + found["cases"]["reporting"]) == ["case_0", "case_2"]


def test_models_without_a_common_base_are_aligned_once(dataset: Path, models: list[Path], tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their weights are; the recipe file merges them as the best was merged."""
    rebasin, calls = ALIGNERS["rebasin"], itertools.count()
    monkeypatch.setitem(ALIGNERS._steps, "rebasin", replace(
        rebasin, function=lambda **inputs: next(calls) < 0 or rebasin.function(**inputs)))
    found = run(models, tmp_path / "out", Plan(trials=3), recipe=Recipe(align="rebasin"))
    assert found["evaluations"] == 3 and next(calls) == 1
    assert "Sweep of rebasin + average on" in (tmp_path / "out" / "table.txt").read_text()
    run_merge("-recipe", tmp_path / "out" / "recipe.json", "-o", tmp_path / "merged")
    merged = read(tmp_path / "merged" / "fold_all" / "checkpoint_final.pth")["network_weights"]
    best = Recipe(align="rebasin", weights=found["best"]["weights"])
    for name, tensor in merge_folders(models, recipe=best)["all"].state_dict.items():
        assert merged[name].equal(tensor)


@pytest.mark.parametrize("count", [2, 3])
def test_a_front_of_structures(dataset: Path, models: list[Path], tmp_path: Path, count: int, figures: None) -> None:
    """No row of it is worse than another in every structure, and every other is."""
    if count == 2:
        content = dataset_json({"background": 0, "one": 1, "two": 2})
        (dataset / "dataset.json").write_text(json.dumps(content | {"numTraining": 6}))
    found = run(models, tmp_path / "out", Plan(trials=12, objective="structures"), n_cases=2)
    names = ["dice_one", "dice_two", "dice_three"][:count]
    frame, front = (pd.read_csv(tmp_path / "out" / name) for name in ("sweep.csv", "pareto.csv"))
    values = frame[names].to_numpy()
    expected = [not any((other >= row).all() and (other > row).any() for other in values) for row in values]
    assert front["trial"].tolist() == frame["trial"][expected].tolist()
    assert found["best"]["trial"] in front["trial"].tolist()
    assert imread(tmp_path / "out" / "pareto.png").size > 1000
    assert bool(found["notes"]) == (count == 2)  # three is no structure of the dataset then


def test_tuning_on_all_cases_reports_nothing(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    found = run(models, tmp_path / "out", Plan(trials=1, tune=1))
    assert found["cases"]["reporting"] == [] and list(found["best"]["dice"]) == ["tuning"]
    assert "nothing is reported" in (tmp_path / "out" / "table.txt").read_text()


def test_merges_that_overflow_count_as_zero(dataset: Path, models: list[Path], tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    set_weights = MergedNetwork.set

    def overflow(self: MergedNetwork, weights: list[float], parameters: dict) -> None:
        set_weights(self, weights, parameters)
        if weights[0] == 2:
            for name in self.merger.models[0].layout.heads:
                self.tensors[name].fill_(1e6)
    monkeypatch.setattr(MergedNetwork, "set", overflow)
    found = run(models, tmp_path / "out")
    frame = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert (frame.loc[frame["w_1"] == 2, "dice_mean"] == 0).all() and found["best"]["weights"][0] != 2
    assert frame.loc[frame["w_1"] == 2, "failure"].str.contains("half precision").all()
    assert frame.loc[frame["w_1"] != 2, "failure"].isna().all()
    assert "note: 3 of 10 merges have no usable logits" in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.parametrize("tune", [0.01, 0.25, 0.5, 0.99, 1])
def test_cases_are_split_without_overlap(tune: float) -> None:
    for count, seed in itertools.product((2, 3, 40), (0, 1)):
        tuning, reporting = split_cases(count, tune, seed)
        assert sorted(tuning + reporting) == list(range(count))
        assert (tuning, reporting) == split_cases(count, tune, seed)
        assert len(tuning) == (count if tune == 1 else pytest.approx(min(max(tune * count, 1), count - 1), abs=0.5))
    assert split_cases(40, 0.5, 0) != split_cases(40, 0.5, 1)


# The commands

def run_cli(name: str, *arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"nnunet_transplant_{name}", *map(str, arguments)])
        importlib.import_module(f"nnunet_transplant.cli.{name}").main()


def run_merge(*arguments: object) -> None:
    run_cli("merge", *arguments)


def test_the_command(dataset: Path, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture,
                     figures: None) -> None:
    run_cli("sweep", "-m", *models, "-d", 700, "-f", "all", "-o", tmp_path / "out", "-device", "cpu", "-trials", 2,
            "-method", "dare", "-density", 0.5, "-search", "density=0.2:0.8", "lambda=0.5:2", "-range", 0, 1,
            "-seed", 3, "-tune", 0.7, "-step_size", 1)
    out = capsys.readouterr().out
    assert (tmp_path / "out" / "table.txt").read_text() in out
    assert f"nnunet_transplant_merge -recipe {tmp_path / 'out' / 'recipe.json'} -o MERGED" in out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["default"]["parameters"] == {"density": 0.5, "lambda": 1.0}
    assert found["recipe"]["parameters"] == {
        "dare.density": 0.5, "dare.lambda": 1.0, "dare.combine": "linear", "dare.seed": 3}
    assert imread(tmp_path / "out" / "sweep.png").size > 1000
    assert len(found["cases"]["tuning"]) == 4 and len(found["cases"]["reporting"]) == 2
    assert found["ranges"] == {"w_1": [0, 1], "w_2": [0, 1], "density": [0.2, 0.8], "lambda": [0.5, 2]}


BAD = {
    "one model": (["-m", "A"], "at least two models, not 1"),
    "three models": (["-m", "A", "B", "A"], "-grid is for two models: for 3 give -trials"),
    "grid of parameters": (["-search", "density=0:1", "-method", "ties"], "-grid is for weights alone"),
    "both": (["-grid", "3", "-trials", "3"], "either -grid or -trials"),
    "grid of one": (["-grid", "1"], "-grid must be at least 2"),
    "trials": (["-trials", "0"], "-trials must be at least 1, not 0"),
    "grid of shares": (["-method", "average"], "use -method task_arithmetic, or -trials"),
    "unknown method": (["-method", "magic"], "no merging method 'magic'"),
    "unknown parameter": (["-trials", "3", "-search", "magic=0:1"], "-search magic: this merge has no such number"),
    "parameter of another method": (["-density", "0.5"], "has no -density"),
    "range": (["-range", "2", "0"], "-range must be two numbers, the lower one first, not 2 0"),
    "sampler": (["-trials", "3", "-sampler", "magic"], "-sampler must be one of tpe, gp, cmaes, not magic"),
    "objective": (["-objective", "magic"], "-objective must be one of mean, structures, not magic"),
    "cmaes of structures": (["-trials", "3", "-sampler", "cmaes", "-objective", "structures"], "knows one objective"),
    "cmaes in a line": (["-trials", "3", "-sampler", "cmaes", "-align", "rebasin", "-units", "zip", "-method",
                         "average", "-search", "decay=0:1"], "at least two numbers"),
    "grid of a zip": (["-align", "rebasin", "-units", "zip", "-method", "average", "-grid", "3"],
                      "a zip takes no weights"),
    "tune": (["-tune", "0"], "-tune must be above 0 and at most 1, not 0"),
    "tune too much": (["-tune", "1.5"], "-tune must be above 0 and at most 1, not 1.5"),
    "step": (["-step_size", "0"], "-step_size must be above 0"),
    "seed": (["-seed", "-1"], "-seed must lie between"),
    "n_cases": (["-n_cases", "0"], "-n_cases must be at least 1"),
    "device": (["-device", "tpu"], "-device must be"),
    "dataset": (["-d", "77"], "Could not find a dataset with the ID 77"),
    "fold": (["-f", "9"], "has no fold 9"),
    "one case": (["-f", "1"], "has only one here (-tune 1 reports nothing)"),
    "no model": (["-m", "A", "nowhere"], "there is no model folder"),
    "storage": (["-storage", "sqlite:////nowhere/x.db"], "cannot open the study sweep"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(dataset: Path, models: list[Path], tmp_path: Path, name: str,
                               capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        run_cli("sweep", "-m", "A", "B", "-d", 700, "-o", "out", "-device", "cpu", *arguments)
    err = capsys.readouterr().err
    assert leave.value.code == 1
    assert err.startswith("nnunet_transplant_sweep: error: ") and message in err and err.count("\n") == 1
    assert not any(path.name in FILES for path in tmp_path.glob("out/*"))


def test_datasets_that_cannot_be_scored(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    (dataset / "labelsTr" / "case_1.nii.gz").unlink()
    with pytest.raises(TransplantError, match="case case_1 of Dataset700_Small: there is no file"):
        run(models, tmp_path / "out")
    content = dataset_json({"background": 0, "one": 1, "seven": 7}) | {"numTraining": 6}
    (dataset / "dataset.json").write_text(json.dumps(content))
    write_splits([{"train": [], "val": ["case_0", "case_2"]}], tmp_path)
    found = run([models[0], rename(models[1], {"two": "seven"})], tmp_path / "out", Plan(trials=1))
    assert found["notes"] == ["note: three of the merged model not scored: Dataset700_Small has no such label",
                              "note: no case to tune on has seven: not scored"]
    content["labels"] = {"background": 0, "seven": 7}
    (dataset / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(TransplantError, match="no case to tune on has seven: take more cases"):
        run(models, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def rename(model: Path, names: dict[str, str]) -> Path:
    path = model / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"] = {names.get(name, name): value for name, value in content["labels"].items()}
    path.write_text(json.dumps(content))
    return model


def test_only_a_sweep_goes_on(dataset: Path, models: list[Path], tmp_path: Path) -> None:
    """Nothing else is replaced or added to."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep")
    for overwrite, message in ((False, "exists already"), (True, "not an earlier sweep")):
        with pytest.raises(TransplantError, match=message):
            run(models, tmp_path / "out", overwrite=overwrite)
    with pytest.raises(TransplantError, match="is one of the models, or holds one"):
        run(models, models[0], overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


# -recipe FILE

def write_recipe(path: Path, belonging: list[Path], **change: object) -> Path:
    content = {"method": "ties", "parameters": {"density": 0.4, "lambda": 1.0, "trim": "vector"}, "weights": [1.0, 3.0],
               "models": [str(model.resolve()) for model in belonging]}
    path.write_text(json.dumps(content | change))
    return path


def recorded(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text())["folds"]["all"]["recipe"]


def test_merge_takes_a_recipe_file(models: list[Path], tmp_path: Path) -> None:
    """With the parameters that are given in place of the file's; on another machine the models lie elsewhere."""
    file = write_recipe(tmp_path / "recipe.json", models)
    run_merge("-m", *models, "-recipe", file, "-o", tmp_path / "merged", "-lambda", "0.5", "-method", "ties")
    record = recorded(tmp_path / "merged")
    assert (record["method"], record["weights"]) == ("ties", [1, 3])
    assert record["parameters"] == {"ties.density": 0.4, "ties.lambda": 0.5, "ties.trim": "vector"}
    run_merge("-recipe", file, "-o", tmp_path / "its own", "-lambda", "0.5")
    assert (tmp_path / "its own" / "merge.json").read_bytes() == (tmp_path / "merged" / "merge.json").read_bytes()
    write_recipe(file, [Path("/elsewhere/A"), Path("/elsewhere/B")])
    run_merge("-m", *models, "-recipe", file, "-o", tmp_path / "other")
    assert (tmp_path / "other" / "merge.json").exists()


def test_the_weights_of_a_recipe_file_are_those_of_its_method_and_models(models: list[Path], tmp_path: Path) -> None:
    file = write_recipe(tmp_path / "recipe.json", models)
    run_merge("-recipe", file, "-o", tmp_path / "dare", "-method", "dare")
    record = recorded(tmp_path / "dare")
    assert (record["method"], record["weights"]) == ("dare", None)
    assert record["parameters"] == {"dare.density": 0.4, "dare.lambda": 1.0, "dare.combine": "linear", "dare.seed": 0}
    run_merge("-recipe", file, "-o", tmp_path / "swapped", "-m", *models[::-1], "-weights", 2, 1)
    assert recorded(tmp_path / "swapped")["weights"] == [2, 1]


BAD_RECIPES = {
    "too few models": ({}, ["-m", "A"], "has the weights of 2 models, not 1"),
    "another order": ({}, ["-m", "B", "A"], "has the weights of the models in another order"),
    "too few weights": ({"weights": [1.0]}, ["-m", "A", "B"], "-weights has 1 numbers for 2 models"),
    "unknown method": ({"method": "magic"}, ["-m", "A", "B"], "no merging method 'magic'"),
    "unknown parameter": ({"parameters": {"base": "/x"}}, ["-m", "A", "B"], "ties has no -base"),
    "no numbers": ({"weights": ["one", 2]}, ["-m", "A", "B"], "recipe.json is no recipe: 'weights' cannot be"),
    "no models": ({"models": None}, ["-m", "A", "B"], "recipe.json is no recipe: 'models' is no list of paths"),
    "no base": ({"base": 3}, ["-m", "A", "B"], "recipe.json is no recipe: 'base' is no path"),
    "misspelt": ({"wieghts": [1, 2]}, ["-m", "A", "B"], "nobody knows 'wieghts' (did you mean weights?)"),
    "another format": ({"format": 2}, ["-m", "A", "B"], "it has format 2, this version reads format 1"),
    "an earlier merge too": ({}, ["-from", "A"], "give either -from or -recipe"),
    "no file": ({}, ["-m", "A", "B", "-recipe", "nowhere.json"], "there is no file nowhere.json"),
    "no json": ({}, ["-m", "A", "B", "-recipe", "A/fold_0/checkpoint_final.pth"], "is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_merge_refuses_a_recipe_file_in_one_line(models: list[Path], tmp_path: Path, name: str,
                                                 capsys: pytest.CaptureFixture,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    change, arguments, message = BAD_RECIPES[name]
    write_recipe(tmp_path / "recipe.json", models, **change)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        run_merge("-recipe", "recipe.json", "-o", "merged", *arguments)
    err = capsys.readouterr().err
    assert leave.value.code == 1 and message in err and err.count("\n") == 1
    assert not (tmp_path / "merged").exists()
