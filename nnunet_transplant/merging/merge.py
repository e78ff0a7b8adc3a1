"""Merge trained nnU-Net models into one, tensor by tensor, and write the result as an ordinary model folder."""
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tqdm import tqdm

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import changes_network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import JoinedHeads, check_head_rows, join, join_head, shares, structures
from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import Method, find
from nnunet_transplant.model_folder import (
    CHECKPOINT,
    TrainedModel,
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


def merge_folders(model_paths: Sequence[Path], folds: Sequence[str] | None = None, checkpoint_name: str = CHECKPOINT,
                  base: Path | None = None, method: str = "average", weights: Sequence[float] | None = None,
                  parameters: dict[str, Any] | None = None, per_fold: bool = False, trust: bool = False,
                  progress: bool = False) -> dict[str, MergedModel]:
    """Merge everything selected into one model, or with per_fold fold k of every model with fold k of the others.

    model_paths: trained model folders or checkpoints inside them; folds as in `open_models`.
    weights: one for each of model_paths; the folds of one model share it equally.
    base: theta_0 for models that record none (see `open_theta_0`).
    Returns the merged model by fold name ("all" unless per_fold). Raises TransplantError for what cannot merge.
    """
    groups = [open_models(path, folds, checkpoint_name, trust) for path in model_paths]
    theta_0 = None if base is None else open_theta_0(base, groups[0][0], checkpoint_name, trust)
    if not per_fold:
        return {"all": merge_models(groups, method, weights, theta_0, parameters, progress)}
    folds_of = [[model.fold for model in group] for group in groups]
    if any(found != folds_of[0] for found in folds_of):
        raise TransplantError("--per_fold needs the same folds in every model; found " + "; ".join(
            f"{path}: {' '.join(found)}" for path, found in zip(model_paths, folds_of, strict=True)))
    return {model.fold: merge_models([[group[i]] for group in groups], method, weights, theta_0, parameters, progress)
            for i, model in enumerate(groups[0])}


def merge_models(groups: Sequence[Sequence[TrainedModel]], method: str = "average",
                 weights: Sequence[float] | None = None, theta_0: dict[str, torch.Tensor] | None = None,
                 parameters: dict[str, Any] | None = None, progress: bool = False) -> MergedModel:
    """Merge trained models into one network, in float32, keeping the stored types.

    groups: one for each weight, each with one or more folds that share its weight equally.
    theta_0: the base by canonical names, for models that record none. Where they record one, it must be that.
    Raises TransplantError for models that cannot merge, a missing or other base, wrong weights or parameters, NaN or
    Inf in an input.
    """
    chosen = find(method)
    settings = chosen.settings(parameters or {})
    group_weights = chosen.weights(weights, len(groups))
    models = [model for group in groups for model in group]
    each = [weight / len(group) for weight, group in zip(group_weights, groups, strict=True) for _ in group]
    check_mergeable(models)
    trainer = _common_trainer(models)
    joined = join(models, each)
    if joined.rows is not None:
        for model in models:
            check_head_rows(model)
    theta_0 = _base(chosen, models, theta_0)
    tensors = [model.tensors() for model in models]
    merged = _merge_tensors(chosen, settings, each, models, tensors, theta_0, joined, progress)
    layout = models[0].layout
    fingerprint = models[0].folder / "dataset_fingerprint.json"
    return MergedModel(
        weights={name: merged[layout.canonical[name]] for name in layout.shapes},
        plans=models[0].plans, dataset_json=_dataset_json(models[0], joined),
        configuration=models[0].configuration, trainer=trainer,
        mirroring_axes=_common_axes(models), fingerprint=fingerprint if fingerprint.is_file() else None,
        provenance=_provenance(chosen, settings, each, models, theta_0),
        notes=_notes(chosen, models, tensors))


def _common_trainer(models: Sequence[TrainedModel]) -> type[nnUNetTrainer]:
    """The trainer that builds the merged network: stock, unless the models' trainer changes the network."""
    trainers = {model.trainer for model in models if changes_network(model.trainer)}
    if len(trainers) > 1:
        raise TransplantError("models whose trainers build networks of their own merge only with their like: "
                              + ", ".join(sorted(trainer.__name__ for trainer in trainers)))
    return trainers.pop() if trainers else nnUNetTrainer


def _base(method: Method, models: Sequence[TrainedModel],
          given: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """theta_0, where it is given or the method needs it: the given one, else the one a model folder keeps."""
    recorded = common_theta_0_sha256(models)
    if given is not None:
        if recorded is not None and checkpoints.tensors_sha256(given) != recorded:
            raise TransplantError(f"the base given by -base is not the one these models were fine-tuned from "
                                  f"(theta_0 with SHA-256 {recorded[:16]}...)")
        return given
    if not method.needs_base:
        return None
    kept = next((theta_0 for theta_0 in (model.theta_0() for model in models) if theta_0 is not None), None)
    if kept is None:
        raise TransplantError(f"method {method.name} needs theta_0, the base these models were fine-tuned from: the "
                              "model folders keep none (stock fine-tuning does not), so give it with -base")
    unknown = [model.name for model in models if model.theta_0_sha256 is None]
    if unknown:
        raise TransplantError(f"{unknown[0]} does not record the base it was fine-tuned from: give it with -base")
    return kept


def _merge_tensors(method: Method, settings: dict[str, Any], weights: Sequence[float], models: Sequence[TrainedModel],
                   tensors: Sequence[dict[str, torch.Tensor]], theta_0: dict[str, torch.Tensor] | None,
                   joined: JoinedHeads, progress: bool) -> dict[str, torch.Tensor]:
    layout = models[0].layout
    body = [name for name in layout.body if tensors[0][name].is_floating_point()]
    state: list[Any] = [None] * len(models)
    if method.prepare is not None:
        state = [method.prepare((theta[name].float() - theta_0[name].float() for name in body), **settings)
                 for theta in tensors]
    merged = {}
    for name in tqdm(layout.names, desc=method.name, unit="tensor", delay=3, disable=not progress):
        stored = [theta[name] for theta in tensors]
        for model, tensor in zip(models, stored, strict=True):
            _check_finite(tensor, name, model)
        if name in layout.heads:
            heads = [tensor.float() for tensor in stored]
            result = average(None, heads, shares(weights), []) if joined.rows is None \
                else join_head(heads, weights, joined)
        elif stored[0].is_floating_point():
            base = None if theta_0 is None else theta_0[name].float()
            result = method.merge(base, [tensor.float() for tensor in stored], weights, state, **settings)
        else:
            result = stored[0].clone()
        merged[name] = result.to(stored[0].dtype)
    return merged


def _check_finite(tensor: torch.Tensor, name: str, model: TrainedModel) -> None:
    # a sum is NaN or Inf if and only if an entry is (float64 does not overflow), and costs one pass
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
        raise TransplantError(f"{model.path} holds NaN or Inf in {name}")


def _common_axes(models: Sequence[TrainedModel]) -> tuple[int, ...] | None:
    axes = set.intersection(*(set(model.mirroring_axes or ()) for model in models))
    return tuple(sorted(axes)) or None  # nnU-Net crashes on an empty tuple


def _dataset_json(first: TrainedModel, joined: JoinedHeads) -> dict[str, Any]:
    """The first model's dataset.json with the joined labels, without the paths of patient images."""
    content = {key: value for key, value in first.dataset_json.items() if key != "dataset"} | joined.fields
    if content["regions_class_order"] is None:
        del content["regions_class_order"]
    return content


def _provenance(method: Method, settings: dict[str, Any], weights: Sequence[float], models: Sequence[TrainedModel],
                theta_0: dict[str, torch.Tensor] | None) -> dict[str, Any]:
    sha256 = common_theta_0_sha256(models)
    if sha256 is None and theta_0 is not None:
        sha256 = checkpoints.tensors_sha256(theta_0)
    return {
        "method": method.name, "reference": method.reference, "parameters": settings, "theta_0_sha256": sha256,
        "inputs": [{"path": str(model.path.resolve()), "sha256": checkpoints.file_sha256(model.path),
                    "fold": model.fold, "weight": weight, "structures": list(structures(model))}
                   for model, weight in zip(models, weights, strict=True)]}


def _notes(method: Method, models: Sequence[TrainedModel], tensors: Sequence[dict[str, torch.Tensor]]) -> list[str]:
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
    check_output(output, overwrite)
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


def check_output(output: Path, overwrite: bool) -> None:
    """Raise TransplantError unless a model folder may be written here."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise TransplantError(f"{output} exists already; give another -o, or --overwrite to replace it")
    if not (output / "merge.json").is_file():
        raise TransplantError(f"{output} is not a merged model: --overwrite replaces nothing else")


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


