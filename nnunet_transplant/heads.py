"""Joining the segmentation heads and the labels of several models.

A softmax head scores class c against background as z_c - z_bg, a region head scores a region as its own logit; both
are linear in the head's weights. So heads of different tasks join into one: background row 0, one row per structure.
The argmax is then U-Net Transplant's rule: the best-scoring structure, background where no score is positive.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import foreground_values, has_regions, task_labels
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.task_vector import RECORD
from nnunet_transplant.vectors import added_up


@dataclass(frozen=True)
class JoinedHeads:
    """The labels of a merged model, and for each of its structures the models and rows its head comes from."""
    fields: dict[str, Any]                      # labels, regions_class_order and our own key for dataset.json
    rows: list[list[tuple[int, int]]] | None    # per structure: (model, row of its head); None: same labels in all
    softmax: bool                               # the merged head has a row for background
    against_background: bool                    # and so have those of the models


def structures(model: TrainedModel) -> dict[str, int]:
    """Structure -> its row in the model's head, in the order of the labels. Background and ignore are none."""
    return head_rows(model.plans, model.dataset_json)


def head_rows(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> dict[str, int]:
    """As `structures`, for a model that need not be on disk."""
    manager = PlansManager(plans).get_label_manager(dataset_json)
    names = foreground_values(dataset_json["labels"])
    if manager.has_regions:
        return {name: row for row, name in enumerate(names)}
    # channel i of a softmax head is the i-th smallest label
    row = {int(value): i for i, value in enumerate(manager.all_labels)}
    return {name: row[value[0]] for name, value in names.items()}


def origin(dataset_json: Mapping[str, Any], structure: str) -> list[str]:
    """The names of the original dataset's labels that a structure consists of: itself, but for task datasets."""
    record = dataset_json.get(RECORD)
    classes = record.get("classes") if isinstance(record, dict) else None
    names = classes.get(structure) if isinstance(classes, dict) else None
    return list(names) if isinstance(names, list) else [structure]


def join(models: Sequence[TrainedModel], weights: Sequence[float]) -> JoinedHeads:
    """Labels and head rows of the merged model.

    Same labels in all models: their head is merged like any other tensor. Otherwise the structures of all models, in
    the order of the models; one that several have is averaged; one that only models of negative weight have is
    forgotten, unless nothing else is left.

    Raises TransplantError for what nnU-Net cannot express: one name for different structures, regions beside plain
    labels.
    """
    _check_names(models)
    if all(_label_key(model) == _label_key(models[0]) for model in models):
        softmax = not models[0].labels.has_regions
        return JoinedHeads(_own_fields(models), None, softmax, softmax)
    kinds = {model.labels.has_regions for model in models}
    if len(kinds) > 1:
        regions = next(model for model in models if model.labels.has_regions)
        raise TransplantError(f"{regions.name} has regions, others have plain labels: nnU-Net writes regions by their "
                              "order, not by their score, so one model cannot hold both")
    of_structure: dict[str, list[tuple[int, int]]] = {}
    for i, model in enumerate(models):
        for name, row in structures(model).items():
            of_structure.setdefault(name, []).append((i, row))
    kept = {name: rows for name, rows in of_structure.items() if any(weights[i] >= 0 for i, _ in rows)} or of_structure
    regions = kinds.pop()
    fields = _joined_fields(models, kept, regions)
    # nnU-Net takes regions in the order of the labels, which the joined labels may have changed
    order = [name for name in fields["labels"] if name in kept]
    return JoinedHeads(fields, [kept[name] for name in order], not has_regions(fields["labels"]), not regions)


def _label_key(model: TrainedModel) -> tuple:
    labels = {name: value for name, value in model.dataset_json["labels"].items() if name != "ignore"}
    return list(labels.items()), model.dataset_json.get("regions_class_order")


def _check_names(models: Sequence[TrainedModel]) -> None:
    meaning: dict[str, tuple[TrainedModel, list[str]]] = {}
    for model in models:
        for name in structures(model):
            first, parts = meaning.setdefault(name, (model, sorted(origin(model.dataset_json, name))))
            here = sorted(origin(model.dataset_json, name))
            if parts != here:
                raise TransplantError(
                    f"'{name}' is {'+'.join(parts)} in {first.name} but {'+'.join(here)} in {model.name}: one label "
                    "cannot be both. Give one of the tasks another name")


def _own_fields(models: Sequence[TrainedModel]) -> dict[str, Any]:
    first = models[0].dataset_json
    return {"labels": first["labels"], "regions_class_order": first.get("regions_class_order"),
            RECORD: _record(models, list(structures(models[0])))}


def _joined_fields(models: Sequence[TrainedModel], kept: dict[str, list[tuple[int, int]]],
                   regions: bool) -> dict[str, Any]:
    """Regions that do not overlap, of a dataset without regions, become its plain labels again."""
    record = _record(models, list(kept))
    if not regions:
        labels: dict[str, Any] = {"background": 0} | {name: i for i, name in enumerate(kept, 1)}
        order = None
    else:
        parents, parent_order = _region_space(models, kept)
        labels, order, _ = task_labels(record["classes"], parents, parent_order)
    if "ignore" not in labels and any("ignore" in model.dataset_json["labels"] for model in models):
        labels["ignore"] = 1 + max(max(value) if isinstance(value, list) else value for value in labels.values())
    return {"labels": labels, "regions_class_order": order, RECORD: record}


def _region_space(models: Sequence[TrainedModel],
                  kept: dict[str, list[tuple[int, int]]]) -> tuple[dict[str, Any], list[int] | None]:
    """The label space that all models' regions live in: their common parent's, which tells how they overlap; without
    one each model's labels on their own, one behind the other."""
    records = [model.dataset_json.get(RECORD, {}) for model in models]
    parents = [record.get("parent_labels") for record in records]
    if parents[0] and all(parent == parents[0] for parent in parents):
        labels = {name: value for name, value in parents[0].items() if name != "ignore"}
        return labels, records[0].get("parent_regions_class_order")
    space: dict[str, Any] = {"background": 0}
    shift = 0
    for model in models:
        values = foreground_values(model.dataset_json["labels"])
        for name, value in values.items():
            if name in kept:
                for part in origin(model.dataset_json, name):
                    space.setdefault(part, [v + shift for v in value])
        shift += max((v for value in values.values() for v in value), default=0)
    return space, None


def _record(models: Sequence[TrainedModel], names: list[str]) -> dict[str, Any]:
    """Where each structure came from: enough to score the merged model against the original dataset."""
    own = [(model, structures(model)) for model in models]
    having = {name: [model for model, theirs in own if name in theirs] for name in names}
    records: list[Any] = [model.dataset_json.get(RECORD) for model in models]
    record = {key: records[0][key] for key in ("parent", "parent_labels", "parent_regions_class_order")
              if all(isinstance(other, dict) and key in other and other[key] == records[0][key] for other in records)}
    return record | {"classes": {name: origin(having[name][0].dataset_json, name) for name in names},
                     "sources": {name: sorted({str(model.plans.get("dataset_name", model.folder.name))
                                               for model in having[name]}) for name in names}}


def merged_dataset_json(first: TrainedModel, joined: JoinedHeads) -> dict[str, Any]:
    """The first model's dataset.json with the joined labels, without the paths of patient images."""
    content = {key: value for key, value in first.dataset_json.items() if key != "dataset"} | joined.fields
    if content["regions_class_order"] is None:
        del content["regions_class_order"]
    return content


def scaled_to_one(weights: Sequence[float]) -> list[float]:
    """Weights scaled to sum to 1, for tensors that are averaged; equal ones where their sum is not positive."""
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else [1 / len(weights)] * len(weights)


def join_head(heads: Sequence[torch.Tensor], weights: Sequence[float], joined: JoinedHeads) -> torch.Tensor:
    """One head tensor (rows are classes) of the merged model from that of each model, in float32.

    Row of structure s: the weighted mean over the models that have it of W[row] - W[background], or of regions W[row].
    Raises TransplantError for heads whose rows are not the classes.
    """
    rows = []
    for sources in joined.rows or ():
        parts = []
        for i, row in sources:
            head = heads[i].float()
            parts.append(head[row] - head[0] if joined.against_background else head[row])
        part_of = scaled_to_one([weights[i] for i, _ in sources])
        rows.append(added_up(w * part for w, part in zip(part_of, parts, strict=True)))
    return torch.stack([torch.zeros_like(rows[0]), *rows] if joined.softmax else rows)


def check_head_rows(model: TrainedModel) -> None:
    """Heads of different tasks can be joined only where a head's rows are the classes and nothing else depends on
    their number."""
    channels = model.labels.num_segmentation_heads
    for name in model.layout.heads:
        if model.layout.shapes[name][0] != channels or len(model.layout.shapes[name]) not in (1, 4, 5):
            raise TransplantError(f"{model.name}: {name} depends on the number of classes in a way that cannot be "
                                  "joined; networks of this kind merge only with models of the same labels")
