"""What a task is: the text of `-tasks`, and the labels that it makes of its parent's. Nothing here touches a file."""
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nnunet_transplant.data.cases import listed
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import Labels, foreground_values

RESERVED = ("background", "ignore")  # label names with a meaning of their own in nnU-Net


class Task(NamedTuple):
    """A task's name, and for each of its classes the names of the parent's labels that it joins."""
    name: str
    classes: dict[str, list[str]]


def parse_task(text: str, parent_labels: Labels) -> Task:
    """Read `NAME=SPEC`: in SPEC a comma joins labels into one class and `+` separates classes. A label is a name, a
    value or a range of values such as `11-18`; a name that matches exactly wins.

    The class of a one-class task is named after the task. With several classes, a class of one label keeps the label's
    name and a joined class is named by its text.

    Raises TransplantError for text that is not of this form, unknown labels, a label twice in one class, and
    background or ignore.
    """
    name, equals, spec = (part.strip() for part in text.partition("="))
    if not equals or not spec or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise TransplantError(f"cannot read the task '{text}'. A task is NAME=LABELS, for example Liver=liver or "
                              f"Kidney=left_kidney,right_kidney, and NAME has letters, digits, _ and - only")
    values = foreground_values(parent_labels)
    parts = [spec] if spec in values else [part.strip() for part in spec.split("+")]
    classes: dict[str, list[str]] = {}
    for part in parts:
        labels = _labels_of_class(part, parent_labels, text)
        class_name = name if len(parts) == 1 else labels[0] if len(labels) == 1 else part
        if class_name in RESERVED:
            raise TransplantError(f"task '{text}': nnU-Net keeps the name '{class_name}' for itself, choose another")
        if class_name in classes:
            raise TransplantError(f"task '{text}': the class '{class_name}' is there twice")
        classes[class_name] = labels
    return Task(name, classes)


def _labels_of_class(text: str, parent_labels: Labels, task: str) -> list[str]:
    items = [text] if text in foreground_values(parent_labels) else [item.strip() for item in text.split(",")]
    labels = [label for item in items for label in _labels_of_item(item, parent_labels, task)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise TransplantError(f"task '{task}': {listed(twice)} more than once in one class")
    return labels


def _labels_of_item(text: str, parent_labels: Labels, task: str) -> list[str]:
    values = foreground_values(parent_labels)
    if text in values:
        return [text]
    number_range = re.fullmatch(r"(\d+)\s*-\s*(\d+)", text)
    if number_range:
        first, last = int(number_range[1]), int(number_range[2])
        if first > last:
            raise TransplantError(f"task '{task}': the range {text} is empty, write {last}-{first}")
        return [label for value in range(first, last + 1)
                for label in _labels_of_item(str(value), parent_labels, task)]
    value = int(text) if re.fullmatch(r"\d+", text) else None
    if text == "background" or value == 0:
        raise TransplantError(f"task '{task}': background cannot be a class of its own or part of one")
    if text == "ignore" or (value is not None and value == parent_labels.get("ignore")):
        raise TransplantError(f"task '{task}': the ignore label is carried over by itself, it cannot be selected")
    named = [label for label, label_values in values.items() if label_values == (value,)]
    if not named:
        raise TransplantError(f"task '{task}': the dataset has no label '{text}'. It has "
                              + ", ".join(f"{label} ({_shown(parent_labels[label])})" for label in values))
    return named[:1]


def _shown(value: "int | Sequence[int]") -> str:
    return "+".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def remap_labels(seg: np.ndarray, value_map: Mapping[int, int]) -> np.ndarray:
    """Label map of any shape and number type -> int16 of the same shape, by value_map.

    Raises TransplantError for values that are not in value_map."""
    values = seg.astype(np.int32)
    table = np.full(max(value_map) + 1, -1, np.int16)
    table[list(value_map)] = list(value_map.values())
    known = (values == seg) & (values >= 0) & (values < len(table))
    remapped = table[np.where(known, values, 0)]
    known &= remapped >= 0
    if not known.all():
        raise TransplantError(f"values {np.unique(seg[~known]).tolist()} are not among the labels of its dataset.json")
    return remapped
