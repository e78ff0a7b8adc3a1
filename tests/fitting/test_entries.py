"""Coefficients of entries, against Adam's steps of all of them, written out."""
from pathlib import Path

import pytest
import torch
from factory import dataset_json, random_network, small_plans, write_model, write_volumes
from teaching import PLANS, REGIONS, loss_of, mean_of, opened, write_same, write_tasks
from torch.func import functional_call

from nnunet_transplant.architecture import canonical_names
from nnunet_transplant.ensemble import Teacher
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.descent import batches, distance
from nnunet_transplant.fitting.entries import HEAD_LR, entries
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.vectors import TaskVectors
from nnunet_transplant.volumes import Volumes


def vectors_of(experts: Experts, step: float = 0.1) -> TaskVectors:
    """The body beside a base that is somewhere near; of one tensor all are at the base."""
    body = experts.models[0].layout.body
    generator = torch.Generator().manual_seed(3)
    base = {name: experts.tensors[0][name] + step * torch.randn(experts.tensors[0][name].shape, generator=generator)
            for name in body}
    base[body[0]] = experts.tensors[0][body[0]].clone()
    thetas = [{name: base[name].clone() if name == body[0] else tensors[name] for name in body}
              for tensors in experts.tensors]
    return TaskVectors(base, thetas, [1 / len(thetas)] * len(thetas))


def plain_entries(merged: dict[str, torch.Tensor], experts: Experts, vectors: TaskVectors, steps: int,
                  lr: float) -> dict[str, torch.Tensor]:
    """theta = merged + sum_t (lambda_t - lambda_t at the start) tau_t, all lambda_t by Adam, nothing shared. Their step
    is such that weights move by lr, on average."""
    network, teacher = experts.merged_network(merged), Teacher(experts, 0)
    canonical = canonical_names(network)
    taus = {name: torch.stack(vectors.block(name).taus) for name in vectors.names}
    moved = {name: torch.zeros_like(tau).requires_grad_() for name, tau in taus.items()}
    heads = {name: merged[name].clone().requires_grad_() for name in experts.models[0].layout.heads}
    reach = torch.cat([sum(tau.abs() for tau in each).flatten() for each in taus.values()]).mean()
    optimizer = torch.optim.Adam([{"params": list(moved.values()), "lr": lr / float(reach)},
                                  {"params": list(heads.values()), "lr": HEAD_LR}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def now() -> dict[str, torch.Tensor]:
        return heads | {name: merged[name] + (moved[name] * taus[name]).sum(0) for name in taus}
    for chosen in batches(len(experts.patches), experts.configuration.batch_size, steps, 0):
        patches = [experts.patches[index] for index in chosen]
        tensors = now()
        logits = functional_call(network, {name: tensors[canonical[name]] for name in network.state_dict()},
                                 (experts.images(patches),))
        optimizer.zero_grad()
        distance(logits, teacher(patches).float(), experts.regions).backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in now().items()}


@pytest.mark.parametrize("kind", ["folds", "tasks", "regions"])
def test_one_number_for_each_entry_is_adam_of_all_coefficients(tmp_path: Path, kind: str) -> None:
    folders = {"folds": write_same, "tasks": write_tasks, "regions": lambda folder: [
        write_model(folder / f"r{seed}", REGIONS, [1, 2], plans=PLANS, seed=seed) for seed in range(2)]}[kind](tmp_path)
    experts = opened(folders)
    vectors = vectors_of(experts)
    merged = mean_of(experts)
    kept = {name: tensor.clone() for name, tensor in merged.items()}
    found, expected = (function(merged, experts, vectors, 3, 0.007) for function in (entries, plain_entries))
    assert all(torch.equal(merged[name], tensor) for name, tensor in kept.items())  # itself stays
    images = experts.images(experts.patches)
    with torch.no_grad():  # weights say less: where a gradient is 0 but for rounding, a step is a matter of chance
        start, one, other = (experts.merged_network(tensors)(images) for tensors in (merged, found, expected))
    assert float((one - other).norm()) < 0.02 * float((start - other).norm())
    still = experts.models[0].layout.body[0]
    assert torch.equal(found[still], merged[still])  # no expert moved it


@pytest.mark.parametrize("kind", ["folds", "tasks"])
def test_entries_bring_the_merged_model_nearer_to_the_ensemble(tmp_path: Path, kind: str) -> None:
    experts = opened({"folds": write_same, "tasks": write_tasks}[kind](tmp_path))
    merged, vectors = mean_of(experts), vectors_of(experts)
    fitted = entries(merged, experts, vectors, 20, 7e-3)
    assert loss_of(experts, fitted, False) < 0.8 * loss_of(experts, merged, False)
    again = entries(merged, experts, vectors, 20, 7e-3)
    assert all(torch.equal(fitted[name], again[name]) for name in fitted)
    assert set(fitted) == set(merged)


def test_the_rate_is_the_mean_step_of_a_weight(tmp_path: Path) -> None:
    """Whatever the size of the task vectors: Adam's first step is its rate, times an entry's share."""
    experts = opened(write_tasks(tmp_path))
    merged = mean_of(experts)
    for size in (1e-3, 0.1):
        vectors = vectors_of(experts, size)
        reach = {name: sum(tau.abs() for tau in vectors.block(name).taus) for name in vectors.names}
        mean = torch.cat([tensor.flatten() for tensor in reach.values()]).mean()
        moved = entries(merged, experts, vectors, 1, 1e-3)
        last = experts.models[0].layout.body[-1]  # of the decoder, where gradients are far from 0
        torch.testing.assert_close((moved[last] - merged[last]).abs(), 1e-3 * reach[last] / mean, rtol=1e-2, atol=1e-6)


@pytest.fixture
def volumes(tmp_path: Path, nnunet_folders: None) -> Volumes:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2}, shape=(16, 16, 16))
    return Volumes([501], 2)


def test_the_base_itself_can_be_an_expert(tmp_path: Path, volumes: Volumes) -> None:
    """Its task vector is zero, and what it knows is among what is learned: one model with both."""
    base = write_model(tmp_path / "base", {"background": 0, "A": 1}, seed=99)
    network = random_network(small_plans(), dataset_json({"background": 0, "A": 1}), 99)
    task = write_model(tmp_path / "task", {"background": 0, "B": 1}, base=network, seed=1, step=0.1)
    groups = [open_models(folder) for folder in (base, task)]
    merger = Merger(groups, Recipe(fit=["entries"], parameters={"steps": 5}, volumes=volumes))
    vectors = merger._vectors(merger._experts, [0.5, 0.5])
    assert all(not vectors.block(name).taus[0].any() for name in vectors.names)
    assert any(vectors.block(name).taus[1].any() for name in vectors.names)
    merged = merger.checked()
    assert set(merged.dataset_json["labels"]) == {"background", "A", "B"}
    assert set(merged.provenance["check"]["agreement"]["base, head fitted"]) == {"A", "B"}
    assert merged.provenance["recipe"]["parameters"] == {"entries.steps": 5, "entries.lr": 5e-4, "entries.seed": 0}


def test_after_an_alignment_task_vectors_are_differences_to_the_mean(tmp_path: Path, volumes: Volumes) -> None:
    groups = [open_models(write_model(tmp_path / name, {"background": 0, name: 1}, seed=seed))
              for seed, name in enumerate("AB")]
    recipe = Recipe(align="rebasin", fit=["entries"], parameters={"steps": 3}, volumes=volumes)
    merger = Merger(groups, recipe)
    aligned, _ = merger._align(recipe, [0.5, 0.5])
    vectors = merger._vectors(aligned, [0.5, 0.5])
    for name in vectors.names:
        one, other = vectors.block(name).taus
        torch.testing.assert_close(one, -other)
        torch.testing.assert_close(vectors.block(name).thetas[1], aligned.tensors[1][name])
    plain = Merger(groups, Recipe(align="rebasin", volumes=volumes)).tensors()
    found = merger.tensors()
    assert any(not torch.equal(found[name], plain[name]) for name in vectors.names)
