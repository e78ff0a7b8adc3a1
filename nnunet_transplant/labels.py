"""nnU-Net's labels and regions: what the values of a label map mean, and how classes made of them become labels."""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nnunet_transplant.errors import TransplantError

Labels = Mapping[str, Any]  # name -> int, or for a region a sequence of them

MOST_LABELS = 10_000  # what is done with them takes time with their square


class TaskLabels(NamedTuple):
    """A task's `labels` and `regions_class_order` (None without regions) as in dataset.json, and parent value -> task
    value for every value that the parent's label maps may hold."""
    labels: dict[str, "int | list[int]"]
    regions_class_order: list[int] | None
    value_map: dict[int, int]


def check_dataset_json(dataset_json: Mapping[str, Any], source: str, record_key: str) -> None:
    """Raise TransplantError that names the source, unless its labels, channels and what this package notes under
    `record_key` have the form that everything else relies on. What they mean is not checked."""
    def check(sound: bool, what: str) -> None:
        if not sound:
            raise TransplantError(f"{what} in {source} is not as nnU-Net wants it")

    check(_are_labels(dataset_json.get("labels")), "'labels'")
    check(_is_order(dataset_json.get("regions_class_order"), dataset_json["labels"]), "'regions_class_order'")
    for key in ("channel_names", "modality"):
        check(isinstance(dataset_json.get(key, {}), dict), f"'{key}'")
    record = dataset_json.get(record_key, {})
    check(isinstance(record, dict), f"'{record_key}'")
    check(isinstance(record.get("parent", ""), str), f"'parent' of '{record_key}'")
    classes, parents = record.get("classes", {}), record.get("parent_labels", dataset_json["labels"])
    check(isinstance(classes, dict) and all(isinstance(parts, list) and parts and all(map(_is_name, parts))
                                            for parts in classes.values()), f"'classes' of '{record_key}'")
    check(_are_labels(parents), f"'parent_labels' of '{record_key}'")
    check(_is_order(record.get("parent_regions_class_order"), parents),
          f"'parent_regions_class_order' of '{record_key}'")


def _are_labels(labels: Any) -> bool:
    if not isinstance(labels, dict) or isinstance(labels.get("ignore"), list):
        return False
    values = [value if isinstance(value, list) else [value] for value in labels.values()]
    return (all(map(_is_name, labels)) and all(values) and sum(map(len, values)) <= MOST_LABELS
            and all(_is_value(value) for each in values for value in each))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and len(name) <= 200


def _is_value(value: Any) -> bool:
    try:
        return 0 <= int(value) == float(value) < 2**31
    except (TypeError, ValueError, OverflowError):
        return False


def _is_order(order: Any, labels: Labels) -> bool:
    """nnU-Net looks at the order only where there are regions."""
    if not isinstance(order, list):
        return order is None
    return all(map(_is_value, order)) and (not has_regions(labels) or len(order) == len(foreground_values(labels)))


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """The image channels in their order, by the names of dataset.json (or of "modality", as old ones call it)."""
    return [str(name) for name in dataset_json.get("channel_names", dataset_json.get("modality", {})).values()]


def same_channels(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether channels are called the same: nnU-Net itself tells names apart only by the normalisation that they ask
    for, and not by upper and lower case; people write MRI, mri and "MRI "."""
    return [name.strip().casefold() for name in one] == [name.strip().casefold() for name in other]


def has_regions(labels: Labels) -> bool:
    """nnU-Net's own test: any label that lists more than one value."""
    return any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values())


def foreground_values(labels: Labels) -> dict[str, tuple[int, ...]]:
    """Label name -> its values, without background and ignore, in the order of `labels`."""
    values = {name: tuple(map(int, value if isinstance(value, Sequence) else [value]))
              for name, value in labels.items() if name != "ignore"}
    return {name: value for name, value in values.items() if set(value) != {0}}


def task_labels(classes: Mapping[str, Sequence[str]], parent_labels: Labels,
                parent_regions_class_order: Sequence[int] | None = None, regions: bool = False) -> TaskLabels:
    """Labels of a task with these classes (class name -> the parent's label names).

    Disjoint classes of plain labels become the labels 1..C in their order, unless `regions` are asked for. These,
    classes of a region dataset, and classes that overlap, become regions: voxels are labelled 1..A by which of the
    classes they belong to, and each class lists the labels it consists of. The ignore label is carried over as the
    highest value.

    Regions keep the parent's order and `regions_class_order` where each is a region of the parent. Otherwise they are
    ordered large to small (by their number of parent labels), and each writes a label that no smaller one has.

    Raises TransplantError for two classes of the same labels, a region that holds background and labels that the parent
    does not have.
    """
    values = foreground_values(parent_labels)
    unknown = [label for labels in classes.values() for label in labels if label not in values]
    if unknown:
        raise TransplantError(f"there is no label '{unknown[0]}' to make a class of")
    members = {name: frozenset(value for label in labels for value in values[label])
               for name, labels in classes.items()}
    for name, member in members.items():
        same = [other for other in members if members[other] == member and other != name]
        if same:
            raise TransplantError(f"the classes '{name}' and '{same[0]}' are the same voxels")
        if 0 in member:
            raise TransplantError(f"the class '{name}' contains background (label value 0): not supported")
    parent_values = sorted({value for label_values in values.values() for value in label_values})
    overlap = sum(len(member) for member in members.values()) > len(frozenset().union(*members.values()))
    value_map = {0: 0}
    order: list[int] | None = None
    labels: dict[str, Any] = {"background": 0}  # int or list[int]
    if regions or has_regions(parent_labels) or overlap:
        names, writers = _region_order(classes, members, parent_labels, parent_regions_class_order)
        atoms: dict[tuple[bool, ...], int] = {}
        for value in parent_values:
            membership = tuple(value in members[name] for name in names)
            value_map[value] = atoms.setdefault(membership, len(atoms) + 1) if any(membership) else 0
        order = [value_map[writer] for writer in writers]
        labels.update({name: [atom for membership, atom in atoms.items() if membership[i]]
                       for i, name in enumerate(names)})
        highest = len(atoms)
        if not has_regions(labels):
            # nnU-Net trains regions only where one lists several values: a value that no voxel has keeps it so
            highest += 1
            labels[names[0]].append(highest)
    else:
        labels.update({name: i for i, name in enumerate(members, 1)})
        value_map.update({value: next((i for i, member in enumerate(members.values(), 1) if value in member), 0)
                          for value in parent_values})
        highest = len(members)
    if "ignore" in parent_labels:
        labels["ignore"] = value_map[int(parent_labels["ignore"])] = highest + 1
    return TaskLabels(labels, order, value_map)


def _region_order(classes: Mapping[str, Sequence[str]], members: Mapping[str, frozenset[int]], parent_labels: Labels,
                  parent_order: Sequence[int] | None) -> tuple[list[str], list[int]]:
    """Class names in the order nnU-Net writes them, and for each the parent value that stands for it.

    nnU-Net writes region after region, later ones over earlier ones."""
    regions = list(foreground_values(parent_labels))
    if not all(len(parts) == 1 for parts in classes.values()):
        parent_order = None
    if parent_order is not None:
        names = sorted(classes, key=lambda name: regions.index(classes[name][0]))
    else:
        names = sorted(classes, key=lambda name: -len(members[name]))
    writers = []
    for i, name in enumerate(names):
        writer = None if parent_order is None else parent_order[regions.index(classes[name][0])]
        if writer not in members[name]:
            own = members[name].difference(*(members[smaller] for smaller in names[i + 1:]))
            writer = min(own or members[name])
        writers.append(writer)
    return names, writers
