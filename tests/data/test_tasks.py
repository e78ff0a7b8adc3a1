"""Parsing and label logic of tasks. The label logic is checked voxel by voxel against its definition and by
nnU-Net's own LabelManager."""

import numpy as np
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_transplant.data.tasks import parse_task, remap_labels
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import foreground_values, has_regions, task_labels

ORGANS = {"background": 0, "liver": 1, "left_kidney": 2, "right_kidney": 3, "spleen": 4, "C1-C7": 5, "2": 6,
          "GTV+CTV": 7, "ignore": 8}
TUMOUR = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
TUMOUR_ORDER = [1, 2, 3]


@pytest.mark.parametrize(("text", "classes"), [
    ("Liver=liver", {"Liver": ["liver"]}),
    ("Liver=1", {"Liver": ["liver"]}),
    ("Kidney=left_kidney,right_kidney", {"Kidney": ["left_kidney", "right_kidney"]}),
    (" Kidney = left_kidney , 3 ", {"Kidney": ["left_kidney", "right_kidney"]}),
    ("Both=liver+spleen", {"liver": ["liver"], "spleen": ["spleen"]}),
    ("Both=1+4", {"liver": ["liver"], "spleen": ["spleen"]}),
    ("Mix=left_kidney,right_kidney+spleen", {"left_kidney,right_kidney": ["left_kidney", "right_kidney"],
                                             "spleen": ["spleen"]}),
    ("Abdomen=3-5", {"Abdomen": ["right_kidney", "spleen", "C1-C7"]}),
    ("Two=3-4,1+7", {"3-4,1": ["right_kidney", "spleen", "liver"], "GTV+CTV": ["GTV+CTV"]}),
    ("Spine=C1-C7", {"Spine": ["C1-C7"]}),  # a label's name, not a range
    ("Named=2", {"Named": ["2"]}),  # a label's name, not a value
    ("Target=GTV+CTV", {"Target": ["GTV+CTV"]}),  # a label's name, not two classes
])
def test_parse_task(text: str, classes: dict[str, list[str]]) -> None:
    task = parse_task(text, ORGANS)
    assert task.name == text.split("=")[0].strip()
    assert task.classes == classes


@pytest.mark.parametrize(("text", "message"), [
    ("Liver", "NAME=LABELS"),
    ("Liver=", "NAME=LABELS"),
    ("=liver", "NAME=LABELS"),
    ("../up=liver", "NAME=LABELS"),
    ("Heart=heart", "no label 'heart'. It has liver \\(1\\)"),
    ("Nine=9", "no label '9'"),
    ("Range=7-9", "ignore label"),
    ("Range=4-1", "write 1-4"),
    ("Gap=liver,,spleen", "no label ''"),
    ("Plus=liver+", "no label ''"),
    ("Twice=liver,1", "liver more than once"),
    ("Twice=1-4,4", "spleen more than once"),
    ("Classes=liver+1", "'liver' is there twice"),
    ("Back=background", "background"),
    ("Back=0-2", "background"),
    ("Ignore=ignore", "ignore label"),
    ("Ignore=8", "ignore label"),
    ("background=liver", "keeps the name 'background'"),
    ("ignore=liver", "keeps the name 'ignore'"),
])
def test_parse_task_refuses(text: str, message: str) -> None:
    with pytest.raises(TransplantError, match=message):
        parse_task(text, ORGANS)


def test_numbers_do_not_name_regions_of_several_values() -> None:
    assert parse_task("Active=3", TUMOUR).classes == {"Active": ["enhancing"]}
    with pytest.raises(TransplantError, match=r"no label '1'. It has whole \(1\+2\+3\)"):
        parse_task("Whole=1", TUMOUR)


def random_parent(rng: np.random.Generator) -> tuple[dict, list[int] | None]:
    """Plain labels or regions, each with or without the ignore label."""
    n = int(rng.integers(2, 7))
    labels: dict[str, int | list[int]] = {"background": 0}
    order = None
    if rng.random() < 0.5:
        labels.update({f"label{value}": value for value in range(1, n + 1)})
    else:
        regions = {tuple(sorted(rng.choice(np.arange(1, n + 1), rng.integers(1, n + 1), replace=False).tolist()))
                   for _ in range(5)} | {tuple(range(1, n + 1))}
        by_size = sorted(regions, key=len, reverse=True)
        labels.update({f"region{'_'.join(map(str, region))}": list(region) for region in by_size})
        order = [int(rng.choice(region)) for region in by_size]
    if rng.random() < 0.5:
        labels["ignore"] = n + 1
    return labels, order


@pytest.mark.parametrize("seed", range(60))
def test_labels_are_what_the_classes_say_for_every_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parent_labels, parent_order = random_parent(rng)
    names = list(foreground_values(parent_labels))
    spec = "+".join(",".join(rng.choice(names, rng.integers(1, len(names) + 1), replace=False))
                    for _ in range(rng.integers(1, 4)))
    try:
        task = parse_task(f"Task={spec}", parent_labels)
        made = task_labels(task.classes, parent_labels, parent_order)
    except TransplantError as error:
        assert "there twice" in str(error) or "the same voxels" in str(error)
        return
    parent_seg = rng.integers(0, max(np.max(v) for v in parent_labels.values()) + 1, (1, 5, 6, 7)).astype(np.float32)
    seg = remap_labels(parent_seg, made.value_map)

    is_class = {}
    for class_name, labels in task.classes.items():
        members = {value for label in labels for value in np.atleast_1d(parent_labels[label])}
        is_class[class_name] = np.array([voxel in members for voxel in parent_seg.ravel()]).reshape(parent_seg.shape)
        assert np.array_equal(np.isin(seg, made.labels[class_name]), is_class[class_name])
    assert np.array_equal(seg == made.labels.get("ignore", -1), parent_seg == parent_labels.get("ignore", -1))
    assert set(made.labels) == {"background", *task.classes, *({"ignore"} & set(parent_labels))}

    manager = LabelManager(made.labels, made.regions_class_order)
    assert manager.all_labels == list(range(len(manager.all_labels)))
    overlap = np.sum(list(is_class.values()), 0).max() > 1
    assert manager.has_regions or not (overlap or has_regions(parent_labels))
    if not has_regions(parent_labels) and sum(map(len, task.classes.values())) == len(
            {label for labels in task.classes.values() for label in labels}):
        assert made.labels == {"background": 0, **{name: i for i, name in enumerate(task.classes, 1)},
                               **({"ignore": len(task.classes) + 1} if "ignore" in parent_labels else {})}
        assert made.regions_class_order is None


def written(made_labels: dict, order: list[int], seg: np.ndarray) -> np.ndarray:
    """The label map that nnU-Net writes when every region is predicted without error."""
    manager = LabelManager(made_labels, order)
    perfect = np.stack([np.isin(seg, region) for region in manager.foreground_regions]).astype(np.float32)
    return np.asarray(manager.convert_probabilities_to_segmentation(perfect))


@pytest.mark.parametrize(("task", "labels", "order"), [
    ("T=core+whole", {"whole": [1, 2], "core": [2]}, [1, 2]),
    ("T=enhancing+whole", {"whole": [1, 2], "enhancing": [2]}, [1, 2]),
    ("T=whole", {"T": [1, 2]}, [1]),  # 2 never occurs: regions need a list of several values somewhere
    ("T=enhancing", {"T": [1, 2]}, [1]),
    ("T=whole+core+enhancing", {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}, [1, 2, 3]),
    ("T=core,enhancing+whole", {"whole": [1, 2], "core,enhancing": [2]}, [1, 2]),
])
def test_nested_regions(task: str, labels: dict, order: list[int]) -> None:
    made = task_labels(parse_task(task, TUMOUR).classes, TUMOUR, TUMOUR_ORDER)
    assert made.labels == {"background": 0, **labels}
    assert list(made.labels) == ["background", *labels]
    assert made.regions_class_order == order
    seg = remap_labels(np.arange(4).reshape(1, 2, 2), made.value_map)[0]
    assert np.array_equal(written(made.labels, made.regions_class_order, seg), seg)


def test_overlapping_classes_of_plain_labels_become_regions_large_to_small() -> None:
    made = task_labels(parse_task("T=left_kidney+left_kidney,right_kidney", ORGANS).classes, ORGANS)
    assert made.labels == {"background": 0, "left_kidney,right_kidney": [1, 2], "left_kidney": [1], "ignore": 3}
    assert list(made.labels)[1] == "left_kidney,right_kidney"
    assert made.regions_class_order == [2, 1]
    seg = remap_labels(np.array([[[0, 1, 2, 3, 4]]]), made.value_map)[0]
    assert np.array_equal(seg, [[0, 0, 1, 2, 0]])
    assert np.array_equal(written(made.labels, made.regions_class_order, seg), seg)


@pytest.mark.parametrize("task", ["T=left_kidney", "T=left_kidney,right_kidney", "T=right_kidney+left_kidney"])
def test_plain_labels_as_regions_where_they_are_asked_for(task: str) -> None:
    classes = parse_task(task, ORGANS).classes
    plain, made = task_labels(classes, ORGANS), task_labels(classes, ORGANS, regions=True)
    assert not has_regions(plain.labels) and has_regions(made.labels)
    manager = LabelManager(made.labels, made.regions_class_order)
    assert manager.num_segmentation_heads == len(classes)  # none for background
    values = np.array([[[0, 1, 2, 3, 4]]])
    seg = remap_labels(values, made.value_map)[0]
    for name, members in classes.items():
        assert np.array_equal(np.isin(seg[0], made.labels[name]), np.isin(values[0, 0], [ORGANS[m] for m in members]))
    assert np.array_equal(written(made.labels, made.regions_class_order, seg), np.where(seg == made.labels["ignore"],
                                                                                       0, seg))


def test_same_voxels_twice_and_background_in_a_region_are_refused() -> None:
    with pytest.raises(TransplantError, match="'whole' and 'whole,core' are the same voxels"):
        task_labels(parse_task("T=whole+whole,core", TUMOUR).classes, TUMOUR, TUMOUR_ORDER)
    odd = {"background": 0, "all": [0, 1], "one": [1]}
    with pytest.raises(TransplantError, match="'T' contains background"):
        task_labels(parse_task("T=all", odd).classes, odd, [0, 1])


@pytest.mark.parametrize(("values", "shown"), [([0, 3], "3"), ([0, 0.5], "0.5"), ([0, -1], "-1")])
def test_remap_refuses_undeclared_values(values: list[float], shown: str) -> None:
    with pytest.raises(TransplantError, match=shown):
        remap_labels(np.array([[values]], np.float32), {0: 0, 1: 1, 2: 0, 5: 2})
