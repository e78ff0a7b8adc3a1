"""The width of models' minima side by side, and what it says of their task vectors (U-Net Transplant, Table 1, Fig. 2).
"""
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from nnunet_transplant.analysis.curvature import Hessian, fisher_diagonal, hessian_trace, quadratic, top_eigenvalues
from nnunet_transplant.analysis.risk import open_risk
from nnunet_transplant.checkpoint import tensors_sha256
from nnunet_transplant.device import AUTO, threads_of_nnunet, torch_device
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures.flatness import save_flatness_figure
from nnunet_transplant.files import atomic_path, check_output, file_sha256
from nnunet_transplant.mergeable import check_base
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, model_labels, open_models
from nnunet_transplant.volumes import configuration_of, volumes_of

JSON, TABLE, FIGURE = "flatness.json", "table.txt", "flatness.png"


def flatness(models: Sequence[Path | str], dataset: str | int, fold: str | int = "0", *, output: Path | str,
             tasks: Sequence[Path | str] = (), cases: str | None = None, n_cases: int | None = None,
             n_patches: int = 16, n_eigenvalues: int = 10, n_probes: int = 10, batch_size: int | None = None,
             seed: int = 0, checkpoint_name: str = CHECKPOINT, device: str = AUTO, trust: bool = False,
             overwrite: bool = False, progress: bool = False) -> dict[str, Any]:
    """Measure how sharply the loss of each model rises around it, and write flatness.json, table.txt and flatness.png.

    models: checkpoints, or trained model folders: each fold counts by itself.
    dataset, fold, cases, n_cases: labelled cases: the validation cases of a fold ("all": every case), or those chosen
        by `cases` (FILE, train:K, val:K); so many of them, unless told as many as patches.
    n_patches: of them, the same for all models that have the same plans. The Hessian is that of their mean loss.
    tasks: models fine-tuned from one of `models`, or task vector files: each gets the bound of Eq. 7,
        1/2 lambda_1 ||tau||^2, on what its task vector adds to the loss of its base, beside 1/2 tau^T H tau itself.
    n_eigenvalues: of the Hessian; 0 leaves the Hessian out. n_probes: vectors of the estimate of its trace.
    batch_size: patches differentiated at once; the plans' unless told.

    Returns what flatness.json holds. Raises TransplantError for missing data, labels or models, and an existing output.
    """
    if n_eigenvalues < 0 or n_probes < 0 or (batch_size is not None and batch_size < 1):
        raise TransplantError("-n_eigenvalues and -n_probes must not be negative, and -batch_size at least 1")
    if tasks and not n_eigenvalues:
        raise TransplantError("-tasks needs lambda_1: give -n_eigenvalues 1 or more")
    output = Path(os.path.abspath(output))
    check_output(output, [*models, *tasks], overwrite, JSON, "an earlier measurement")
    where = torch_device(device)
    threads_of_nnunet(where)
    volumes = volumes_of(dataset, fold, n_patches if n_cases is None else n_cases, cases)
    use_our_trainers()
    opened = [model for path in models for model in open_models(path, None, checkpoint_name, trust)]
    labels = model_labels([model.path for model in opened])
    vectors = _task_vectors(tasks, opened, labels, checkpoint_name, trust)
    found: dict[str, Any] = {}
    bounds: dict[str, Any] = {}
    for label, model in zip(labels, opened, strict=True):
        risk = open_risk(model, volumes, n_patches, seed, where, progress)
        fisher = torch.cat([each.reshape(-1) for each in fisher_diagonal(risk).values()]).cpu()  # MPS has no float64
        of_model = found[label] = {
            "path": str(model.path.resolve()), "sha256": file_sha256(model.path), "parameters": fisher.numel(),
            "cases": {patch.cases.dataset: list(patch.cases.files) for patch in risk.patches}, "loss": risk.mean(),
            "fisher_trace": float(fisher.double().sum()),
            "fisher_largest": fisher.topk(min(10, fisher.numel())).values.tolist()}
        if not n_eigenvalues:
            continue
        hessian = Hessian(risk, batch_size or configuration_of(model).batch_size)
        of_model["hessian_eigenvalues"] = top_eigenvalues(hessian, n_eigenvalues, seed).tolist()
        if n_probes:
            of_model["hessian_trace"], of_model["hessian_trace_error"] = hessian_trace(hessian, n_probes, seed)
        for task, tau in vectors.get(label, {}).items():
            norm = sum(float(part.double().square().sum()) for part in tau.values()) ** 0.5
            bounds[task] = {"base": label, "norm": norm, "quadratic": quadratic(hessian, tau),
                            "bound": 0.5 * of_model["hessian_eigenvalues"][0] * norm ** 2}
    result = {"patches": n_patches, "seed": seed, "models": found, "tasks": bounds}
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        (folder / JSON).write_text(json.dumps(_without_nan(result), indent=4) + "\n", encoding="utf-8")
        (folder / TABLE).write_text(table(result) + "\n", encoding="utf-8")
        save_flatness_figure(found, n_patches, folder / FIGURE)
    return result


def _task_vectors(tasks: Sequence[Path | str], bases: Sequence[TrainedModel], labels: Sequence[str],
                  checkpoint_name: str, trust: bool) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """Base's label -> task's label -> tau of the tensors outside the heads. A task belongs to the base whose tensors
    are its theta_0, or where it records none, to the only base there is."""
    bodies = [{name: model.tensors()[name] for name in model.layout.body} for model in bases]
    hashes = [tensors_sha256(body) for body in bodies] if tasks else []
    opened = []
    for path in tasks:
        theta_0 = bodies[0] if len(bodies) == 1 else None  # a task vector file of several finds its own beside it
        opened += open_models(path, None, checkpoint_name, trust, theta_0)
    result: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for label, model in zip(model_labels([model.path for model in opened]), opened, strict=True):
        recorded = model.theta_0_sha256
        if recorded in hashes:
            which = hashes.index(recorded)
        elif recorded is None and len(bases) == 1:
            which = 0
        else:
            raise TransplantError(f"{model.name} was not fine-tuned from any of the models given by -m"
                                  if recorded else f"{model.name} does not record its base: give that one alone to -m")
        check_base(bodies[which], model)
        theta = model.tensors()
        result.setdefault(labels[which], {})[label] = {
            name: theta[name].float() - base.float() for name, base in bodies[which].items()
            if base.is_floating_point() and "running_" not in name}
    return result


def table(result: Mapping[str, Any]) -> str:
    """The numbers for a reader: a row for each model, and one for each task vector; below, which is which."""
    columns = {"loss": "loss", "fisher_trace": "Fisher trace", "hessian_eigenvalues": "lambda_1",
               "hessian_trace": "Hessian trace", "hessian_trace_error": "its error"}
    number = {name: f"[{i}]" for i, name in enumerate((*result["models"], *result["tasks"]), 1)}
    models = {number[name]: {title: model[key][0] if isinstance(model[key], list) else model[key]
                             for key, title in columns.items() if key in model}
              for name, model in result["models"].items()}
    lines = [f"curvature of the loss on {result['patches']} patches", "", _layout(models)]
    if result["tasks"]:
        tasks = {number[name]: {"base": number[task["base"]], "||tau||": task["norm"],
                                "1/2 tau^T H tau": task["quadratic"], "1/2 lambda_1 ||tau||^2": task["bound"]}
                 for name, task in result["tasks"].items()}
        lines += ["", "what a task vector may add to the loss of its base (U-Net Transplant, Eq. 7)", "",
                  _layout(tasks)]
    return "\n".join([*lines, "", *(f"{number[name]} {name}" for name in number)])


def _layout(rows: Mapping[str, Mapping[str, Any]]) -> str:
    return pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="{:.4g}".format, na_rep="-")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
