"""Polishing: what steps towards the ensemble make of a merged model."""
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from factory import write_model
from permuted import LABELS, canonical, network_of, noisy, tensors_of, write
from teaching import PLANS, REGIONS, loss_of, mean_of, opened, write_same, write_tasks

from nnunet_transplant.ensemble import Teacher
from nnunet_transplant.errors import TransplantError, TransplantNote
from nnunet_transplant.fitting.polish import polish
from nnunet_transplant.volumes import Patch


@pytest.fixture
def same(tmp_path: Path) -> list[Path]:
    return write_same(tmp_path)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    return write_tasks(tmp_path)


@pytest.mark.parametrize("kind", ["folds", "tasks", "regions"])
def test_polishing_brings_the_merged_model_nearer_to_the_ensemble(tmp_path: Path, kind: str, same: list[Path],
                                                                  tasks: list[Path]) -> None:
    folders = {"folds": same, "tasks": tasks, "regions": [
        write_model(tmp_path / f"r{seed}", REGIONS, [1, 2], plans=PLANS, seed=seed) for seed in range(2)]}[kind]
    experts = opened(folders)
    merged = mean_of(experts)
    kept = {name: tensor.clone() for name, tensor in merged.items()}
    before = loss_of(experts, merged, kind == "regions")
    polished = polish(merged, experts, 20, 1e-3)
    assert loss_of(experts, polished, kind == "regions") < 0.8 * before
    assert all(torch.equal(merged[name], kept[name]) for name in kept)  # the merged one itself stays
    assert set(polished) == set(merged)
    again = polish(merged, opened(folders), 20, 1e-3)
    assert all(torch.equal(polished[name], again[name]) for name in polished)
    other = polish(merged, experts, 20, 1e-3, seed=1)
    assert any(not torch.equal(polished[name], other[name]) for name in polished)
    # the lower head is not looked at when a model predicts
    low = "decoder.seg_layers.0.weight"
    assert torch.equal(polished[low], merged[low]) and not torch.equal(polished["decoder.seg_layers.1.weight"],
                                                                       merged["decoder.seg_layers.1.weight"])


def test_polishing_the_ensemble_itself_changes_next_to_nothing(tmp_path: Path) -> None:
    """What is left are the roundings of the ensemble's logits to half precision."""
    folders = [write_model(tmp_path / str(seed), LABELS, plans=PLANS, seed=seed) for seed in range(2)]
    experts = opened(folders[:1])
    merged = mean_of(experts)
    polished = polish(merged, experts, 10, 1e-3)
    other = mean_of(opened(folders[1:]))
    assert loss_of(experts, polished, False) < 1e-3 * loss_of(experts, other, False)
    for name, tensor in merged.items():
        assert float((polished[name] - tensor).abs().max()) < 5.5e-3, name  # ten steps of 0.001 and less, at most


def test_polishing_keeps_types(tmp_path: Path) -> None:
    tensors = [{name: tensor.half() for name, tensor in tensors_of(network_of(PLANS, seed=seed),
                                                                   canonical(PLANS)).items()} for seed in range(2)]
    folders = [write(tmp_path / str(i), PLANS, each) for i, each in enumerate(tensors)]
    experts = opened(folders)
    polished = polish(mean_of(experts), experts, 3, 1e-3)
    assert all(tensor.dtype == torch.float16 for tensor in polished.values())


def test_polishing_goes_on_where_memory_runs_out(same: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer patches at a time, and says the same up to rounding (of which AdamW makes more where a gradient is 0).
    """
    experts = opened(same)
    merged = mean_of(experts)
    before, expected = loss_of(experts, merged, False), loss_of(experts, polish(merged, experts, 5), False)

    def only_one(self: Teacher, patches: Sequence[Patch]) -> torch.Tensor:
        if len(patches) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return said(self, patches)
    said = Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", only_one)
    with pytest.warns(TransplantNote, match="memory ran out on cpu: 1 patches"):
        found = polish(merged, experts, 5)
    monkeypatch.undo()
    assert abs(loss_of(experts, found, False) - expected) < 1e-3 * (before - expected)


def test_polishing_that_diverges_is_refused(same: list[Path]) -> None:
    experts = opened(same)
    with pytest.raises(TransplantError, match="smaller -lr"):
        polish(mean_of(experts), experts, 5, 1e30)


def test_noise_is_polished_away(tmp_path: Path) -> None:
    """A student that is not the merged one but near to a lone teacher comes back to it."""
    experts = opened([write_model(tmp_path / "m", LABELS, plans=PLANS)], patches=4)
    student = noisy(mean_of(experts), 0.1, 6)
    before = loss_of(experts, student, False)
    assert loss_of(experts, polish(student, experts, 40, 3e-3), False) < 0.3 * before
