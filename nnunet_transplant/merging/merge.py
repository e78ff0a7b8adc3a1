"""Merge trained nnU-Net models into one, tensor by tensor, and write the result as an ordinary model folder."""
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import changes_network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import (
    JoinedHeads,
    check_head_rows,
    join,
    join_head,
    merged_dataset_json,
    shares,
    structures,
)
from nnunet_transplant.merging.apply import is_finite, merge_tensors
from nnunet_transplant.merging.calibration import Calibration, Volumes, open_calibration
from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import Method, find
from nnunet_transplant.merging.stages import scales
from nnunet_transplant.merging.vectors import Tensors, in_parallel
from nnunet_transplant.model_folder import (
    CHECKPOINT,
    TrainedModel,
    check_base,
    check_mergeable,
    common_theta_0_sha256,
    open_models,
    open_theta_0,
)
from nnunet_transplant.plotting import save_inputs_figure

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
    """
    method: str = "average"
    weights: Sequence[float] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    keep_base_for: Sequence[str] = ()
    stage_weights: Sequence[float] | None = None
    volumes: Volumes | None = None


def merge_folders(model_paths: Sequence[Path], folds: Sequence[str] | None = None, checkpoint_name: str = CHECKPOINT,
                  base: Path | None = None, recipe: Recipe = Recipe(), per_fold: bool = False,
                  trust: bool = False, progress: bool = False) -> dict[str, MergedModel]:
    """Merge everything selected into one model, or with per_fold fold k of every model with fold k of the others.

    model_paths: trained model folders, checkpoints inside them or task vector files; folds as in `open_models`.
    base: theta_0 for models that record none and for task vector files (see `open_theta_0`).
    Returns the merged model by fold name ("all" unless per_fold). Raises TransplantError for what cannot merge.
    """
    theta_0 = None if base is None else open_theta_0(base, checkpoint_name, trust)
    groups = [open_models(path, folds, checkpoint_name, trust, theta_0) for path in model_paths]
    return merge_groups(groups, recipe, theta_0, base, per_fold, progress)


def merge_groups(groups: Sequence[Sequence[TrainedModel]], recipe: Recipe = Recipe(),
                 theta_0: dict[str, torch.Tensor] | None = None, base: Path | None = None, per_fold: bool = False,
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
                 theta_0: dict[str, torch.Tensor] | None = None, base: Path | None = None,
                 progress: bool = False) -> MergedModel:
    """Merge trained models into one network, in float32, keeping the stored types.

    groups: one for each weight, each with one or more folds that share its weight equally.
    theta_0: the base by canonical names, for models that record none. Where they record one, it must be that.
    Raises TransplantError for models that cannot merge, a missing or other base, wrong weights or parameters, NaN or
    Inf in an input.
    """
    method = find(recipe.method)
    settings = method.settings(recipe.parameters)
    group_weights = method.weights(recipe.weights, len(groups))
    models = [model for group in groups for model in group]
    method.check_models(len(models), recipe.volumes is not None)
    each = [weight / len(group) for weight, group in zip(group_weights, groups, strict=True) for _ in group]
    group_of = [index for index, group in enumerate(groups) for _ in group]
    check_mergeable(models)
    trainer = _common_trainer(models)
    joined = join(models, each)
    if joined.rows is not None:
        for model in models:
            check_head_rows(model)
    layout = models[0].layout
    held_back = scales(layout, recipe.keep_base_for, recipe.stage_weights)
    theta_0 = _base(method, bool(held_back), models, theta_0)
    tensors = [model.tensors() for model in models]
    heads = _merge_heads(models, tensors, each, joined)
    dataset_json = merged_dataset_json(models[0], joined)
    calibration = None if recipe.volumes is None else open_calibration(recipe.volumes, models, dataset_json, heads,
                                                                       trainer, progress)
    merged = _merge_body(method, settings, each, models, tensors, theta_0, held_back, calibration, progress) | heads
    fingerprint = models[0].folder / "dataset_fingerprint.json"
    return MergedModel(
        weights={name: merged[layout.canonical[name]] for name in layout.shapes},
        plans=models[0].plans, dataset_json=dataset_json,
        configuration=models[0].configuration, trainer=trainer,
        mirroring_axes=_common_axes(models), fingerprint=fingerprint if fingerprint.is_file() else None,
        provenance=_provenance(recipe, settings, each, group_of, models, base, theta_0, calibration),
        notes=_notes(models, tensors))


def _common_trainer(models: Sequence[TrainedModel]) -> type[nnUNetTrainer]:
    """The trainer that builds the merged network: stock, unless the models' trainer changes the network."""
    trainers = {model.trainer for model in models if changes_network(model.trainer)}
    if len(trainers) > 1:
        raise TransplantError("models whose trainers build networks of their own merge only with their like: "
                              + ", ".join(sorted(trainer.__name__ for trainer in trainers)))
    return trainers.pop() if trainers else nnUNetTrainer


def _base(method: Method, held_back: bool, models: Sequence[TrainedModel],
          given: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """theta_0, where it is given or the merge needs it: the given one, else the one a model folder keeps."""
    recorded = common_theta_0_sha256(models)
    if given is not None:
        check_base(given, models[0])
        if recorded is not None and checkpoints.tensors_sha256(given) != recorded:
            raise TransplantError(f"the base given by -base is not the one these models were fine-tuned from "
                                  f"(theta_0 with SHA-256 {recorded[:16]}...)")
        return given
    if not method.needs_base and not held_back:
        return None
    kept = next((theta_0 for theta_0 in (model.theta_0() for model in models) if theta_0 is not None), None)
    if kept is None:
        needing = f"method {method.name} needs" if method.needs_base else "-keep_base_for and -stage_weights need"
        raise TransplantError(f"{needing} theta_0, the base these models were fine-tuned from: the "
                              "model folders keep none (stock fine-tuning does not), so give it with -base")
    unknown = [model.name for model in models if model.theta_0_sha256 is None]
    if unknown:
        raise TransplantError(f"{unknown[0]} does not record the base it was fine-tuned from: give it with -base")
    check_base(kept, models[0])
    return kept


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
                models: Sequence[TrainedModel], base: Path | None, theta_0: dict[str, torch.Tensor] | None,
                calibration: Calibration | None) -> dict[str, Any]:
    """Everything that `repeat.read_merge` needs to do it again. weights: as given, None for the method's default."""
    sha256 = common_theta_0_sha256(models)
    if sha256 is None and theta_0 is not None:
        sha256 = checkpoints.tensors_sha256(theta_0)
    method = find(recipe.method)
    hashes = in_parallel(checkpoints.file_sha256, [model.path for model in models])
    return {
        "method": method.name, "reference": method.reference, "parameters": settings,
        "weights": None if recipe.weights is None else list(recipe.weights),
        "keep_base_for": list(recipe.keep_base_for),
        "stage_weights": None if recipe.stage_weights is None else list(recipe.stage_weights),
        "volumes": None if calibration is None else calibration.provenance(),
        "base": None if base is None else str(base.resolve()), "theta_0_sha256": sha256,
        "inputs": [{"path": str(model.path.resolve()), "sha256": sha256, "fold": model.fold, "group": group,
                    "weight": weight, "structures": list(structures(model))}
                   for model, sha256, group, weight in zip(models, hashes, groups, weights, strict=True)]}


def _notes(models: Sequence[TrainedModel], tensors: Sequence[dict[str, torch.Tensor]]) -> list[str]:
    """A warning where models that record no common base look as if they had none."""
    if len(models) < 2 or common_theta_0_sha256(models) is not None:
        return []
    name = max(models[0].layout.body, key=lambda n: tensors[0][n].numel())
    first, *others = (theta[name].float().reshape(-1) for theta in tensors)
    cosine = min(float(torch.cosine_similarity(first, other, dim=0)) for other in others)
    if cosine >= SAME_BASE_COSINE:
        return []
    return [f"these models do not seem to come from one base (cosine of their weights {cosine:.2f}): their merge is "
            "likely useless. Score it with nnunet_transplant_evaluate before you use it"]


def write_merge(merged: dict[str, MergedModel], output: Path, overwrite: bool = False) -> None:
    """Write merged models, by fold, as one ordinary nnU-Net model folder: there whole or not at all.

    overwrite replaces a folder only if it was written by this function. Raises TransplantError for an existing one
    otherwise, OSError where the disk says so.
    """
    check_merge_output(output, overwrite)
    first = next(iter(merged.values()))
    with checkpoints.atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        _write_json(first.plans, folder / "plans.json")
        _write_json(first.dataset_json, folder / "dataset.json")
        if first.fingerprint is not None:
            shutil.copyfile(first.fingerprint, folder / "dataset_fingerprint.json")
        versions = {name: version(name) for name in ("nnunet_transplant", "nnunetv2", "torch")}
        _write_json({"versions": versions, "folds": {fold: model.provenance for fold, model in merged.items()}},
                    folder / "merge.json")
        for fold, model in merged.items():
            _write_fold(model, fold, folder / f"fold_{fold}")


def check_merge_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise TransplantError unless a merged model may be written here."""
    checkpoints.check_output(output, inputs, overwrite, "merge.json", "a merged model")


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


