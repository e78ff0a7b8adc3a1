"""Volumes that nnU-Net has preprocessed already, for training, are read as they lie there."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_models import open_model
from factory import write_model, write_planned_phantom
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_transplant.volumes import Patch, Volumes, open_patches

pytestmark = pytest.mark.slow
LABELS = {"background": 0, "Liver": 1}


@pytest.fixture(scope="module")
def plans(nnunet: Path) -> dict:
    name = write_planned_phantom(nnunet, 861)
    plans = json.loads((nnunet / "preprocessed" / name / "nnUNetPlans.json").read_text())
    return plans | {"configurations": {"3d_fullres": plans["configurations"]["3d_fullres"]}}


def read(folder: Path, plans: dict, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Patch], int]:
    """The patches, and how many volumes were preprocessed for them."""
    count = 0
    run_case = DefaultPreprocessor.run_case

    def counted(self: DefaultPreprocessor, *arguments: object) -> object:
        nonlocal count
        count += 1
        return run_case(self, *arguments)
    monkeypatch.setattr(DefaultPreprocessor, "run_case", counted)
    model = open_model(write_model(folder, LABELS, plans=plans, channel_names={"0": "CT"}))
    return open_patches(Volumes(["861"], 2), model), count


def test_they_are_what_preprocessing_gives(nnunet: Path, tmp_path: Path, plans: dict,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    there, count = read(tmp_path / "there", plans, monkeypatch)
    assert count == 0 and len(there) > 2
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nothing"))
    anew, count = read(tmp_path / "anew", plans, monkeypatch)
    assert count == 2
    for one, other in zip(there, anew, strict=True):
        assert torch.equal(one.image, other.image)
        np.testing.assert_array_equal(one.values, other.values)


@pytest.mark.parametrize("change", ["spacing", "statistics", "name", "seg"])
def test_by_other_plans_they_are_preprocessed(nnunet: Path, tmp_path: Path, plans: dict, change: str,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    other = json.loads(json.dumps(plans))
    configuration = other["configurations"]["3d_fullres"]
    if change == "spacing":
        configuration["spacing"] = [1.1 * each for each in configuration["spacing"]]
    elif change == "statistics":
        other["foreground_intensity_properties_per_channel"]["0"]["mean"] += 1
    elif change == "name":
        other["plans_name"] = "nnUNetOtherPlans"
    else:
        configuration["resampling_fn_seg_kwargs"] = {**configuration["resampling_fn_seg_kwargs"], "order": 0}
    assert read(tmp_path / "other", other, monkeypatch)[1] == 2
