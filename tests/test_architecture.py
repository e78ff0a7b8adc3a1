"""The tensors of nnU-Net's networks: which are one and the same, which are heads."""
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from factory import dataset_json, small_plans
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_transplant.architecture import (
    bare,
    build_network,
    canonical_names,
    changes_network,
    find_trainer,
    layout,
)
from nnunet_transplant.environment import ext_trainer_value
from nnunet_transplant.errors import TransplantError

LABELS = {"background": 0, "one": 1, "two": 2}
NETWORKS = pytest.mark.parametrize(("dim", "residual"), [(2, False), (2, True), (3, False), (3, True)])


def network_and_plans(dim: int, residual: bool, norm: str | None = None) -> tuple[nn.Module, dict, str]:
    plans = small_plans(dim, residual)
    configuration = next(iter(plans["configurations"]))
    if norm is not None:
        plans["configurations"][configuration]["architecture"]["arch_kwargs"]["norm_op"] = norm
    return build_network(plans, configuration, dataset_json(LABELS)), plans, configuration


@NETWORKS
def test_tied_names_are_the_names_of_one_tensor(dim: int, residual: bool) -> None:
    network, plans, configuration = network_and_plans(dim, residual)
    found = layout(plans, configuration, dataset_json(LABELS))
    state = network.state_dict()
    assert list(found.shapes) == list(state)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == found.shapes
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    assert max(map(len, groups.values())) == 4  # encoder.* and decoder.encoder.*, conv and all_modules.0
    assert found.canonical == {name: names[-1] for names in groups.values() for name in names}
    assert found.canonical == canonical_names(network)
    assert sorted(found.names) == sorted(names[-1] for names in groups.values())
    assert found.names == [name for name in state if name in found.names]


@NETWORKS
def test_the_last_name_is_the_one_that_counts_in_a_state_dict(dim: int, residual: bool) -> None:
    network, plans, configuration = network_and_plans(dim, residual)
    found = layout(plans, configuration, dataset_json(LABELS))
    state = {name: torch.full(shape, float(found.canonical[name] == name)) for name, shape in found.shapes.items()}
    network.load_state_dict(state)
    assert all(bool((p == 1).all()) for p in network.parameters())


@NETWORKS
@pytest.mark.parametrize(("labels", "order"), [
    ({"background": 0, "one": 1}, None), (LABELS, None), ({"background": 0, "all": [1, 2], "two": 2}, [1, 2]),
    ({"background": 0, "one": 1, "ignore": 2}, None)])
def test_heads_are_the_segmentation_layers(dim: int, residual: bool, labels: dict, order: list[int] | None) -> None:
    _, plans, configuration = network_and_plans(dim, residual)
    found = layout(plans, configuration, dataset_json(labels, order))
    assert found.heads == {f"decoder.seg_layers.{i}.{part}" for i in range(2) for part in ("weight", "bias")}
    assert set(found.body) == set(found.names) - found.heads
    assert [name for name in found.names if name not in found.heads] == found.body
    outputs = {True: len(labels) - 1, False: len(labels) - ("ignore" in labels)}[order is not None]
    assert found.shapes["decoder.seg_layers.1.bias"] == (outputs,)


def test_buffers_belong_to_the_body() -> None:
    network, plans, configuration = network_and_plans(3, False, norm="torch.nn.modules.batchnorm.BatchNorm3d")
    found = layout(plans, configuration, dataset_json(LABELS))
    buffers = {canonical_names(network)[name] for name, _ in network.named_buffers()}
    assert len(buffers) == 15  # running mean, running variance and a count for 5 norms
    assert buffers <= set(found.body)


def test_layout_allocates_nothing_and_draws_no_random_numbers() -> None:
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [50_000] * 3  # 67 TB
    before = torch.get_rng_state()
    assert len(layout(plans, "3d_fullres", dataset_json(LABELS)).heads) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_num_heads_and_deep_supervision() -> None:
    plans = small_plans()
    network = build_network(plans, "3d_fullres", dataset_json(LABELS), num_heads=7, deep_supervision=False)
    assert network(torch.zeros(1, 1, 16, 16, 16)).shape == (1, 7, 16, 16, 16)


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_bare_takes_off_what_nnunet_wraps_around(one_process_group: None) -> None:
    network, _, _ = network_and_plans(3, False)
    compiled = torch.compile(network, backend="eager")
    assert list(compiled.state_dict()) != list(network.state_dict())
    for wrapped in (network, compiled, DistributedDataParallel(network), DistributedDataParallel(compiled)):
        assert bare(wrapped) is network
        assert canonical_names(wrapped) == canonical_names(network)


def test_trainers_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", ext_trainer_value())
    assert find_trainer("nnUNetTrainer") is nnUNetTrainer
    assert not changes_network(find_trainer("nnUNetTrainer"))
    for name in ("Stable", "Plastic", "TaskVector"):
        assert not changes_network(find_trainer(f"nnUNetTrainer{name}_3epochs"))
    assert changes_network(find_trainer("nnUNetTrainerBN"))
    with pytest.raises(TransplantError, match="'nnUNetTrainerOfNobody'.*nnUNet_extTrainer"):
        find_trainer("nnUNetTrainerOfNobody")
    assert capsys.readouterr().out == ""
