"""Searches of cheap functions whose optimum is known: nothing is lost, repeated or shared wrongly."""
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import optuna
import pytest

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.analysis.search import Space, finished, grid_points, open_space, open_study, search, trial_dice
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.methods import METHODS
from nnunet_transplant.recipe import Recipe

STRUCTURES = ["a", "b"]


def space_of(method: str = "task_arithmetic", models: int = 2, weight_range: tuple | None = None,
             searched: Mapping | None = None, align: str | None = None, **given: object) -> Space:
    return open_space(Recipe(method, parameters=given, align=align), models, weight_range, searched)


def bowl(weights: list[float], parameters: dict) -> dict[str, float]:
    """Best at (1.4, 0.3), and for each structure alone somewhere else."""
    a = 1 - (weights[0] - 1.5) ** 2 - (weights[1] - 0.3) ** 2
    b = 1 - (weights[0] - 1.3) ** 2 - (weights[1] - 0.3) ** 2
    return {"a": a, "b": b}


class Interrupted:
    """The function, until it is interrupted in the middle of an evaluation."""

    def __init__(self, after: int, function: Callable = bowl) -> None:
        self.left, self.function = after, function

    def __call__(self, weights: list[float], parameters: dict) -> dict[str, float]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.function(weights, parameters)


def points_of(study: optuna.Study) -> list[tuple]:
    return [tuple(round(value, 9) for value in trial.params.values()) for trial in finished(study)]


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    return open_study(str(tmp_path / "study.log"), "sweep", 1, {})


# The grid

@pytest.mark.parametrize("steps", [5, 4])  # the default 0.5, 0.5 is on the grid, and beside it
def test_grid_covers_every_point_once(study: optuna.Study, steps: int) -> None:
    space = space_of()
    search(study, space, bowl, STRUCTURES, grid_points(space, steps))
    found = points_of(study)
    values = [round(2 * i / (steps - 1), 9) for i in range(steps)]
    assert found[0] == (0.5, 0.5)
    assert sorted(found) == sorted({(0.5, 0.5)} | set(itertools.product(values, values)))
    search(study, space, lambda *_: pytest.fail("nothing is left"), STRUCTURES, grid_points(space, steps))


def test_an_interrupted_grid_goes_on(study: optuna.Study, tmp_path: Path) -> None:
    """In a new process; a point that a killed worker was at comes again."""
    space = space_of(weight_range=(0, 1))
    with pytest.raises(KeyboardInterrupt):
        search(study, space, Interrupted(4), STRUCTURES, grid_points(space, 3))
    study.enqueue_trial({"w_1": 1.0, "w_2": 1.0})
    study.ask(dict(space.ranges))  # killed: nobody tells
    assert len(finished(study)) == 4
    again = open_study(str(tmp_path / "study.log"), "sweep", 1, {})
    search(again, space, Interrupted(5), STRUCTURES, grid_points(space, 3))
    assert len(points_of(again)) == len(set(points_of(again))) == 9


def test_a_grid_has_round_numbers() -> None:
    assert {point["w_1"] for point in grid_points(space_of(), 21)} == {round(0.1 * i, 1) for i in range(21)}
    assert len(grid_points(space_of(), 21)) == 441
    for high in (1 / 3 + 0.4, 2 / 3):  # rounded, and still inside
        assert high - 1e-8 < grid_points(space_of(weight_range=(0, high)), 2)[-1]["w_1"] <= high


# Samplers

@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 60), ("cmaes", 60), ("gp", 15)])
def test_a_sampler_finds_the_optimum(study: optuna.Study, sampler: str, trials: int) -> None:
    space = space_of()
    search(study, space, bowl, STRUCTURES, trials=trials, sampler=sampler)
    done = finished(study)
    best = max(done, key=trial_dice)
    assert len(done) == trials
    assert done[0].params == {"w_1": 0.5, "w_2": 0.5} == space.default
    assert trial_dice(best) == pytest.approx(1 - 0.01, abs=0.02)
    assert best.params == pytest.approx({"w_1": 1.4, "w_2": 0.3}, abs=0.2)


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_nothing_is_evaluated_again_where_a_corner_is_best(study: optuna.Study, sampler: str) -> None:
    search(study, space_of(), lambda weights, _: {"a": 1 - sum(weights)}, ["a"], trials=20, sampler=sampler)
    found = points_of(study)
    assert len(set(found)) == 20
    assert min(map(sum, found)) < 0.1


def test_a_search_in_two_goes_is_the_search_in_one(study: optuna.Study, tmp_path: Path) -> None:
    space = space_of(models=3)
    search(study, space, bowl, STRUCTURES, trials=16, seed=3)
    path = str(tmp_path / "other.log")
    for trials in (5, 13, 16):
        search(open_study(path, "sweep", 1, {}), space, bowl, STRUCTURES, trials=trials, seed=3)
    other = open_study(path, "sweep", 1, {})
    assert points_of(other) == points_of(study)
    another = open_study(str(tmp_path / "another.log"), "sweep", 1, {})
    search(another, space, bowl, STRUCTURES, trials=5, seed=4)
    assert points_of(another)[0] == points_of(study)[0]  # the default
    assert points_of(another)[1] != points_of(study)[1]


def test_an_interrupted_default_is_evaluated_before_all_others(study: optuna.Study) -> None:
    space = space_of()
    with pytest.raises(KeyboardInterrupt):
        search(study, space, Interrupted(0), STRUCTURES, trials=3)
    search(study, space, bowl, STRUCTURES, trials=3)
    assert points_of(study)[0] == (0.5, 0.5) and len(points_of(study)) == 3


def test_the_default_of_a_dead_worker_is_evaluated_in_the_end(study: optuna.Study) -> None:
    space = space_of()
    study.enqueue_trial(space.default)
    study.ask(dict(space.ranges))  # killed: nobody tells
    search(study, space, bowl, STRUCTURES, trials=3)
    assert (0.5, 0.5) in points_of(study)


def test_failures_count_as_zero_and_say_why(study: optuna.Study) -> None:
    def overflow(weights: list[float], parameters: dict) -> dict[str, float]:
        if weights[0] > 1:
            raise TransplantError("beyond half precision")
        return {"a": weights[0], "b": weights[0]}
    space = space_of()
    search(study, space, overflow, STRUCTURES, grid_points(space, 3))
    for trial in finished(study):
        failed = trial.params["w_1"] > 1
        assert trial.value == trial.user_attrs["dice"]["a"] == (0 if failed else trial.params["w_1"])
        assert trial.user_attrs.get("failure") == ("beyond half precision" if failed else None)


def test_each_structure_as_an_objective(tmp_path: Path) -> None:
    """The front of two bowls in one dimension lies between their centres."""
    study = open_study(str(tmp_path / "study.log"), "sweep", 2, {})
    space = space_of()
    search(study, space, bowl, STRUCTURES, trials=60)
    front = study.best_trials
    assert len(front) > 2
    for trial in front:
        assert not any(all(o >= t for o, t in zip(other.values, trial.values, strict=True)) and
                       other.values != trial.values for other in finished(study))
    near = [trial for trial in front if trial_dice(trial) > 0.95]
    assert near and all(1.1 < trial.params["w_1"] < 1.7 for trial in near)


# Several workers

@pytest.mark.parametrize("storage", ["study.log", "sqlite:///{}/study.db"])
@pytest.mark.parametrize("grid", [True, False])
def test_workers_share_one_study(tmp_path: Path, storage: str, grid: bool) -> None:
    """Each with a connection of its own; together they do what one would do, and hardly anything twice."""
    where = storage.format(tmp_path) if "://" in storage else str(tmp_path / storage)
    space, did = space_of(), [0, 0]
    open_study(where, "sweep", 1, {"cases": ["a"]})
    both = threading.Barrier(2)

    def work(worker: int) -> None:
        def evaluate(weights: list[float], parameters: dict) -> dict[str, float]:
            did[worker] += 1
            if did[worker] == 1:
                both.wait(20)  # the other has begun
            time.sleep(0.05)  # an evaluation takes longer than to say that one is at it
            return bowl(weights, parameters)
        mine = open_study(where, "sweep", 1, {"cases": ["a"]})
        search(mine, space, evaluate, STRUCTURES, grid_points(space, 4) if grid else None, 12)
    threads = [threading.Thread(target=work, args=(worker,)) for worker in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = points_of(open_study(where, "sweep", 1, {"cases": ["a"]}))
    total = 17 if grid else 12
    assert min(did) >= 1 and sum(did) == len(found)
    assert total <= len(found) <= total + 4  # what both chose at the same moment, or were at in the end
    assert len(set(found)) == total if grid else len(set(found)) >= total - 1


def test_workers_that_start_together_open_one_study(tmp_path: Path) -> None:
    """Of a new database; each would make its tables."""
    where, studies = f"sqlite:///{tmp_path}/study.db", []
    threads = [threading.Thread(target=lambda: studies.append(open_study(where, "sweep", 1, {"cases": ["a"]})))
               for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(studies) == 3 and len({study._study_id for study in studies}) == 1


def test_a_study_of_other_inputs_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "study.log")
    inputs = {"models": ["sha"], "cases": ["a", "b"], "ranges": {"w_1": [0, 2]}}
    open_study(path, "sweep", 1, inputs)
    open_study(path, "sweep", 1, dict(reversed(inputs.items())))
    with pytest.raises(TransplantError, match=r"was started with other cases, ranges: its .* Give another -study or"):
        open_study(path, "sweep", 1, inputs | {"cases": ["a"], "ranges": {}})
    open_study(path, "another", 1, inputs | {"cases": ["a"]})


@pytest.mark.parametrize("storage", ["sqlite:////nowhere/study.db", "nosuchdatabase://host/db", "{}/broken.log"])
def test_a_storage_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    (tmp_path / "broken.log").write_text("this is no journal\n" * 3)
    with pytest.raises(TransplantError, match="cannot open the study sweep in") as caught:
        open_study(storage.format(tmp_path), "sweep", 1, {})
    assert "\n" not in str(caught.value)


# Spaces

@pytest.mark.parametrize("method", METHODS)
def test_every_point_of_a_space_is_one_that_the_method_takes(method: str) -> None:
    """Weights and parameters at the ends and in the middle, for as many models as it merges."""
    models = min(3, METHODS[method].max_models or 3)
    space = space_with_everything(Recipe(method), models)
    for point in points_in(space):
        METHODS[method].weights(space.weights(point), models)
    plain = METHODS["average" if method == "task_arithmetic" else method]
    assert space.weights(space.default) == pytest.approx(plain.weights(None, models))


@pytest.mark.parametrize("align", ALIGNERS)
@pytest.mark.parametrize("units", ["match", "zip"])
def test_every_point_of_a_space_is_one_that_the_aligner_takes(align: str, units: str) -> None:
    """A zip has no weights to search."""
    space = space_with_everything(Recipe(align=align, parameters={"units": units}), 3)
    assert (space.weights(space.default) is None) == (units == "zip")
    for point in points_in(space):
        weights = space.weights(point)
        assert (weights is None) == (units == "zip")
        METHODS["average"].weights(weights, 3)


def space_with_everything(recipe: Recipe, models: int) -> Space:
    """The space of a recipe with every number of its steps; its points are what the recipe takes."""
    parameters = [p for step in recipe.steps for p in step.parameters if not p.choices and p.name != "seed"]
    space = open_space(recipe, models, searched={
        p.name: (p.range.low, min(p.range.high, max(10, p.default))) for p in parameters})
    assert space.parameters(space.default) == {p.name: p.default for p in parameters}
    for point in points_in(space):
        recipe.given(space.parameters(point)).settings()
    return space


def points_in(space: Space) -> list[dict]:
    return [{name: type(space.default[name])(each.low + share * (each.high - each.low))
             for name, each in space.ranges.items()} for share in (0.0, 0.3, 1.0)]


BAD = {
    "reversed": ({"weight_range": (2, 0)}, "-range must be two numbers, the lower one first, not 2 0"),
    "no number": ({"weight_range": (0, float("nan"))}, "-range must be two numbers"),
    "negative": ({"weight_range": (-1, 2)}, "-range must not be negative"),
    "without the default": ({"weight_range": (1, 2)}, "-range from 1 to 2 leaves out the default, 0.5"),
    "shares": ({"method": "karcher", "weight_range": (0, 2)}, "of method karcher sum to 1: leave out -range"),
    "no weights": ({"method": "average", "align": "rebasin", "units": "zip", "weight_range": (0, 2)},
                   "a zip takes no weights: leave out -range"),
    "nothing to search": ({"method": "average", "align": "rebasin", "units": "zip"},
                          "a zip takes no weights: give -search"),
    "unknown": ({"searched": {"density": (0, 1)}}, "-search density: this merge has no such number"),
    "misspelt": ({"method": "ties", "searched": {"densty": (0, 1)}},
                 "-search densty: this merge has no such number .did you mean density.. .it has: density, lambda."),
    "of another step": ({"method": "ties", "searched": {"dare.density": (0, 1)}}, "-search dare.density: this merge"),
    "no number to search": ({"method": "ties", "searched": {"trim": (0, 1)}}, "-search trim: this merge has no such"),
    "beyond": ({"method": "ties", "searched": {"density": (0.1, 2)}}, "-density must lie between"),
    "parameter reversed": ({"method": "ties", "searched": {"density": (0.8, 0.1)}}, "-search density must be two"),
    "parameter without the default": ({"method": "ties", "searched": {"density": (0.5, 0.8)}},
                                      "-search density from 0.5 to 0.8 leaves out the default, 0.2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_spaces_are_refused_in_one_line(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(TransplantError, match=message) as caught:
        space_of(**options)
    assert "\n" not in str(caught.value)


def test_a_parameter_that_is_given_is_where_its_search_starts() -> None:
    space = space_of("ties", searched={"density": (0.3, 0.8), "lambda": (0.5, 2)}, density=0.5)
    assert space.default == {"w_1": 0.5, "w_2": 0.5, "density": 0.5, "lambda": 1.0}
    assert space.parameters({"w_1": 1, "w_2": 3, "density": 0.4, "lambda": 2}) == {"density": 0.4, "lambda": 2}
    assert space.weights({"w_1": 1, "w_2": 3, "density": 0.4, "lambda": 2}) == [0.25, 0.75]


def test_the_option_of_one_step_alone() -> None:
    space = space_of("ties", searched={"ties.density": (0.3, 0.8)}, **{"ties.density": 0.5})
    assert space.default["ties.density"] == 0.5 and space.parameters(space.default) == {"ties.density": 0.5}
    recipe = Recipe("ties", parameters={"density": 0.4}).given(space.parameters(space.default))
    assert recipe.settings()["ties"]["density"] == 0.5
