"""Numbers searched with Optuna: a space, a study that several processes may share, and a grid or a sampler that says
what comes next."""
import hashlib
import itertools
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, TPESampler
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import scaled_to_one
from nnunet_transplant.methods.registry import CONVEX, RATIOS, SUM_TO_ONE
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.steps import did_you_mean

SAMPLERS = ("tpe", "gp", "cmaes")
ATTEMPTS = 4  # to open a storage
RANGE = (0.0, 2.0)  # of free weights: U-Net Transplant, Fig. 3

Point = Mapping[str, float]  # name -> value of everything that is searched
Evaluate = Callable[[list[float] | None, dict[str, Any]], dict[str, float]]  # weights, parameters -> Dice by structure


@dataclass(frozen=True)
class Space:
    """What is searched: w_1 to w_T, unless the merge takes no weights, and options of its steps."""
    ranges: dict[str, FloatDistribution | IntDistribution]
    default: dict[str, float]  # a point: where nothing is tuned
    models: int                # that have a weight each; 0 for merges that take none
    on_simplex: bool           # the weights of a point are scaled to sum to 1

    def weights(self, point: Point) -> list[float] | None:
        found = [float(point[f"w_{i}"]) for i in range(1, self.models + 1)]
        return (scaled_to_one(found) if self.on_simplex else found) if found else None

    def parameters(self, point: Point) -> dict[str, Any]:
        return {name: point[name] for name in list(self.ranges)[self.models:]}

    def described(self) -> dict[str, list[float]]:
        return {name: [each.low, each.high] for name, each in self.ranges.items()}


def open_space(recipe: Recipe, models: int, weight_range: Sequence[float] | None = None,
               searched: Mapping[str, Sequence[float]] | None = None) -> Space:
    """The space of the weights of a recipe's merge and of the options `searched` (name -> lowest, highest), which hold
    their default.

    weight_range: of free weights, default RANGE. Methods whose weights sum to 1, or of whose weights only the ratios
    count, have none: their weights lie on the simplex.
    Raises TransplantError for ranges that are none, that leave out the default, or go beyond what the step allows.
    """
    method, settings = recipe.merging, recipe.settings()
    takes_weights = recipe.aligner is None or not recipe.aligner.mean_only(settings[recipe.aligner.name])
    on_simplex = method.weights_rule in (SUM_TO_ONE, CONVEX, RATIOS)
    if weight_range is not None and (on_simplex or not takes_weights):
        raise TransplantError(f"the weights of method {method.name} sum to 1: leave out -range" if takes_weights
                              else "a zip takes no weights: leave out -range")
    low, high = (0.0, 1.0) if on_simplex else weight_range or RANGE
    # the default of nnunet_transplant_merge itself is the average, U-Net Transplant's diamond in Fig. 3
    plain = 1 / models if on_simplex or method.name == "task_arithmetic" else method.weights_rule.default(models)
    if low < 0:
        raise TransplantError("-range must not be negative: a negative weight takes its structures out of the model")
    ranges: dict[str, FloatDistribution | IntDistribution] = {}
    default: dict[str, float] = {}
    for i in range(models if takes_weights else 0):
        ranges[f"w_{i + 1}"] = _range("-range", float, low, high, plain)
        default[f"w_{i + 1}"] = plain
    numbers = {name: (parameter, settings[step.name][parameter.name]) for step in recipe.steps
               for parameter in step.parameters if not parameter.choices
               for name in (parameter.name, f"{step.name}.{parameter.name}")}
    for name, (low, high) in (searched or {}).items():
        if name not in numbers:
            known = [name for name in numbers if "." not in name]
            raise TransplantError(f"-search {name}: this merge has no such number{did_you_mean(name, known)} (it has: "
                                  f"{', '.join(known) or 'none'})")
        parameter, default[name] = numbers[name]
        ranges[name] = _range(f"-search {name}", parameter.kind, parameter.check(low), parameter.check(high),
                              default[name])
    if not ranges:
        raise TransplantError("a zip takes no weights: give -search with numbers to search")
    return Space(ranges, default, models if takes_weights else 0, on_simplex)


def _range(what: str, kind: type, low: float, high: float, default: float) -> FloatDistribution | IntDistribution:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise TransplantError(f"{what} must be two numbers, the lower one first, not {low:g} {high:g}")
    if not low <= default <= high:
        raise TransplantError(f"{what} from {low:g} to {high:g} leaves out the default, {default:g}, which every sweep "
                              "starts from")
    return IntDistribution(int(low), int(high)) if kind is int else FloatDistribution(low, high)


def grid_axes(space: Space, steps: int) -> list[list[float]]:
    """`steps` values from the lowest to the highest of each range, without the last digits of floating point."""
    return [[min(round(value, 9), each.high) for value in np.linspace(each.low, each.high, steps).tolist()]
            for each in space.ranges.values()]


def grid_points(space: Space, steps: int) -> list[dict[str, float]]:
    """The default, and every combination of the values of `grid_axes`."""
    points = [dict(zip(space.ranges, values, strict=True)) for values in itertools.product(*grid_axes(space, steps))]
    return [space.default, *(point for point in points if _key(point) != _key(space.default))]


def _key(point: Point) -> tuple:
    return tuple(sorted((name, round(value, 9)) for name, value in point.items()))


# ---------------------------------------------------------------------------------------------------------------------
# The study

def open_study(storage: str, name: str, objectives: int, inputs: Mapping[str, Any]) -> optuna.Study:
    """A study to maximise so many objectives: a new one, or the one of this name in the storage.

    storage: an URL as sqlite:///sweep.db, or the path of a journal file; both may be shared by several machines.
    inputs: what must be the same for trials to be comparable, in words. Raises TransplantError for a storage that
    cannot be opened, and for a study of other inputs.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    digests = {what: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
               for what, value in inputs.items()}
    known: dict[str, str] = {}
    for attempt in range(ATTEMPTS):
        try:
            study = optuna.create_study(storage=_open_storage(storage), study_name=name, load_if_exists=True,
                                        directions=["maximize"] * objectives)
            if "inputs" not in study.user_attrs:
                study.set_user_attr("inputs", digests)
            known = study.user_attrs["inputs"]
        except Exception as error:  # databases and their drivers raise anything
            if attempt + 1 == ATTEMPTS:
                raise TransplantError(f"cannot open the study {name} in {storage} ({type(error).__name__}: "
                                      f"{' '.join(str(error).split())[:200]})") from error
            time.sleep(random.uniform(0.1, 0.4) * 2 ** attempt)  # workers that make a new database hinder each other
        else:
            break
    if known != digests:
        differing = [what for what in known | digests if known.get(what) != digests.get(what)]
        raise TransplantError(f"the study {name} in {storage} was started with other {', '.join(differing)}: its "
                              "results cannot be compared. Give another -study or -o")
    return study


def _open_storage(storage: str) -> RDBStorage | JournalStorage:
    if "://" in storage:
        return RDBStorage(storage)
    Path(storage).absolute().parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(storage))


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Every trial that was evaluated, in their order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def search(study: optuna.Study, space: Space, evaluate: Evaluate, structures: Sequence[str],
           points: Sequence[Point] | None = None, trials: int = 0, sampler: str = "tpe", seed: int = 0,
           progress: bool = False) -> None:
    """Evaluate points of the space and store each in the study as it comes, until all `points` are there, or `trials`
    trials, whoever evaluated them. Interrupted and called again it goes on; others may work on the same study.

    evaluate: gives the Dice of each of the structures. Where it raises TransplantError, as for logits that overflow,
    they are all 0, and the trial notes why. A study of one objective gets their mean, another each of them.
    The default is always among the points evaluated.
    """
    study.sampler = _Sampler(space, points, trials, sampler, seed)
    total = trials if points is None else len(points)
    with tqdm(total=total, desc="sweep", unit="merge", disable=not progress, initial=min(
            total, _count(finished(study), points))) as bar:
        while study.sampler.is_left(study):
            _evaluate_next(study, space, evaluate, structures)
            done = finished(study)
            bar.n = min(total, _count(done, points))
            bar.set_postfix_str(f"best mean Dice {max(map(trial_dice, done)):.4f}")


def _evaluate_next(study: optuna.Study, space: Space, evaluate: Evaluate, structures: Sequence[str]) -> None:
    trial = study.ask(dict(space.ranges))
    try:
        dice = evaluate(space.weights(trial.params), space.parameters(trial.params))
    except TransplantError as error:
        trial.set_user_attr("failure", str(error))
        dice = dict.fromkeys(structures, 0.0)
    except BaseException:  # an interruption too: somebody else evaluates this point
        study.tell(trial, state=TrialState.FAIL)
        raise
    trial.set_user_attr("dice", dice)
    values = list(dice.values())
    study.tell(trial, values if len(study.directions) > 1 else float(np.mean(values)))


def trial_dice(trial: FrozenTrial) -> float:
    return float(np.mean(list(trial.user_attrs["dice"].values())))


def _count(done: Sequence[FrozenTrial], points: Sequence[Point] | None) -> int:
    """How far it is: evaluations, or those of the points that are evaluated."""
    return len(done) if points is None else len({*map(_key, points)} & {_key(trial.params) for trial in done})


class _Sampler(BaseSampler):
    """What is evaluated next. All is decided when a trial has its number, so that workers of one study do not choose
    the same; and from a seed made of `seed` and this number, so that a search in several goes is the same as in one.

    points: one of these that nobody has evaluated or is at, or where there is none, that somebody is at, who may have
        died. In random order, but the default, which is the first, comes first.
    trials, sampler: without points, after the default, what this sampler proposes.
    """

    def __init__(self, space: Space, points: Sequence[Point] | None, trials: int, sampler: str, seed: int) -> None:
        self.ranges, self.sampler, self.seed = space.ranges, sampler, seed
        self.points: list[Point] = [space.default] if points is None else list(points)
        self.trials = trials if points is None else 0

    def is_left(self, study: optuna.Study) -> bool:
        done = finished(study)
        return len(done) < self.trials or bool(_without(self.points, done))

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return dict(self.ranges)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, trial.number])
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        done = [other for other in others if other.state == TrialState.COMPLETE]
        running = [other for other in others if other.state == TrialState.RUNNING]
        left = _without(self.points, [*done, *running])
        if any(len(other.params) < len(self.ranges) and other.number < trial.number for other in running):
            left = [point for point in left if point is not self.points[0]]  # which another worker is just taking
        if not left and len(done) >= self.trials:
            left = _without(self.points, done) or self.points
        if left:
            return dict(left[0 if left[0] is self.points[0] else int(rng.integers(len(left)))])
        proposed: dict[str, Any] = {}
        for sampler in dict.fromkeys((self.sampler, "tpe")):  # gp and cmaes come back to a corner that is the best
            self.proposing = _proposing(sampler, int(rng.integers(2 ** 31 - 1)))
            space = self.proposing.infer_relative_search_space(study, trial)
            with np.errstate(all="ignore"):  # gp divides by 0 where it is sure of everything
                proposed = self.proposing.sample_relative(study, trial, space)
            if not proposed or _without([proposed], others):
                break
        return proposed

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str,
                           distribution: BaseDistribution) -> Any:
        return self.proposing.sample_independent(study, trial, name, distribution)


def _without(points: Sequence[Point], trials: Sequence[FrozenTrial]) -> list[Point]:
    taken = {_key(trial.params) for trial in trials}
    return [point for point in points if _key(point) not in taken]


def _proposing(name: str, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "cmaes":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if name == "gp":
            return GPSampler(seed=seed, deterministic_objective=True)
        # more candidates than Optuna's 24, whose choice costs nothing beside an evaluation
        return TPESampler(seed=seed, multivariate=True, constant_liar=True, n_ei_candidates=100)
