"""Merge trained nnU-Net models into one, tensor by tensor, and write the result as an ordinary model folder."""
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import changes_network
from nnunet_transplant.environment import versions
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures.merge import save_inputs_figure
from nnunet_transplant.files import atomic_path, check_output, file_sha256
from nnunet_transplant.heads import (
    JoinedHeads,
    check_head_rows,
    join,
    join_head,
    merged_dataset_json,
    shares,
    structures,
)
from nnunet_transplant.merging.align import Unaligned
from nnunet_transplant.merging.apply import is_finite, merge_tensors
from nnunet_transplant.merging.calibration import Calibration, Volumes, open_calibration
from nnunet_transplant.merging.ensemble import agreement, ensemble_targets, fit_head, polish, reference_targets
from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import Method, find
from nnunet_transplant.merging.stages import matching, scales
from nnunet_transplant.merging.statistics import has_running_statistics, recomputed
from nnunet_transplant.merging.vectors import Tensors, in_parallel
from nnunet_transplant.model_folder import (
    CHECKPOINT,
    TrainedModel,
    check_base,
    check_mergeable,
    common_theta_0,
    common_theta_0_sha256,
    open_models,
    open_theta_0,
)
from nnunet_transplant.nnunet import nnUNetTrainer

SAME_BASE_COSINE = 0.5  # fine-tuned siblings lie above 0.9, independently trained networks near 0


@dataclass(frozen=True)
class MergedModel:
    """A merged network in memory, with all that nnU-Net needs to predict with it."""
    weights: dict[str, torch.Tensor]  # a full state dict; names of the same tensor hold the same object
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    trainer: type[nnUNetTrainer]
    mirroring_axes: tuple[int, ...] | None
    fingerprint: Path | None          # a dataset_fingerprint.json to copy
    provenance: dict[str, Any]        # enough to repeat the merge
    notes: list[str]                  # what the user should know


@dataclass(frozen=True)
class Recipe:
    """How to merge, beside which models: what merge.json records and can repeat.

    weights: one for each model folder; its folds share it equally. None: the method's own default.
    parameters: of the method, by name. keep_base_for, stage_weights: see `stages.scales`.
    volumes: what methods with needs_data look at.
    fit_head: fit the head of full resolution to what the ensemble of the models says of the volumes.
    polish: so many steps of AdamW at polish_lr towards what the ensemble of the models says of the volumes.
    share: shell patterns of the tensors that models share in the end, for `merge_shared`; the others are their own.
    same_channels: image channels that are called differently are the same.
    """
    method: str = "average"
    weights: Sequence[float] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep_base_for: Sequence[str] = ()
    stage_weights: Sequence[float] | None = None
    volumes: Volumes | None = None
    fit_head: bool = False
    polish: int = 0
    polish_lr: float = 1e-3
    share: Sequence[str] = ()
    same_channels: bool = False


def merge_folders(model_paths: Sequence[Path | str], folds: Sequence[str] | None = None,
                  checkpoint_name: str = CHECKPOINT, base: Path | str | None = None, recipe: Recipe = Recipe(),
                  per_fold: bool = False, trust: bool = False, progress: bool = False) -> dict[str, MergedModel]:
    """Merge everything selected into one model, or with per_fold fold k of every model with fold k of the others.

    model_paths: trained model folders, checkpoints inside them or task vector files; folds as in `open_models`.
    base: theta_0 for models that record none and for task vector files (see `open_theta_0`).
    Returns the merged model by fold name ("all" unless per_fold). Raises TransplantError for what cannot merge.
    """
    theta_0 = None if base is None else open_theta_0(base, checkpoint_name, trust)
    groups = [open_models(path, folds, checkpoint_name, trust, theta_0) for path in model_paths]
    return merge_groups(groups, recipe, theta_0, base, per_fold, progress)


def merge_groups(groups: Sequence[Sequence[TrainedModel]], recipe: Recipe = Recipe(),
                 theta_0: dict[str, torch.Tensor] | None = None, base: Path | str | None = None, per_fold: bool = False,
                 progress: bool = False) -> dict[str, MergedModel]:
    """As `merge_folders`, of models that are open already; `base` only says where theta_0 was read."""
    if not per_fold:
        return {"all": merge_models(groups, recipe, theta_0, base, progress)}
    folds_of = [[model.fold for model in group] for group in groups]
    if any(found != folds_of[0] for found in folds_of):
        raise TransplantError("--per_fold needs the same folds in every model; found " + "; ".join(
            f"{group[0].folder}: {' '.join(found)}" for group, found in zip(groups, folds_of, strict=True)))
    return {model.fold: merge_models([[group[i]] for group in groups], recipe, theta_0, base, progress)
            for i, model in enumerate(groups[0])}


def merge_models(groups: Sequence[Sequence[TrainedModel]], recipe: Recipe = Recipe(),
                 theta_0: dict[str, torch.Tensor] | None = None, base: Path | str | None = None,
                 progress: bool = False) -> MergedModel:
    """Merge trained models into one network, in float32, keeping the stored types.

    groups: one for each weight, each with one or more folds that share its weight equally.
    theta_0: the base by canonical names, for models that record none. Where they record one, it must be that.
    Raises TransplantError for models that cannot merge, a missing or other base, wrong weights or parameters, NaN or
    Inf in an input.
    """
    if recipe.share:
        raise TransplantError("-share makes a model of each input, not one of all")
    work = _Work(groups, recipe, theta_0, progress)
    merged = work.merge()
    return work.model(work.models[0], merged, work.dataset_json, _common_axes(work.models), base)


def merge_shared(groups: Sequence[Sequence[TrainedModel]], recipe: Recipe,
                 theta_0: dict[str, torch.Tensor] | None = None, base: Path | str | None = None,
                 progress: bool = False) -> dict[str, MergedModel]:
    """Models that share the tensors of `recipe.share`, merged, and keep the others, with their own heads and labels:
    such as one encoder for several tasks, each with its own decoder. What a model keeps reads the units of what they
    share as these are merged (ZipIt!'s partial zip). By names made of datasets and folds.

    Raises TransplantError as `merge_models` does, for a method that does not align, and a pattern that matches nothing.
    """
    work = _Work(groups, recipe, theta_0, progress)
    searches = work.settings.get("search", "no") != "no"
    if work.method.align is None or recipe.polish or recipe.fit_head or searches:
        raise TransplantError("-share needs a method that aligns, and no -polish, --fit_head or -search")
    tensors = work.aligned()
    merged = work.merged(tensors)
    wholes = [own | {name: merged[name] for name in work.shared} for own in tensors]
    if work.calibration is not None and has_running_statistics(list(merged)):
        seen = replace(work.calibration, tensors=wholes)
        wholes = [whole | recomputed(seen, seen.network(i)) for i, whole in enumerate(wholes)]
    models = {}
    for model, whole in zip(work.models, wholes, strict=True):
        name = model.folder.parent.name if model.folder.parent.name.startswith("Dataset") else model.folder.name
        name = f"{name}_fold_{model.fold}"
        models[name if name not in models else f"{name}_{len(models)}"] = work.model(
            model, whole, merged_dataset_json(model, join([model], [1.0])), model.mirroring_axes, base)
    return models


class _Work:
    """One merge: what the recipe asks for, checked, and the steps from the models' tensors to the merged ones."""

    def __init__(self, groups: Sequence[Sequence[TrainedModel]], recipe: Recipe,
                 theta_0: dict[str, torch.Tensor] | None, progress: bool) -> None:
        self.recipe, self.progress = recipe, progress
        self.method = find(recipe.method)
        self.settings = self.method.settings(recipe.parameters)
        self.then = self.method.then(self.settings)  # the method itself, unless it aligns
        group_weights = self.then.weights(recipe.weights, len(groups))
        self.models = models = [model for group in groups for model in group]
        self.weights = [weight / len(group) for weight, group in zip(group_weights, groups, strict=True) for _ in group]
        self.group_of = [index for index, group in enumerate(groups) for _ in group]
        if self.method is not self.then:
            if recipe.weights is None and "then" not in self.settings:  # a zip: all models count the same, folds too
                self.weights = [1 / len(models)] * len(models)
            self.method.weights_rule.check(self.weights)
        self.check_data()
        check_mergeable(models, same_base=self.method.align is None, channels=not recipe.same_channels)
        self.trainer = _common_trainer(models)
        self.joined = join(models, self.weights)
        if self.joined.rows is not None:
            for model in models:
                check_head_rows(model)
        self.shared = frozenset().union(*(matching(models[0].layout, pattern, "-share") for pattern in recipe.share))
        self.held_back = scales(models[0].layout, recipe.keep_base_for, recipe.stage_weights)
        self.theta_0 = _base(self.method, self.then, bool(self.held_back), models, theta_0)
        self.tensors = [model.tensors() for model in models]
        self.dataset_json = merged_dataset_json(models[0], self.joined)
        self.calibration = None if recipe.volumes is None else open_calibration(
            recipe.volumes, models, self.dataset_json, {}, self.trainer, progress)
        self.found: dict[str, Any] = {}  # by alignment

    def check_data(self) -> None:
        """Raise TransplantError where volumes are missing, or given to what looks at none."""
        given = self.recipe.volumes is not None
        for method in dict.fromkeys((self.method.name, self.then.name)):
            find(method).check_models(len(self.models), given)
        searches = self.settings.get("search", "no") != "no"
        if not 0 <= self.recipe.polish <= 10 ** 6 or not 0 < self.recipe.polish_lr <= 1:
            raise TransplantError("-polish must be a number of steps, and -polish_lr lie above 0 and at most at 1")
        asking = [option for option, asked in (("-polish", self.recipe.polish), ("--fit_head", self.recipe.fit_head),
                                               ("-search", searches)) if asked]
        if asking and not given:
            raise TransplantError(f"{asking[0]} needs volumes to look at: give -d DATASET")
        if given and not (self.method.looks(self.settings) or self.method.align or asking):
            raise TransplantError(f"method {self.method.name} looks at no volumes: leave out -d")

    def merge(self) -> dict[str, torch.Tensor]:
        """The merged tensors, by canonical name."""
        merged = self.with_statistics(self.merged(self.aligned())) if self.settings.get("search", "no") == "no" \
            else self.searched()
        if self.recipe.fit_head:
            merged = fit_head(self.calibration, self.joined, merged)
        if self.recipe.polish:
            merged = polish(self.calibration, self.joined, merged, self.recipe.polish, self.recipe.polish_lr)
        return merged

    @cached_property
    def unaligned(self) -> Unaligned:
        """What alignment starts from, checked; with running statistics of the volumes, where the network has any."""
        for model, tensors in zip(self.models, self.tensors, strict=True):
            for name, tensor in tensors.items():
                check_finite(tensor, name, model)
        if self.calibration is not None and has_running_statistics(self.models[0].layout.names):
            self.tensors = [tensors | recomputed(self.calibration, self.calibration.network(i))
                            for i, tensors in enumerate(self.tensors)]
            self.calibration = replace(self.calibration, tensors=self.tensors)
        return Unaligned(self.models, self.tensors, self.trainer, self.joined.rows is None, self.shared or None,
                         self.progress)

    def aligned(self, **changes: Any) -> list[dict[str, torch.Tensor]]:
        """The models' tensors in common units. changes: of the method's settings."""
        if self.method.align is None:
            return self.tensors
        unaligned = self.unaligned  # first: it may change the calibration
        found = self.method.align(unaligned, self.calibration, **self.method.own(self.settings) | changes)
        self.found = found.found
        return found.tensors

    def merged(self, tensors: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """By the method that merges, of models in common units."""
        heads = _merge_heads(self.models, tensors, self.weights, self.joined)
        seen = None if self.calibration is None else replace(self.calibration, tensors=tensors, heads=heads)
        body = _merge_body(self.then, self.then.own(self.settings), self.weights, self.models, tensors, self.theta_0,
                           self.held_back, seen if self.then.needs_data else None, self.progress)
        return body | heads

    def with_statistics(self, merged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """With running statistics of its own, where models that were aligned have batch norms and there are volumes."""
        if self.method.align is None or self.calibration is None or not has_running_statistics(list(merged)):
            return merged
        return merged | recomputed(self.calibration, self.calibration.merged_network(merged))

    def searched(self) -> dict[str, torch.Tensor]:
        """With the alpha out of 0, 0.1, ... 1 whose merged model is best on the volumes."""
        targets = ensemble_targets(self.calibration, self.joined) if self.settings["search"] == "agreement" \
            else reference_targets(self.calibration)
        scores, best = {}, None
        for alpha in self.calibration.bar([step / 10 for step in range(11)], "alpha"):
            merged = self.with_statistics(self.merged(self.aligned(alpha=alpha)))
            scores[alpha] = agreement(self.calibration, self.calibration.merged_network(merged), targets)
            if best is None or scores[alpha] > max(score for other, score in scores.items() if other != alpha):
                best, found = merged, self.found
        self.found = found | {"searched": {f"{alpha:g}": round(score, 6) for alpha, score in scores.items()}}
        return best

    def model(self, like: TrainedModel, tensors: dict[str, torch.Tensor], dataset_json: dict[str, Any],
              mirroring_axes: tuple[int, ...] | None, base: Path | str | None) -> MergedModel:
        """The merged model with everything else as one of the models has it."""
        provenance = _provenance(self.recipe, self.settings, self.weights, self.group_of, self.models, base,
                                 self.theta_0, self.calibration, self.found)
        return MergedModel(
            weights={name: tensors[like.layout.canonical[name]] for name in like.layout.shapes},
            plans=like.plans, dataset_json=dataset_json, configuration=like.configuration, trainer=self.trainer,
            mirroring_axes=mirroring_axes, fingerprint=_fingerprint(like), provenance=provenance,
            notes=[] if self.method.align is not None else self.warnings())

    def warnings(self) -> list[str]:
        """Where models that record no common base, and have a weight, look as if they had none."""
        counted = [tensors for tensors, weight in zip(self.tensors, self.weights, strict=True) if weight]
        if len(counted) < 2 or common_theta_0_sha256(self.models) is not None:
            return []
        name = max(self.models[0].layout.body, key=lambda n: counted[0][n].numel())
        first, *others = (theta[name].float().reshape(-1) for theta in counted)
        cosine = min(float(torch.cosine_similarity(first, other, dim=0)) for other in others)
        if cosine >= SAME_BASE_COSINE:
            return []
        return [f"these models do not seem to come from one base (cosine of their weights {cosine:.2f}): their merge "
                "is likely useless. Methods that align need no common base (-method activation_align -d DATASET). "
                "Score either with nnunet_transplant_evaluate before you use it"]


def _fingerprint(model: TrainedModel) -> Path | None:
    """The dataset_fingerprint.json of a model's folder, where it has one."""
    path = model.folder / "dataset_fingerprint.json"
    return path if path.is_file() else None


def _common_trainer(models: Sequence[TrainedModel]) -> type[nnUNetTrainer]:
    """The trainer that builds the merged network: stock, unless the models' trainer changes the network."""
    # by name: nnU-Net imports a trainer of nnUNet_extTrainer anew each time it looks for one
    trainers = {model.trainer.__name__: model.trainer for model in models if changes_network(model.trainer)}
    if len(trainers) > 1:
        raise TransplantError("models whose trainers build networks of their own merge only with their like: "
                              + ", ".join(sorted(trainers)))
    return next(iter(trainers.values()), nnUNetTrainer)


def _base(method: Method, then: Method, held_back: bool, models: Sequence[TrainedModel],
          given: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """theta_0, where it is given or the merge needs it: the given one, else the one a model folder keeps. For models
    that are aligned it is in the units of the first, and must be given."""
    needed = then.needs_base or held_back
    if method.align is None:
        if given is None and not needed:
            return None
        return common_theta_0(models, given, f"method {method.name} needs" if method.needs_base else
                              "-keep_base_for and -stage_weights need")
    if given is not None:
        check_base(given, models[0])
    elif needed:
        asking = f"-then {then.name}" if then.needs_base else "-keep_base_for and -stage_weights"
        raise TransplantError(f"{asking} after an alignment: give the base of the first model with -base")
    return given


def _merge_heads(models: Sequence[TrainedModel], tensors: Sequence[dict[str, torch.Tensor]], weights: Sequence[float],
                 joined: JoinedHeads) -> dict[str, torch.Tensor]:
    """The merged heads by canonical name: joined, or where the labels are the same, averaged."""
    merged = {}
    for name in models[0].layout.names:
        if name in models[0].layout.heads:
            heads = [theta[name].float() for theta in tensors]
            for model, head in zip(models, heads, strict=True):
                check_finite(head, name, model)
            result = average(Tensors(name, None, heads, shares(weights))) if joined.rows is None \
                else join_head(heads, weights, joined)
            merged[name] = result.to(tensors[0][name].dtype)
    return merged


def _merge_body(method: Method, settings: dict[str, Any], weights: Sequence[float], models: Sequence[TrainedModel],
                tensors: Sequence[dict[str, torch.Tensor]], theta_0: dict[str, torch.Tensor] | None,
                held_back: dict[str, float], calibration: Calibration | None,
                progress: bool) -> dict[str, torch.Tensor]:
    """The other tensors by canonical name: those of floats by the method, integers as in the first model."""
    floats, others = [], {}
    for name in models[0].layout.body:
        if tensors[0][name].is_floating_point():
            floats.append(name)
        else:
            others[name] = tensors[0][name].clone()

    def check(piece: Tensors) -> None:
        for model, theta in zip(models, piece.thetas, strict=True):
            check_finite(theta, piece.name, model)

    thetas = [{name: theta[name] for name in floats} for theta in tensors]
    return merge_tensors(method, settings, weights, theta_0, thetas, calibration, held_back, check, progress) | others


def check_finite(tensor: torch.Tensor, name: str, model: TrainedModel) -> None:
    if not is_finite(tensor):
        raise TransplantError(f"{model.path} holds NaN or Inf in {name}")


def _common_axes(models: Sequence[TrainedModel]) -> tuple[int, ...] | None:
    axes = set.intersection(*(set(model.mirroring_axes or ()) for model in models))
    return tuple(sorted(axes)) or None  # nnU-Net crashes on an empty tuple


def _provenance(recipe: Recipe, settings: dict[str, Any], weights: Sequence[float], groups: Sequence[int],
                models: Sequence[TrainedModel], base: Path | str | None, theta_0: dict[str, torch.Tensor] | None,
                calibration: Calibration | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that `repeat.read_merge` needs to do it again. weights: as given, None for the method's default."""
    method = find(recipe.method)
    sha256 = common_theta_0_sha256(models) if method.align is None else None  # aligned models may have several
    if sha256 is None and theta_0 is not None:
        sha256 = checkpoints.tensors_sha256(theta_0)
    hashes = in_parallel(file_sha256, [model.path for model in models])
    return {
        "method": method.name, "reference": method.reference, "parameters": settings,
        "weights": None if recipe.weights is None else list(recipe.weights),
        "keep_base_for": list(recipe.keep_base_for),
        "stage_weights": None if recipe.stage_weights is None else list(recipe.stage_weights),
        "volumes": None if calibration is None else calibration.provenance(), "found": dict(found),
        "fit_head": recipe.fit_head, "polish": recipe.polish, "polish_lr": recipe.polish_lr,
        "share": list(recipe.share), "same_channels": recipe.same_channels,
        "base": None if base is None else str(Path(base).resolve()), "theta_0_sha256": sha256,
        "inputs": [{"path": str(model.path.resolve()), "sha256": sha256, "fold": model.fold, "group": group,
                    "weight": weight, "structures": list(structures(model))}
                   for model, sha256, group, weight in zip(models, hashes, groups, weights, strict=True)]}


def write_merge(merged: dict[str, MergedModel], output: Path | str, overwrite: bool = False) -> None:
    """Write merged models, by fold, as one ordinary nnU-Net model folder: there whole or not at all.

    overwrite replaces a folder only if it was written by this function. Raises TransplantError for an existing one
    otherwise, OSError where the disk says so.
    """
    output = Path(output)
    check_merge_output(output, overwrite)
    first = next(iter(merged.values()))
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        _write_json(first.plans, folder / "plans.json")
        _write_json(first.dataset_json, folder / "dataset.json")
        if first.fingerprint is not None:
            shutil.copyfile(first.fingerprint, folder / "dataset_fingerprint.json")
        _write_json({"versions": versions(), "folds": {fold: model.provenance for fold, model in merged.items()}},
                    folder / "merge.json")
        for fold, model in merged.items():
            _write_fold(model, fold, folder / f"fold_{fold}")


def write_shared(models: Mapping[str, MergedModel], output: Path | str, overwrite: bool = False) -> None:
    """Write models that share a part as model folders side by side in one folder: all of them or none."""
    output = Path(output)
    check_merge_output(output, overwrite)
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        for name, model in models.items():
            write_merge({"all": model}, folder / name)
        _write_json({"models": list(models)}, folder / "merge.json")


def check_merge_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise TransplantError unless a merged model may be written here."""
    check_output(output, inputs, overwrite, "merge.json", "a merged model")


def _write_fold(model: MergedModel, fold: str, folder: Path) -> None:
    """checkpoint_final.pth as nnU-Net loads it, and what nnUNetv2_export_model_to_zip wants to find beside it."""
    (folder / "validation").mkdir(parents=True)
    _write_json({"foreground_mean": {}, "mean": {}, "metric_per_case": []}, folder / "validation" / "summary.json")
    save_inputs_figure(model.provenance, folder / "progress.png")
    checkpoints.write({
        "network_weights": model.weights,
        "optimizer_state": None, "grad_scaler_state": None, "logging": None, "_best_ema": None, "current_epoch": 0,
        "init_args": {"plans": model.plans, "configuration": model.configuration, "fold": fold,
                      "dataset_json": model.dataset_json},
        "trainer_name": model.trainer.__name__,
        "inference_allowed_mirroring_axes": model.mirroring_axes,
    }, folder / CHECKPOINT)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


