"""What a merge kept of its experts, voxel by voxel, and where it is said."""
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import base_network, write_model, write_volumes
from teaching import PLANS, REGIONS, mean_of, opened, write_same, write_tasks

from nnunet_transplant.check import BASE, MERGED, Check, agreement, check, table_of
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.head import head
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Volumes


def plain_agreement(experts: Experts, merged: dict[str, torch.Tensor], names: dict[str, list[tuple[int, int]]],
                    rows: dict[str, int]) -> dict[str, float | None]:
    """names: structure -> the models that know it, and its row there. rows: of the merged model's head."""
    def masks(network: torch.nn.Module, row: int) -> np.ndarray:
        said = []
        for patch in experts.patches:
            with torch.no_grad():
                logits = network(patch.image[None])[0].numpy()
            said.append(logits[row] > 0 if experts.regions else logits.argmax(0) == row)
        return np.stack(said)
    found = {}
    for name, owners in names.items():
        mine = np.stack([masks(experts.merged_network(merged), rows[name]) for _ in owners])
        theirs = np.stack([masks(experts.network(model), row) for model, row in owners])
        sizes = mine.sum() + theirs.sum()
        found[name] = 2 * (mine & theirs).sum() / sizes if sizes else None
    return found


def test_agreement_of_tasks_counts_each_structure_beside_its_owners(tmp_path: Path) -> None:
    experts = opened(write_tasks(tmp_path), patches=4)
    merged = mean_of(experts)
    names = {"Liver": [(0, 1), (1, 2)], "Spleen": [(0, 2)], "Kidney": [(1, 1)]}
    rows = {"Liver": 1, "Spleen": 2, "Kidney": 3}
    found = agreement(experts, {"it": merged})["it"]
    expected = plain_agreement(experts, merged, names, rows)
    assert found == pytest.approx(expected) and any(0 < (dice or 0) < 1 for dice in found.values())


def test_agreement_of_regions_and_of_folds(tmp_path: Path) -> None:
    regions = opened([write_model(tmp_path / f"r{seed}", REGIONS, [1, 2], plans=PLANS, seed=seed) for seed in range(2)],
                     patches=3)
    merged = mean_of(regions)
    found = agreement(regions, {"it": merged})["it"]
    assert found == pytest.approx(plain_agreement(
        regions, merged, {"whole": [(0, 0), (1, 0)], "core": [(0, 1), (1, 1)]}, {"whole": 0, "core": 1}))
    alone = opened(write_same(tmp_path)[:1])
    assert set(agreement(alone, {"it": mean_of(alone)})["it"].values()) <= {1.0, None}  # a model agrees with itself


def test_the_base_has_heads_fitted_as_the_merge_and_held_back_patches_are_not_learned_from(tmp_path: Path) -> None:
    experts = opened(write_tasks(tmp_path), patches=4)
    merged = mean_of(experts)
    base = {name: experts.tensors[0][name] + 0.1 for name in experts.models[0].layout.body}
    held_back = opened(write_tasks(tmp_path / "again"), patches=6).patches[4:]
    found = check(experts, held_back, merged, {BASE: base})
    assert (found.patches, found.held_back) == (2, True)
    seen = Experts(experts.models, experts.tensors, experts.joined, experts.trainer, held_back)
    fitted = head(merged | base, experts)
    assert found.agreement == agreement(seen, {MERGED: merged, BASE: fitted})
    assert check(experts, [], merged, {}).agreement == agreement(experts, {MERGED: merged})
    assert check(experts, [], merged, {}).held_back is False


def test_little_agreement_is_a_warning_and_a_table_has_all() -> None:
    found = Check({MERGED: {"Liver": 0.95, "Spleen": 0.5, "Kidney": None},
                   BASE: {"Liver": 0.9, "Spleen": 0.25, "Kidney": None}}, 8, True)
    (note,) = found.notes()
    assert "about Spleen (0.50):" in note and "Liver" not in note and "Kidney" not in note
    assert not Check({MERGED: {"Liver": 0.95}}, 8, True).notes()
    (many,) = Check({MERGED: {f"s{i}": i / 10 for i in range(10)}}, 8, True).notes()
    assert "about s0 (0.00), s1 (0.10), s2 (0.20), s3 (0.30), s4 (0.40) and 4 more:" in many  # s9 is enough
    assert table_of(found.agreement).splitlines() == [
        "        merged  base, head fitted", "Liver    0.950              0.900",
        "Spleen   0.500              0.250", "Kidney       -                  -"]


def test_merges_with_volumes_are_checked(tmp_path: Path, nnunet_folders: None) -> None:
    """In merge.json; a merge that looked at everything is checked on that."""
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, shape=(32, 40, 32))
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=seed, step=0.2)
              for seed, name in enumerate("AB")]
    groups = [open_models(model) for model in models]
    few = Merger(groups, Recipe(fit=["head"], volumes=Volumes([501], 2, n_patches=3))).checked().provenance
    assert few["check"]["held_back"] and few["check"]["patches"] == 8
    assert set(few["check"]["agreement"]) == {MERGED, BASE} and set(few["check"]["agreement"][BASE]) == {"A", "B"}
    every = Merger(groups, Recipe(fit=["head"], volumes=Volumes([501], 2, n_patches=99))).checked().provenance
    assert not every["check"]["held_back"]
    assert "check" not in Merger(groups, Recipe()).checked().provenance
