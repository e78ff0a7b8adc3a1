"""Structures found by name: what of a model is scored against which labels of a dataset."""
from types import SimpleNamespace

import pytest

from nnunet_transplant.data.cases import Cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.targets import match_structures, name_targets, reference_key, unique_key

ORGANS = {"background": 0, "liver": 1, "left_kidney": 2, "right_kidney": 3, "spleen": 4}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "edge": [1]}


def model(labels: dict, classes: dict | None = None) -> SimpleNamespace:
    """As much of a model as its labels need; classes as a task dataset or a merge records them."""
    content = {"labels": labels} | ({} if classes is None else {"nnunet_transplant": {"classes": classes}})
    return SimpleNamespace(dataset_json=content)


def cases(labels: dict, classes: dict | None = None) -> Cases:
    return Cases("Dataset001_Test", model(labels, classes).dataset_json, {})


@pytest.mark.parametrize(("classes", "labels", "key"), [
    ({"Liver": ["liver"]}, ["liver"], 1),
    ({"Kidney": ["right_kidney", "left_kidney"]}, ["left_kidney", "right_kidney"], (2, 3)),
    ({"spleen": ["Milz"]}, ["spleen"], 4),  # of a dataset with names of its own: the structure's name
    ({"liver": ["liver", "spleen"]}, ["liver", "spleen"], (1, 4)),  # what it consists of, whatever its name
    (None, None, None),
])
def test_structures_are_found_by_origin_then_name(classes: dict | None, labels: list, key: object) -> None:
    structure = next(iter(classes or {"Heart": []}))
    matches, unknown = match_structures(model({"background": 0, structure: 1}, classes), cases(ORGANS))
    assert matches == ({structure: labels} if classes else {})
    assert unknown == ([] if classes else ["Heart"])
    if classes:
        assert reference_key(labels, {"labels": ORGANS}) == key


def test_half_a_structure_is_not_the_structure() -> None:
    task = model({"background": 0, "Both": 1}, {"Both": ["liver", "gallbladder"]})
    assert match_structures(task, cases(ORGANS)) == ({}, ["Both"])


def test_a_task_dataset_can_be_the_reference() -> None:
    reference = cases({"background": 0, "Kidney": 1, "spleen": 2, "ignore": 3},
                      {"Kidney": ["left_kidney", "right_kidney"], "spleen": ["spleen"]})
    merged = model({"background": 0, "Niere": 1, "Kidney": 2, "Both": 3, "spleen": 4},
                   {"Niere": ["right_kidney", "left_kidney"], "Kidney": ["left_kidney"],
                    "Both": ["left_kidney", "right_kidney", "spleen"]})
    matches, unknown = match_structures(merged, reference)
    assert matches == {"Niere": ["Kidney"], "Both": ["Kidney", "spleen"], "spleen": ["spleen"]}
    assert unknown == ["Kidney"]  # the dataset's Kidney is both, the model's the left one


@pytest.mark.parametrize(("labels", "key"), [
    (["whole"], (1, 2, 3)), (["core"], (2, 3)), (["enhancing"], 3), (["edge"], (1,)),
    (["edge", "core"], (1, 2, 3)), (["enhancing", "edge"], (1, 3)), (["core", "enhancing"], (2, 3)),
])
def test_keys_are_written_as_nnunet_writes_them(labels: list[str], key: object) -> None:
    assert reference_key(labels, {"labels": REGIONS}) == key


def test_a_list_of_one_label_is_a_label_without_regions() -> None:
    assert reference_key(["one"], {"labels": {"background": 0, "one": [1]}}) == 1


def test_unique_keys_stay_what_nnunet_reads() -> None:
    keys: list = []
    for key in (1, 1, (2, 3), 1, (2, 3)):
        keys.append(unique_key(key, keys))
    assert keys == [1, (1, 1), (2, 3), (1, 1, 1), (2, 3, 2)]


def test_rows_are_shared_by_what_is_scored_against_the_same_labels() -> None:
    base = model(ORGANS)
    liver = model({"background": 0, "Liver": 1}, {"Liver": ["liver"]})
    kidneys = model({"background": 0, "Kidney": 1, "Heart": 2}, {"Kidney": ["left_kidney", "right_kidney"]})
    other = model({"background": 0, "Kidney": 1, "Nieren": 2, "Leber": 3, "liver": 4},
                  {"Kidney": ["left_kidney", "spleen"], "Nieren": ["right_kidney", "left_kidney"], "Leber": ["liver"]})
    targets, notes = name_targets(["base", "a", "b", "c"], [[base], [liver], [kidneys], [other]], cases(ORGANS))
    assert [[(t.structure, t.row, t.key) for t in of_model] for of_model in targets] == [
        [("liver", "liver", 1), ("left_kidney", "left_kidney", 2), ("right_kidney", "right_kidney", 3),
         ("spleen", "spleen", 4)],
        [("Liver", "liver", 1)],
        [("Kidney", "Kidney", (2, 3))],
        [("Kidney", "left_kidney+spleen", (2, 4)), ("Nieren", "Kidney", (2, 3)), ("Leber", "liver", 1),
         ("liver", "liver (liver)", (1, 1))]]
    assert [t.prediction for t in targets[3]] == [(1,), (2,), (3,), (4,)]
    assert notes == ["note: Heart of b not scored: Dataset001_Test has no such label"]
    with pytest.raises(TransplantError, match="x has no structure of Dataset001_Test: it has Heart, the dataset liver"):
        name_targets(["x"], [[model({"background": 0, "Heart": 1})]], cases(ORGANS))
