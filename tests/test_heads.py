"""Labels of merged models, and what nnU-Net makes of them."""
from pathlib import Path

import pytest
from factory import write_model
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import join, origin, scaled_to_one, structures
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
