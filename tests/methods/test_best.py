"""The one model that agrees best with all, against the Dice of its labels, written out."""
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import base_network, write_model, write_volumes
from permuted import LABELS
from teaching import opened, write_same

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging import merge
from nnunet_transplant.methods.best import best
from nnunet_transplant.vectors import TaskVectors


def test_it_is_the_model_of_most_dice_with_the_ensemble(tmp_path: Path) -> None:
    experts = opened(write_same(tmp_path))
    images = torch.stack([patch.image for patch in experts.patches])
    said = torch.stack([experts.network(model)(images) for model in range(3)])
    ensemble = said.mean(0).argmax(1)
    dice = [np.mean([float(2 * ((labels == row) & (ensemble == row)).sum()
                           / ((labels == row).sum() + (ensemble == row).sum())) for row in range(1, len(LABELS))])
            for labels in said.argmax(2)]
    names = experts.models[0].layout.body
    vectors = TaskVectors(None, [{name: tensors[name] for name in names} for tensors in experts.tensors], [1 / 3] * 3)
    made = best(vectors, experts)
    assert made.found["agreement"] == pytest.approx(dice, abs=1e-5)
    chosen = int(np.argmax(dice))
    assert made.found["weights"] == [float(model == chosen) for model in range(3)]
    assert all(torch.equal(made.result(vectors.block(name)), experts.tensors[chosen][name]) for name in names)


@pytest.fixture
def volumes(tmp_path: Path, nnunet_folders: None) -> str:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, shape=(16, 16, 16))
    return "501"


def test_the_merged_model_is_that_model_with_its_head(tmp_path: Path, volumes: str) -> None:
    """Whatever base it records."""
    labels = {"background": 0, "A": 1, "B": 2}
    folders = [write_model(tmp_path / str(seed), labels, seed=seed, base=base_network(seed=seed)) for seed in range(2)]
    merged = merge(folders, method="best", images=volumes, n_patches=2, device="cpu")
    model, = merged.models.values()
    chosen = folders[model.provenance["found"]["weights"].index(1.0)]
    trained = torch.load(chosen / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(model.state_dict[name], tensor) for name, tensor in trained.items())
    assert not model.notes or "disagrees" in model.notes[0]


def test_there_is_nothing_to_weigh(tmp_path: Path, volumes: str) -> None:
    folders = [write_model(tmp_path / str(seed), LABELS, seed=seed) for seed in range(2)]
    with pytest.raises(TransplantError, match="-weights say nothing to this method"):
        merge(folders, method="best", images=volumes, weights=[0.2, 0.8])
    with pytest.raises(TransplantError, match="best merges nothing"):
        merge(folders, method="best", images=volumes, stage_weights=[1, 0])
