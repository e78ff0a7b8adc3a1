"""Labels of merged models, and what nnU-Net makes of them."""
from pathlib import Path

import pytest
import torch
from factory import write_model
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import join, join_head, origin, scaled_to_one, structures
from nnunet_transplant.labels import task_labels
from nnunet_transplant.model_folder import TrainedModel, open_models


def model(tmp_path: Path, labels: dict, order: list[int] | None = None, **dataset: object) -> TrainedModel:
    folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
    return open_models(write_model(folder, labels, order, **dataset))[0]


def test_rows_are_nnunets_channels(tmp_path: Path) -> None:
    plain = model(tmp_path, {"background": 0, "b": 2, "a": 1, "ignore": 3})
    assert structures(plain) == {"b": 2, "a": 1}  # channel i of a softmax head is label i
    regions = model(tmp_path, {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    assert structures(regions) == {"whole": 0, "core": 1}
    assert regions.labels.num_segmentation_heads == 2


def test_origin(tmp_path: Path) -> None:
    task = model(tmp_path, {"background": 0, "kidney": 1}, nnunet_transplant={"classes": {"kidney": ["l", "r"]}})
    assert origin(task.dataset_json, "kidney") == ["l", "r"]
    assert origin({"labels": {"background": 0, "kidney": 1}}, "kidney") == ["kidney"]


def test_joined_labels_in_the_order_of_the_models(tmp_path: Path) -> None:
    joined = join([model(tmp_path, {"background": 0, "x": 1, "y": 2}),
                   model(tmp_path, {"background": 0, "y": 1, "z": 2, "ignore": 3})], [0.5, 0.5])
    assert joined.fields["labels"] == {"background": 0, "x": 1, "y": 2, "z": 3, "ignore": 4}
    assert joined.rows == [[(0, 1)], [(0, 2), (1, 1)], [(1, 2)]]
    assert LabelManager(joined.fields["labels"], None).num_segmentation_heads == 4


def test_regions_without_a_common_parent_lie_side_by_side(tmp_path: Path) -> None:
    tumour = model(tmp_path, {"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    organs = model(tmp_path, {"background": 0, "organs": [1, 2, 3], "liver": 3}, [1, 3])
    joined = join([tumour, organs], [0.5, 0.5])
    labels, order = joined.fields["labels"], joined.fields["regions_class_order"]
    manager = LabelManager(labels, order)
    assert manager.has_regions and len(order) == 4
    sets = {name: set(value) for name, value in labels.items() if name != "background"}
    assert sets["core"] < sets["whole"] and sets["liver"] < sets["organs"] and not sets["whole"] & sets["organs"]
    names = list(sets)
    assert joined.rows == [[{"whole": (0, 0), "core": (0, 1), "organs": (1, 0), "liver": (1, 1)}[name]]
                           for name in names]
    written = dict(zip(names, order, strict=True))
    for inner, outer in (("core", "whole"), ("liver", "organs")):  # the inner one is written over the outer one
        assert names.index(outer) < names.index(inner)
        assert written[outer] not in sets[inner] and written[inner] in sets[inner]


def region_tasks(tmp_path: Path) -> list[TrainedModel]:
    """Of a dataset of plain labels, by split_tasks --regions."""
    parent = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}
    tasks = [("liver",), ("spleen", "kidney")]
    made = [task_labels({name: [name] for name in names}, parent, regions=True) for names in tasks]
    return [model(tmp_path, each.labels, each.regions_class_order, nnunet_transplant={
        "parent": "Dataset001_P", "parent_labels": parent, "classes": {name: [name] for name in names}})
        for names, each in zip(tasks, made, strict=True)]


def test_regions_of_plain_labels_become_plain_labels_again(tmp_path: Path) -> None:
    """The best-scoring structure, and background where none is positive: U-Net Transplant's rule."""
    tasks = region_tasks(tmp_path)
    joined = join(tasks, [0.5, 0.5])
    assert joined.fields["labels"] == {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}
    assert joined.fields["regions_class_order"] is None and joined.softmax
    heads = [torch.randn(1, 4), torch.randn(2, 4)]
    features = torch.randn(4, 50)
    scores = torch.cat([head @ features for head in heads])
    best = torch.where(scores.amax(0) > 0, scores.argmax(0) + 1, 0)
    assert torch.equal((join_head(heads, [0.5, 0.5], joined) @ features).argmax(0), best)
    swapped = join(tasks[::-1], [0.5, 0.5])
    assert swapped.fields["labels"] == {"background": 0, "spleen": 1, "kidney": 2, "liver": 3}


def test_same_labels_keep_their_dataset_json(tmp_path: Path) -> None:
    one, other = (model(tmp_path, {"background": 0, "whole": [1, 2], "core": 2}, [1, 2]) for _ in range(2))
    joined = join([one, other], [0.5, 0.5])
    assert joined.rows is None
    assert joined.fields["labels"] == one.dataset_json["labels"]
    assert joined.fields["regions_class_order"] == [1, 2]


def test_one_name_for_two_things_is_refused(tmp_path: Path) -> None:
    clash = [model(tmp_path, {"background": 0, "k": 1}, nnunet_transplant={"classes": {"k": parts}})
             for parts in (["left"], ["left", "right"])]
    with pytest.raises(TransplantError, match=r"'k' is left in .* but left\+right in"):
        join(clash, [0.5, 0.5])


@pytest.mark.parametrize(("weights", "expected"), [([1, 3], [0.25, 0.75]), ([0.5, 0.5], [0.5, 0.5]),
                                                   ([1, -1], [0.5, 0.5]), ([2], [1.0])])
def test_scaled_to_one(weights: list[float], expected: list[float]) -> None:
    assert scaled_to_one(weights) == expected
