"""Which patches a model is looked at on, and that the loss on them is nnU-Net's."""
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from factory import small_plans, write_model, write_volumes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_transplant.analysis.risk import Risk, draw, open_risk
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.volumes import Volumes, images_of, targets_of

LABELS = {"background": 0, "A": 1, "B": 2}


@pytest.fixture(autouse=True)
def raw(tmp_path: Path, nnunet_folders: None) -> Path:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(20, 18, 22))
    return tmp_path / "raw"


def model(folder: Path, labels: dict | None = None, **plans: object) -> TrainedModel:
    return open_models(write_model(folder, labels or LABELS, plans=small_plans(**plans)))[0]


def trainers_loss(risk: Risk) -> float:
    """The mean over patches of what nnU-Net's own trainer says, with its own deep supervision."""
    opened = risk.model
    plans = copy.deepcopy(opened.plans) | {"continue_training": False}
    trainer = nnUNetTrainer(plans, opened.configuration, 0, opened.dataset_json, torch.device("cpu"))
    loss = trainer._build_loss()
    scales = DownsampleSegForDSTransform(trainer._get_deep_supervision_scales())
    total = []
    for patch in risk.patches:
        target = targets_of([patch], opened.plans, opened.dataset_json, risk.device)
        parts = [part[None] for part in scales.apply({"segmentation": target})["segmentation"]]
        with torch.no_grad():
            total.append(float(loss(risk.network(images_of([patch], risk.device)), parts)))
    return float(np.mean(total))


@pytest.mark.parametrize("dim", [2, 3])
def test_the_loss_is_that_of_nnunets_trainer(tmp_path: Path, dim: int) -> None:
    plans = small_plans(dim=dim, patch=16)
    next(iter(plans["configurations"].values()))["batch_dice"] = False  # or the mean is not one over patches
    opened = open_models(write_model(tmp_path / "model", LABELS, plans=plans))[0]
    risk = open_risk(opened, Volumes([501], 3), patches=4)
    with torch.no_grad():
        each = [float(risk.loss([patch])) for patch in risk.patches]
        together = float(risk.loss(risk.patches))
    assert float(np.mean(each)) == pytest.approx(trainers_loss(risk), rel=1e-5)
    assert together == pytest.approx(float(np.mean(each)), rel=1e-5)  # batches change nothing
    assert risk.mean() == pytest.approx(float(np.mean(each)), rel=1e-5)
    assert np.std(each) > 0


def test_the_lowest_head_takes_no_part(tmp_path: Path) -> None:
    risk = open_risk(model(tmp_path / "model"), Volumes([501], 1), patches=1)
    part = {id(parameter) for parameter in risk.parameters.values()}
    assert {name for name, parameter in risk.network.named_parameters() if id(parameter) not in part} == {
        "decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    assert not risk.network.training


@pytest.mark.parametrize("dim", [2, 3])
def test_patches_are_seeded_and_every_second_has_a_structure(tmp_path: Path, dim: int) -> None:
    opened = model(tmp_path / "model", dim=dim, patch=8)
    volumes = Volumes([501], 3)
    patches = draw(opened, volumes, 12, seed=0)
    assert len(patches) == 12
    for index, patch in enumerate(patches):
        assert patch.image.shape == (1, *[8] * dim) and patch.values.shape == (8,) * dim
        assert index % 2 == 0 or patch.values.max() > 0
    again, other = draw(opened, volumes, 12, seed=0), draw(opened, volumes, 12, seed=1)
    assert all(torch.equal(one.image, two.image) for one, two in zip(patches, again, strict=True))
    assert not all(torch.equal(one.image, two.image) for one, two in zip(patches, other, strict=True))
    fewer = draw(opened, volumes, 5, seed=0)
    assert all(torch.equal(one.image, two.image) for one, two in zip(patches, fewer, strict=False))


def test_only_the_models_structures_are_looked_for(tmp_path: Path) -> None:
    opened = model(tmp_path / "model", {"background": 0, "B": 1}, patch=8)
    patches = draw(opened, Volumes([501], 3), 12, seed=0)
    assert all((patch.values == 2).any() for patch in patches[1::2])


def test_a_patch_is_larger_than_the_volume(tmp_path: Path) -> None:
    patch, = draw(model(tmp_path / "model", patch=32), Volumes([501], 1), 1, seed=0)
    assert patch.image.shape == (1, 32, 32, 32) and int((patch.values > 0).sum()) > 0


def test_what_the_loss_needs_is_refused_by_name(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(TransplantError, match="-n_patches must be at least 1, not 0"):
        open_risk(model(tmp_path / "model"), Volumes([501], 1), patches=0)
    for path in (raw / "Dataset501_Boxes" / "labelsTr").iterdir():
        path.unlink()
    with pytest.raises(TransplantError, match="has cases without labels"):
        open_risk(model(tmp_path / "other"), Volumes([501], 1), patches=1)
