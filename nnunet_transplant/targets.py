"""What is scored against what: the structures of a model, found by name in a dataset's own labels.

A model of one task, a merged model and the model of the whole dataset number their labels differently. They are scored
against the same reference: the dataset's own labels, found by what each structure says it consists of.
"""
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from nnunet_transplant.data.cases import Cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import origin
from nnunet_transplant.labels import foreground_values, has_regions

Key = int | tuple[int, ...]  # a label or a region of the dataset, as nnU-Net's summary.json names it


class Labelled(Protocol):
    """A model, trained or merged: only its labels count here."""
    @property
    def dataset_json(self) -> dict[str, Any]: ...


class Target(NamedTuple):
    """A structure of a model and what it is scored against."""
    structure: str
    key: Key                     # identifies the structure in summary.json; no two of one model share it
    reference: tuple[int, ...]   # its values in the dataset's label maps
    prediction: tuple[int, ...]  # its values in the model's label maps
    row: str                     # its name in tables: the dataset's own where it has one


def match_structures(model: Labelled, cases: Cases) -> tuple[dict[str, list[str]], list[str]]:
    """Structure of a model -> the labels of the dataset that it is scored against; and the structures that the dataset
    does not have.

    A structure consists of the labels that its dataset.json records (for a task dataset the parent's), or of the label
    of its own name. A task dataset may be the reference too: its labels count as what they consist of.
    """
    known = foreground_values(cases.dataset_json["labels"])
    parts = {label: set(origin(cases.dataset_json, label)) for label in known}  # a dataset records them as a model does
    matches: dict[str, list[str]] = {}
    unknown = []
    for structure in foreground_values(model.dataset_json["labels"]):
        wanted = set(origin(model.dataset_json, structure))
        labels = [label for label in known if parts[label] <= wanted]
        if labels and set().union(*(parts[label] for label in labels)) == wanted:
            matches[structure] = labels
        elif parts.get(structure) == {structure}:
            matches[structure] = [structure]
        else:
            unknown.append(structure)
    return matches, unknown


def reference_key(labels: Sequence[str], dataset_json: dict[str, Any]) -> Key:
    """The union of some labels of a dataset, as nnU-Net's summary.json names a label or region: a label that has
    exactly these values as dataset.json writes it, otherwise the sorted values."""
    values = foreground_values(dataset_json["labels"])
    union = {value for label in labels for value in values[label]}
    for label in (*labels, *values):
        if set(values[label]) == union:
            written = dataset_json["labels"][label]
            listed = isinstance(written, (list, tuple)) and has_regions(dataset_json["labels"])
            return values[label] if listed else values[label][0]
    return tuple(sorted(union))


def unique_key(key: Key, taken: Iterable[Key]) -> Key:
    """The key, or where another structure of the model is scored against the same labels, the same region written
    differently: 1, (1, 1), (1, 1, 1). nnU-Net reads all of them, and each as the same voxels."""
    taken = set(taken)
    while key in taken:
        values = key if isinstance(key, tuple) else (key,)
        key = (*values, values[0])
    return key


def name_targets(labels: Sequence[str], groups: Sequence[Sequence[Labelled]],
                 cases: Cases) -> tuple[list[list[Target]], list[str]]:
    """For each model (its label and its folds) what is scored, and a note for each model about what is not.

    Structures of several models that are scored against the same labels share a row: it has the dataset's name for
    these labels, or where they are a union, the structure's. A name that would stand for two things is replaced by the
    labels, joined by +. Raises TransplantError for a model that has no structure of the dataset.
    """
    dataset_labels = foreground_values(cases.dataset_json["labels"])
    rows = {frozenset(values): label for label, values in reversed(dataset_labels.items())}
    result, notes = [], []
    for model_label, folds in zip(labels, groups, strict=True):
        matches, unknown = match_structures(folds[0], cases)
        if not matches:
            raise TransplantError(f"{model_label} has no structure of {cases.dataset}: it has "
                                  f"{', '.join(unknown)}, the dataset {', '.join(dataset_labels)}")
        if unknown:
            notes.append(f"note: {', '.join(unknown)} of {model_label} not scored: {cases.dataset} has no such label")
        predicted = foreground_values(folds[0].dataset_json["labels"])
        targets: list[Target] = []
        for structure, parts in matches.items():
            key = reference_key(parts, cases.dataset_json)
            values = key if isinstance(key, tuple) else (key,)
            name = structure if structure not in (*dataset_labels, *rows.values()) else "+".join(parts)
            row = rows.setdefault(frozenset(values), name)
            if row in [target.row for target in targets]:  # two structures of one model for the same labels
                row = f"{row} ({structure})"
            targets.append(Target(structure, unique_key(key, [target.key for target in targets]), values,
                                  predicted[structure], row))
        result.append(targets)
    return result, notes
