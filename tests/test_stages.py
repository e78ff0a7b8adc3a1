"""Tensors and stages held back at theta_0."""
from pathlib import Path

import pytest
import torch
from factory import base_network, small_plans, write_model

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import MergedModel
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.methods import METHODS
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.stages import stage_of


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root, base = tmp_path_factory.mktemp("models"), base_network()
    return [write_model(root / name, {"background": 0, name: 1}, base=base, seed=i) for i, name in enumerate("AB")]


def merged(models: list[Path], **options: object) -> MergedModel:
    return merge_folders(models, recipe=Recipe(**options))["all"]


def test_stages_of_nnunets_names() -> None:
    assert stage_of("decoder.encoder.stages.2.0.convs.0.all_modules.0.weight") == ("encoder", 2)
    assert stage_of("encoder.stem.convs.0.conv.bias") == ("encoder", 0)
    assert stage_of("decoder.stages.1.convs.0.norm.weight") == ("decoder", 1)
    assert stage_of("decoder.transpconvs.0.weight") == ("decoder", 0)
    assert stage_of("mask_tokens") is None


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.looks])
def test_kept_tensors_are_theta_0_and_the_others_as_before(models: list[Path], method: str) -> None:
    theta_0 = open_models(models[0])[0].theta_0()
    plain, kept = merged(models, method=method), merged(models, method=method, keep_base_for=["encoder.*.norm.*"])
    layout = open_models(models[0])[0].layout
    changed = 0
    for name, tensor in kept.state_dict.items():
        canonical = layout.canonical[name]
        aliases = [other for other in layout.shapes if layout.canonical[other] == canonical]
        if any(alias.startswith("encoder.") and ".norm." in alias for alias in aliases):
            assert torch.equal(tensor, theta_0[canonical])
            changed += not torch.equal(tensor, plain.state_dict[name])
        else:
            assert torch.equal(tensor, plain.state_dict[name])
    assert changed


def test_stage_weights_scale_the_merged_task_vector_of_their_stage(models: list[Path]) -> None:
    theta_0 = open_models(models[0])[0].theta_0()
    plain = merged(models, method="task_arithmetic")
    weights = [0.0, 0.5, 1.0, 2.0, 0.25]  # three stages down, two up
    scaled = merged(models, method="task_arithmetic", stage_weights=weights)
    order = [("encoder", 0), ("encoder", 1), ("encoder", 2), ("decoder", 0), ("decoder", 1)]
    for name, base in theta_0.items():
        expected = base + weights[order.index(stage_of(name))] * (plain.state_dict[name] - base)
        torch.testing.assert_close(scaled.state_dict[name], expected, rtol=1e-5, atol=1e-6)
    head = "decoder.seg_layers.1.weight"
    assert torch.equal(scaled.state_dict[head], plain.state_dict[head])
    assert scaled.provenance["recipe"]["stage_weights"] == weights


def test_all_stages_at_one_change_nothing_and_at_zero_give_the_base(models: list[Path]) -> None:
    plain, ones = merged(models), merged(models, stage_weights=[1.0] * 5)
    assert all(torch.equal(tensor, ones.state_dict[name]) for name, tensor in plain.state_dict.items())
    zeros = merged(models, stage_weights=[0.0] * 5)
    theta_0 = open_models(models[0])[0].theta_0()
    assert all(torch.equal(zeros.state_dict[name], tensor) for name, tensor in theta_0.items())


@pytest.mark.parametrize(("options", "message"), [
    ({"keep_base_for": ["nothing.*"]}, "matches no tensor"),
    ({"keep_base_for": ["*seg_layers*"]}, "matches no tensor outside the heads"),
    ({"stage_weights": [1.0, 1.0]}, "3 stages in the encoder and 2 in the decoder"),
    ({"stage_weights": [1.0, 1.0, 1.0, 1.0, float("nan")]}, "between -10 and 10"),
])
def test_what_does_not_fit_is_refused(models: list[Path], options: dict, message: str) -> None:
    with pytest.raises(TransplantError, match=message):
        merged(models, **options)


def test_a_base_is_needed(tmp_path: Path) -> None:
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, record_base=False) for name in "AB"]
    with pytest.raises(TransplantError, match="-keep_base_for and -stage_weights need theta_0"):
        merged(models, stage_weights=[1.0] * 5)


def test_residual_and_2d_networks_have_stages(tmp_path: Path) -> None:
    for dim in (2, 3):
        plans = small_plans(dim, residual=True)
        base = base_network(plans=plans)
        model = write_model(tmp_path / str(dim), {"background": 0, "A": 1}, base=base, plans=plans)
        zeros = merged([model], stage_weights=[0.0] * 5)
        assert all(torch.equal(zeros.state_dict[name], tensor)
                   for name, tensor in open_models(model)[0].theta_0().items())
