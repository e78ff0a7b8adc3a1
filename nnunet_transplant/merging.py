"""Merging, and predicting with a merge, as a user asks for it: models by path, something to start from, what is to be
other."""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_transplant.architecture import Network
from nnunet_transplant.defaults import choose
from nnunet_transplant.device import AUTO, torch_device
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.mergeable import check_mergeable
from nnunet_transplant.merged_model import Merged
from nnunet_transplant.merger import merge_groups
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, open_models, open_theta_0
from nnunet_transplant.prediction import check_prediction_options, predict_folder
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import Earlier, RecipeFile, read_merge, read_recipe
from nnunet_transplant.volumes import Volumes

NONE = "none"  # takes a step away that is there to start from


def merge(models: Path | str | Sequence[Path | str] = (), *, align: str | None = None, method: str | None = None,
          fit: str | Sequence[str] | None = None, images: str | int | Sequence[str | int] | None = None,
          cases: str | None = None, n_cases: int | None = None, n_patches: int | None = None,
          weights: Sequence[float] | None = None,
          keep_base_for: str | Sequence[str] | None = None, stage_weights: Sequence[float] | None = None,
          share: str | Sequence[str] | None = None, same_channels: bool | None = None,
          folds: str | int | Sequence[str | int] | None = None, base: Path | str | None = None,
          recipe: Recipe | Path | str | None = None, earlier: Path | str | None = None, drop: str | Sequence[str] = (),
          per_fold: bool = False, checkpoint_name: str = CHECKPOINT, device: str = AUTO, trust: bool = False,
          progress: bool = False, cache: Path | str | None = None, **parameters: Any) -> Merged:
    """Merge trained nnU-Net models into one ordinary nnU-Net model: `merge([A, B], fit="head", images=5).save(OUT)`.

    models: trained model folders, checkpoints inside them, or task vector files.
    align, method, fit: the steps by name; several fits come one after the other. Where none of them is named, and no
        weights, recipe or earlier merge, they are chosen by what is at hand (see `defaults.choose`); else method
        `average` and nothing more unless told. "none" takes a step away that `recipe` or `earlier` has. parameters:
        options of the steps: `density=0.3`, or of one step alone `**{"ties.density": 0.3}`.
    images: dataset(s) whose volumes steps may look at; n_cases (8) of each, spread evenly, out of `cases` (FILE,
        train:K, val:K) or of all; n_patches of all of them together (32, or 64 for fits that take many steps).
        device: where networks run for this: auto (CUDA, else MPS, else the CPU), cuda, mps or cpu.
    weights: one for each model; its folds share it. folds: of each model folder; by default all of its numbered folds,
        else fold_all. per_fold: merge fold k of every model with fold k of the others instead of everything into one.
    keep_base_for, stage_weights: what stays at theta_0, and factors by stage (see `stages.scales`).
    share: merge only tensors of such names, and make a model of each input, with the rest its own.
    same_channels: image channels that are called differently are the same.
    base: theta_0 for task vector files and for models that do not record it: model folder, checkpoint or theta_0 file.
    recipe: a `Recipe` or a recipe file, to start from. earlier: the folder of an earlier merge, to start from: its
        models and its recipe; `models` are added to it, `drop` leaves out some of its models (by a structure, a
        dataset's name or a path).
    cache: a folder that keeps what looking at volumes found out, for the next merge of the same models and volumes with
        another method or fit, and for one that was interrupted.
    trust: load checkpoints that ask for more than weights; they can run code.
    Raises TransplantError for what a user can mend.
    """
    use_our_trainers()
    given, drop = _several(models), _several(drop)
    before = Earlier([], Recipe(), None)
    if earlier is not None:
        if recipe is not None:
            raise TransplantError("give either -from or -recipe: an earlier merge has its own recipe")
        before = read_merge(earlier)
    elif isinstance(recipe, Recipe):
        before = replace(before, recipe=recipe)
    elif recipe is not None:
        file = read_recipe(recipe)
        before = replace(before, recipe=file.recipe, base=file.base)
        if given and weights is None and method in (None, file.recipe.method):
            _check_weights_of(recipe, file, given)
        given = given or list(file.models)
    if drop and earlier is None:
        raise TransplantError("-drop leaves out models of an earlier merge: give it with -from")
    kept = before.without(drop)
    wanted = _changed(before.recipe, align, method, fit, parameters)
    other: dict[str, Any] = {"weights": weights, "keep_base_for": _several(keep_base_for),
                             "stage_weights": stage_weights, "share": _several(share), "same_channels": same_channels}
    wanted = replace(wanted, **{name: value for name, value in other.items() if value is not None})
    unsaid = earlier is None and recipe is None and all(each is None for each in (align, method, fit, weights, share))
    wanted = _with_volumes(wanted, images, cases, n_cases, n_patches)
    if not unsaid:
        wanted.settings()  # what is no option is said before models are opened
    if before.inputs and weights is None and wanted.weights is not None and (given or drop):
        raise TransplantError("the earlier merge had -weights of its own: give new ones for the models of this one, "
                              f"{len(kept.inputs)} kept and {len(given)} new")
    looks = wanted.volumes is not None and (unsaid or wanted.looking or wanted.align is not None)
    where = torch_device(device) if looks else "cpu"  # before anything is read
    base = before.base if base is None else base
    theta_0 = None if base is None else open_theta_0(base, checkpoint_name, trust)
    groups = [*_open_kept(kept, checkpoint_name, trust, theta_0),
              *(open_models(path, None if folds is None else [str(fold) for fold in _several(folds)], checkpoint_name,
                            trust, theta_0) for path in given)]
    if not groups:
        raise TransplantError("no models to merge: give them with -m, or an earlier merge with -from" if earlier is None
                              else "-drop left no models to merge")
    per_fold = per_fold or before.per_fold
    if not unsaid:
        return merge_groups(groups, wanted, theta_0, base, per_fold, where, progress, cache)
    together = [group[0] for group in groups] if per_fold else [model for group in groups for model in group]
    check_mergeable(together, same_base=False, channels=not wanted.same_channels)
    choice = choose(together, wanted, theta_0 is not None)
    merged = merge_groups(groups, choice.recipe, theta_0, base, per_fold, where, progress, cache)
    return merged if len(together) == 1 else merged.told({"default": choice.why}, choice.advice)


def predict(models: Merged | Path | str | Sequence[Path | str], input: Path | str, output: Path | str, *,
            device: str = AUTO, step_size: float = 0.5, mirroring: bool = True, on_device: bool = True,
            save_probabilities: bool = False, continue_prediction: bool = False, npp: int = 3, nps: int = 3,
            prev_stage_predictions: Path | str | None = None, num_parts: int = 1, part_id: int = 0,
            verbose: bool = False, progress: bool = False, **options: Any) -> Path:
    """Predict a folder of images with what `merge` returned, with one model folder, or with several merged on the fly.

    input: folder of images, with channel numbers as nnU-Net wants them (CASE_0000.nii.gz). options: of `merge`. The
    others are nnUNetv2_predict's, see `prediction.predict_folder`. Returns the folder of predictions.
    """
    check_prediction_options(step_size, num_parts, part_id)
    torch_device(device)
    merged = models if isinstance(models, Merged) else merge(models, device=device, progress=progress, **options)
    if merged.side_by_side:
        raise TransplantError("models that share only a part are several: save them, and predict with each")
    return predict_folder(
        merged, input, output, device=device, step_size=step_size, mirroring=mirroring, on_device=on_device,
        save_probabilities=save_probabilities, continue_prediction=continue_prediction, npp=npp, nps=nps,
        prev_stage_predictions=prev_stage_predictions, num_parts=num_parts, part_id=part_id, verbose=verbose,
        progress=progress)


def _several(given: Any) -> Any:
    """A list, of one thing too; None stays None."""
    if given is None:
        return None
    return [given] if isinstance(given, (str, int, Path)) else list(given)


def _changed(recipe: Recipe, align: str | None, method: str | None, fit: str | Sequence[str] | None,
             parameters: Mapping[str, Any]) -> Recipe:
    """A recipe with other steps and options; what a step that goes away had goes with it."""
    changed = recipe
    if align is not None:
        changed = replace(changed, align=None if align == NONE else align)
    if method not in (None, recipe.method):
        changed = replace(changed, method=method, weights=None)
    if fit is not None:
        changed = replace(changed, fit=[name for name in _several(fit) if name != NONE])
    names = _options(changed)
    gone = _options(recipe) - names
    kept = {name: value for name, value in recipe.parameters.items() if name not in gone}
    return replace(changed, parameters=kept, volumes=recipe.as_steps_want().volumes).given(parameters)


def _options(recipe: Recipe) -> set[str]:
    """The names of all options that its steps have: `density`, `ties.density`."""
    return {name for step in recipe.steps for parameter in step.parameters
            for name in (parameter.name, f"{step.name}.{parameter.name}")}


def _check_weights_of(path: Path | str, file: RecipeFile, models: Sequence[Path | str]) -> None:
    """Raise TransplantError where a recipe file has the weights of other models than these, as far as can be told: on
    another machine they may lie elsewhere."""
    if file.recipe.weights is None or not file.models:
        return
    theirs, mine = ([Path(model).resolve() for model in each] for each in (file.models, models))
    if len(theirs) != len(mine) or (theirs != mine and sorted(theirs) == sorted(mine)):
        what = f"{len(theirs)} models, not {len(mine)}" if len(theirs) != len(mine) else "the models in another order"
        raise TransplantError(f"{path} has the weights of {what}: give -weights, or leave out -m")


def _with_volumes(recipe: Recipe, images: str | int | Sequence[str | int] | None, cases: str | None,
                  n_cases: int | None, n_patches: int | None) -> Recipe:
    """A recipe with other volumes, or with others of the same datasets; with none where no step looks any more."""
    other: dict[str, Any] = {"cases": cases, "n_cases": n_cases, "n_patches": n_patches}
    other = {name: value for name, value in other.items() if value is not None}
    if images is not None:
        return replace(recipe, volumes=Volumes(_several(images), **other))
    if recipe.volumes is None:
        if other:
            raise TransplantError(f"-{next(iter(other))} is about the volumes of a dataset: give it with -d")
        return recipe
    if not recipe.looking and recipe.align is None:
        return replace(recipe, volumes=None)
    return replace(recipe, volumes=replace(recipe.volumes, **other))


def _open_kept(earlier: Earlier, checkpoint_name: str, trust: bool,
               theta_0: Network | None) -> list[list[TrainedModel]]:
    groups = []
    for each in earlier.inputs:
        each.check()
        groups.append([model for path in each.files for model in open_models(path, None, checkpoint_name, trust,
                                                                             theta_0)])
    return groups
