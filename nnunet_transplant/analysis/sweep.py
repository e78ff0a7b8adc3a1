"""The best coefficients of a merge: on the paper's grid of two task vectors' weights (U-Net Transplant, Fig. 3), or by
a search over any number of weights and parameters of the method.

Some cases say which coefficients are best; others, which the search never sees, say how good these are.
"""
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import optuna
import pandas as pd

from nnunet_transplant.analysis.scoring import LabelledCase, MergedNetwork, open_labelled_cases
from nnunet_transplant.analysis.search import (
    SAMPLERS,
    Space,
    finished,
    grid_axes,
    grid_points,
    open_space,
    open_study,
    search,
    trial_dice,
)
from nnunet_transplant.data.cases import Cases, evaluation_cases
from nnunet_transplant.device import AUTO, threads_of_nnunet, torch_device
from nnunet_transplant.environment import use_our_trainers, versions
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures.sweep import save_front_figure, save_maps_figure, save_slices_figure
from nnunet_transplant.files import atomic_path, check_output, file_sha256
from nnunet_transplant.heads import structures
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, model_labels, open_models, open_theta_0
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import recipe_file
from nnunet_transplant.tables import aligned_lines
from nnunet_transplant.targets import Target, name_targets
from nnunet_transplant.volumes import Volumes

SUMMARY, RECIPE, CSV, TABLE, FIGURE = "sweep.json", "recipe.json", "sweep.csv", "table.txt", "sweep.png"
FRONT_CSV, FRONT_FIGURE = "pareto.csv", "pareto.png"
STUDY = "study.log"
GRID = 21  # values of each weight: U-Net Transplant, Fig. 3
OBJECTIVES = ("mean", "structures")
ARITHMETIC = Recipe("task_arithmetic")


@dataclass(frozen=True)
class Plan:
    """How a sweep goes about it.

    grid: so many values of both weights of two models. trials: so many evaluations, chosen by `sampler` (SAMPLERS).
        Neither: the grid of the paper.
    weight_range, searched: see `search.open_space`.
    objective: the mean over the structures, or each of them (OBJECTIVES).
    tune: the share of the cases to tune on; nothing is reported with 1.
    seed: of the split of the cases, of the search and of the steps' own random choices.
    storage: a database's URL or a journal file, that several machines may share; by default study.log in the output.
    """
    grid: int | None = None
    trials: int | None = None
    sampler: str = "tpe"
    weight_range: Sequence[float] | None = None
    searched: Mapping[str, Sequence[float]] | None = None
    objective: str = "mean"
    tune: float = 0.5
    seed: int = 0
    storage: str | None = None
    study: str = "sweep"

    def check(self, models: int) -> "Plan":
        """With a grid or trials. Raises TransplantError for what cannot be done with so many models."""
        if models < 2:
            raise TransplantError(f"a sweep needs at least two models, not {models}")
        if self.grid is not None and self.trials is not None:
            raise TransplantError("give either -grid or -trials")
        if self.trials is None and models != 2:
            raise TransplantError(f"-grid is for two models: for {models} give -trials")
        if self.trials is None and self.searched:
            raise TransplantError("-grid is for weights alone: with -search give -trials")
        if self.grid is not None and not 2 <= self.grid <= 1001:
            raise TransplantError(f"-grid must be at least 2 and at most 1001, not {self.grid}")
        if self.trials is not None and self.trials < 1:
            raise TransplantError(f"-trials must be at least 1, not {self.trials}")
        for name, value, choices in (("sampler", self.sampler, SAMPLERS), ("objective", self.objective, OBJECTIVES)):
            if value not in choices:
                raise TransplantError(f"-{name} must be one of {', '.join(choices)}, not {value}")
        if self.sampler == "cmaes" and self.objective == "structures":
            raise TransplantError("-sampler cmaes knows one objective: give -objective mean, or -sampler tpe")
        if not 0 < self.tune <= 1:
            raise TransplantError(f"-tune must be above 0 and at most 1, not {self.tune:g}")
        if not 0 <= self.seed < 2 ** 31:
            raise TransplantError(f"-seed must lie between 0 and {2 ** 31 - 1}, not {self.seed}")
        return self if self.trials is not None else replace(self, grid=self.grid or GRID)


def sweep(models: Sequence[Path | str], dataset: str | int, fold: str | int = "0", *, output: Path | str,
          plan: Plan = Plan(), recipe: Recipe = ARITHMETIC, base: Path | str | None = None,
          cases: str | None = None, n_cases: int | None = None, n_patches: int | None = None,
          cache: Path | str | None = None, checkpoint_name: str = CHECKPOINT,
          device: str = AUTO, step_size: float = 0.5, mirroring: bool = False, trust: bool = False,
          overwrite: bool = False, progress: bool = False) -> dict[str, Any]:
    """Search the coefficients with which trained models merge best, and write what was found to a folder.

    models: trained model folders, checkpoints inside them or task vector files; the folds of a folder share its weight.
    dataset, fold, cases, n_cases: the cases to score at the resolution of preprocessing, as `evaluate` takes them.
    output: gets sweep.json, recipe.json, sweep.csv, table.txt, sweep.png, and pareto.csv and pareto.png where each
        structure is an objective. Unless the plan names another storage, every evaluation is stored in its study.log
        as it comes: called again, the sweep goes on from there. overwrite starts anew.
    recipe: of every merge, but for its weights and for what is searched; where a step looks at volumes and the recipe
        names none, n_patches (32) of those that the fold trains on. cache: as `merging.merge` has it.
    base: theta_0, as `merge_folders` takes it.
    mirroring: at test time; takes up to eight times as long.

    Returns the content of sweep.json. Raises TransplantError for what a user can mend.
    """
    plan = plan.check(len(models))
    if not 0 < step_size <= 1:
        raise TransplantError(f"-step_size must be above 0 and at most 1, not {step_size:g}")
    output = Path(os.path.abspath(output))
    if overwrite and plan.storage is not None:
        raise TransplantError("--overwrite would take a shared study from those who work on it: give another -study")
    _check_output(output, models, overwrite)
    target_device = torch_device(device)
    threads_of_nnunet(target_device)
    if any(parameter.name == "seed" for step in recipe.steps for parameter in step.parameters):
        recipe = replace(recipe, parameters={"seed": plan.seed, **recipe.parameters})
    space = open_space(recipe, len(models), plan.weight_range, plan.searched)
    if plan.grid is not None and (space.on_simplex or not space.models):
        raise TransplantError("-grid is for weights that are free of each other, and those of "
                              f"{recipe.method} are not: use -method task_arithmetic, or -trials")
    if plan.sampler == "cmaes" and len(space.ranges) < 2:
        raise TransplantError("-sampler cmaes needs at least two numbers to search: use -sampler tpe")
    scored = evaluation_cases(dataset, fold, cases, n_cases)
    if recipe.looking and recipe.volumes is None:
        recipe = replace(recipe, volumes=_volumes(dataset, fold, cases, n_patches))
    use_our_trainers()
    theta_0 = None if base is None else open_theta_0(base, checkpoint_name, trust)
    groups = [open_models(path, None, checkpoint_name, trust, theta_0) for path in models]
    merger = Merger(groups, replace(recipe, weights=space.weights(space.default)), theta_0, base, target_device,
                    cache=cache)
    network = MergedNetwork(merger, target_device, step_size, mirroring)
    job = _open_job(network, space, scored, plan, groups[0][0], progress)

    fixed = {name: value for name, value in recipe.in_full().parameters.items()
             if name not in space.ranges and name.rpartition(".")[2] not in space.ranges}
    inputs = {"models": [[each["sha256"], each["group"]] for each in network.merged.provenance["inputs"]],
              "base": network.merged.provenance["theta_0_sha256"], "labels": job.cases.dataset_json["labels"],
              "cases": _hashes(job.cases, job.tuning),
              "steps or parameters": [recipe.align, recipe.method, list(recipe.fit), fixed],
              "volumes": network.merged.provenance["volumes"],
              "ranges": space.described(), "objective": plan.objective, "prediction options": [step_size, mirroring]}
    output.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in (STUDY, SUMMARY, RECIPE, CSV, TABLE, FIGURE, FRONT_CSV, FRONT_FIGURE):
            (output / name).unlink(missing_ok=True)
    study = open_study(plan.storage or str(output / STUDY), plan.study, len(job.structures)
                       if plan.objective == "structures" else 1, inputs)
    search(study, space, job.evaluate, job.structures, None if plan.grid is None else grid_points(space, plan.grid),
           plan.trials or 0, plan.sampler, plan.seed, progress)
    found = _result(study, job, plan, dict(zip(_names(groups, models), models, strict=True)), fold)
    best = merger.recipe.given(found["best"]["parameters"])
    best = replace(best, weights=found["best"]["weights"])
    _write(found, recipe_file(best, [Path(path) for path in models], None if base is None else Path(base)), study, job,
           plan, output)
    return found


def _check_output(output: Path, models: Sequence[Path | str], overwrite: bool) -> None:
    """As `check_output`, but an earlier sweep may be gone on with."""
    marker = next((name for name in (STUDY, SUMMARY) if (output / name).is_file()), STUDY)
    check_output(output, models, overwrite or (output / marker).is_file(), marker, "an earlier sweep")


def _volumes(dataset: str | int, fold: str | int, cases: str | None, n_patches: int | None = None) -> Volumes:
    """For merges that look at volumes, those that the fold trains on: never those they are scored on."""
    if cases is not None or str(fold) == "all":
        raise TransplantError("this merge looks at volumes, and nobody says which are not those it is scored on: give "
                              "-f the number of a fold, without -cases")
    return Volumes([dataset], cases=f"train:{int(fold)}", n_patches=n_patches)


def _names(groups: Sequence[Sequence[TrainedModel]], models: Sequence[Path | str]) -> list[str]:
    """What each model's weight is called: by its structures, where they tell the models apart and are short."""
    names = [", ".join(structures(group[0])) for group in groups]
    if len(set(names)) == len(names) and max(map(len, names)) <= 30:
        return names
    return model_labels(models)


# ---------------------------------------------------------------------------------------------------------------------
# What is evaluated

@dataclass(frozen=True)
class _Job:
    """A network to be merged with any coefficients, and the cases that it is scored on."""
    network: MergedNetwork
    space: Space
    cases: Cases
    tuning: list[LabelledCase]
    reporting: list[LabelledCase]
    targets: list[Target]
    notes: list[str]

    @property
    def structures(self) -> list[str]:
        return [target.row for target in self.targets]

    def evaluate(self, weights: list[float] | None, parameters: dict[str, Any]) -> dict[str, float]:
        """The mean Dice over the tuning cases, by structure."""
        return self.score(weights, parameters, self.tuning)

    def score(self, weights: list[float] | None, parameters: dict[str, Any],
              cases: Sequence[LabelledCase]) -> dict[str, float]:
        """NaN for a structure that is in none of these cases, neither in the reference nor in the prediction."""
        self.network.set(weights, parameters)
        dice = self.network.dice(cases, self.targets, self.cases.dataset_json["labels"].get("ignore"))
        frame = pd.DataFrame(dice)
        return {name: float(frame[name].mean()) for name in dice}


def split_cases(count: int, tune: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the cases to tune on and of those to report on: at least one of each, unless tune is 1."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    tuning = count if tune == 1 else min(max(round(tune * count), 1), count - 1)
    return sorted(order[:tuning]), sorted(order[tuning:])


def _open_job(network: MergedNetwork, space: Space, scored: Cases, plan: Plan, model: TrainedModel,
              progress: bool) -> _Job:
    (targets,), notes = name_targets(["the merged model"], [[network.merged]], scored)
    labelled = open_labelled_cases(scored, model, progress)
    if len(labelled) < 2 and plan.tune < 1:
        raise TransplantError(f"a sweep needs a case to tune on and one to report on: {scored.dataset} has only one "
                              f"here (-tune 1 reports nothing)")
    tuning, reporting = ([labelled[i] for i in part] for part in split_cases(len(labelled), plan.tune, plan.seed))
    there = [target for target in targets
             if any(bool(np.isin(case.reference, target.reference).any()) for case in tuning)]
    missing = [target.row for target in targets if target not in there]
    if not there:
        raise TransplantError(f"no case to tune on has {' or '.join(missing)}: take more cases (-tune, -n_cases)")
    if missing:
        notes = [*notes, f"note: no case to tune on has {', '.join(missing)}: not scored"]
    return _Job(network, space, scored, tuning, reporting, there, notes)


def _hashes(cases: Cases, chosen: Sequence[LabelledCase]) -> dict[str, list[str]]:
    """SHA-256 of the images and the label map of each case."""
    return {case.name: [file_sha256(Path(file)) for file in (*cases.files[case.name]["images"],
                                                             cases.files[case.name]["label"])] for case in chosen}


# ---------------------------------------------------------------------------------------------------------------------
# What was found

def _result(study: optuna.Study, job: _Job, plan: Plan, models: Mapping[str, Path | str],
            fold: str | int) -> dict[str, Any]:
    recipe = job.network.merger.recipe
    trials = finished(study)
    default = next(trial for trial in trials if trial.params == job.space.default)
    best = max([default, *trials], key=trial_dice)  # of equals the first: the default
    failed = sum("failure" in trial.user_attrs for trial in trials)
    notes = [*job.notes, *([f"note: {failed} of {len(trials)} merges have no usable logits and count as Dice 0"]
                           if failed else [])]
    seconds = [trial.duration.total_seconds() for trial in trials if trial.duration is not None]

    def described(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        weights, parameters = job.space.weights(trial.params), job.space.parameters(trial.params)
        dice = {"tuning": _with_mean(trial.user_attrs["dice"])}
        if job.reporting:
            try:
                dice["reporting"] = _with_mean(job.score(weights, parameters, job.reporting))
            except TransplantError as error:
                notes.append(f"note: trial {trial.number} on the reporting cases: {error}")
                dice["reporting"] = _with_mean(dict.fromkeys(job.structures, 0.0))
        return {"trial": trial.number, "weights": weights, "parameters": parameters, "dice": dice}
    return {
        "dataset": job.cases.dataset, "fold": str(fold), "recipe": recipe.in_full().to_json(),
        "models": {name: str(Path(path).resolve()) for name, path in models.items()},
        "default": described(default), "best": described(best),
        "cases": {"tuning": [case.name for case in job.tuning], "reporting": [case.name for case in job.reporting]},
        "ranges": job.space.described(), "seed": plan.seed, "tune": plan.tune, "grid": plan.grid,
        "trials": plan.trials, "sampler": None if plan.grid is not None else plan.sampler, "objective": plan.objective,
        "evaluations": len(trials), "seconds_per_evaluation": round(float(np.median(seconds)), 3), "notes": notes,
        "versions": versions("optuna")}


def _with_mean(dice: Mapping[str, float]) -> dict[str, float | None]:
    """None for NaN, which JSON does not have."""
    known = [value for value in dice.values() if not np.isnan(value)]
    return {name: None if np.isnan(value) else value for name, value in dice.items()} | {
        "mean": float(np.mean(known)) if known else None}


def trials_table(study: optuna.Study, space: Space) -> pd.DataFrame:
    """Every evaluation: trial, the weights as they were merged, the parameters searched, dice_STRUCTURE, dice_mean,
    seconds, and why it failed, if it did."""
    rows = []
    for trial in finished(study):
        weights = space.weights(trial.params) or []
        rows.append({"trial": trial.number, **{f"w_{i}": weight for i, weight in enumerate(weights, 1)},
                     **space.parameters(trial.params),
                     **{f"dice_{name}": dice for name, dice in trial.user_attrs["dice"].items()},
                     "dice_mean": trial_dice(trial),
                     "seconds": trial.duration.total_seconds() if trial.duration else None,
                     "failure": trial.user_attrs.get("failure", "")})
    return pd.DataFrame(rows)


def table(found: Mapping[str, Any]) -> str:
    """Default and best coefficients, and their Dice on the cases to tune on and on those to report on."""
    default, best, cases = found["default"], found["best"], found["cases"]
    of_fold = "all cases" if found["fold"] == "all" else f"fold {found['fold']}"
    parts = [part for part in ("tuning", "reporting") if cases[part]]
    lines = [["", *(f"{part} {which}" for part in parts for which in ("default", "best"))]]
    for name in default["dice"]["tuning"]:
        lines.append([name, *(_number(each["dice"][part][name]) for part in parts for each in (default, best))])
    coefficients = [["", "default", "best"]]
    if best["weights"] is not None:
        for i, name in enumerate(found["models"]):
            coefficients.append([f"w_{i + 1} ({name})", *(f"{each['weights'][i]:.4g}" for each in (default, best))])
    for name in found["ranges"]:
        if name in best["parameters"]:
            coefficients.append([f"-{name}", *(f"{each['parameters'][name]:.4g}" for each in (default, best))])
    others = len(cases["reporting"])
    reported = f"reported on {others} other{'s' * (others > 1)}" if others else \
        "nothing is reported (-tune 1): the best is best on the cases it was chosen on"
    how = f"grid of {found['grid']} x {found['grid']}" if found["grid"] else found["sampler"]
    return "\n".join([
        f"Sweep of {steps_in_words(found)} on {found['dataset']}, {of_fold}: {found['evaluations']} merges ({how}), "
        f"{found['seconds_per_evaluation']:.3g} s each",
        f"Dice at the resolution of preprocessing; tuned on {len(cases['tuning'])} case"
        f"{'s' * (len(cases['tuning']) > 1)}, {reported}", "", *aligned_lines(lines, 1), "",
        *aligned_lines(coefficients, 1), *found["notes"]])


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def steps_in_words(found: Mapping[str, Any]) -> str:
    recipe = found["recipe"]
    return " + ".join([*([recipe["align"]] if recipe["align"] else []), recipe["method"], *recipe["fit"]])


def _write(found: dict[str, Any], best: Mapping[str, Any], study: optuna.Study, job: _Job, plan: Plan,
           output: Path) -> None:
    """Each file whole or not at all: another worker of the same study may write them too."""
    frame = trials_table(study, job.space)
    _write_file(output / SUMMARY, _json(found))
    _write_file(output / RECIPE, _json(best))
    _write_file(output / CSV, lambda file: frame.to_csv(file, index=False))
    _write_file(output / TABLE, lambda file: file.write(f"{table(found)}\n".encode()))
    _write_file(output / FIGURE, lambda file: _draw(found, frame, job, plan, file))
    if plan.objective == "structures":
        front = frame[frame["trial"].isin([trial.number for trial in study.best_trials])]
        _write_file(output / FRONT_CSV, lambda file: front.to_csv(file, index=False))
        dice = {name: frame[f"dice_{name}"].to_numpy() for name in job.structures}
        _write_file(output / FRONT_FIGURE, lambda file: save_front_figure(dice, list(front.index), _marks(found, frame),
                                                                          _title(found), file))


def _write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write(file)


def _json(content: Mapping[str, Any]) -> Callable[[BinaryIO], Any]:
    return lambda file: file.write((json.dumps(content, indent=4) + "\n").encode())


def _marks(found: Mapping[str, Any], frame: pd.DataFrame) -> dict[str, int]:
    """The rows of the default and of the best."""
    return {which: int(frame.index[frame["trial"] == found[which]["trial"]][0]) for which in ("default", "best")}


def _title(found: Mapping[str, Any]) -> str:
    count = len(found["cases"]["tuning"])
    return f"Merged by {steps_in_words(found)}, Dice on {count} tuning case{'s' * (count > 1)} of {found['dataset']}"


def _draw(found: Mapping[str, Any], frame: pd.DataFrame, job: _Job, plan: Plan, file: BinaryIO) -> None:
    """Two free weights and nothing else as maps; anything else as a plot for each number that was searched."""
    labels = {f"w_{i}": f"w_{i}: {name}" for i, name in enumerate(found["models"], 1)}
    ranges = {name: labels.get(name, f"-{name}") for name in job.space.ranges}
    if list(ranges) == ["w_1", "w_2"] and not job.space.on_simplex:
        dice = {name: frame[f"dice_{name}"].to_numpy() for name in job.structures}
        if len(dice) > 1:
            dice["mean"] = frame["dice_mean"].to_numpy()
        save_maps_figure(frame[list(ranges)].to_numpy(), dice,
                         {label: tuple(found["ranges"][name]) for name, label in ranges.items()}, _marks(found, frame),
                         _title(found), file, None if plan.grid is None else grid_axes(job.space, plan.grid))
    else:
        save_slices_figure({label: frame[name].to_numpy() for name, label in ranges.items()},
                           frame["dice_mean"].to_numpy(), _marks(found, frame), _title(found), file)
