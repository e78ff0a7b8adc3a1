"""Fitting the head: the best of all heads for what the ensemble says."""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factory import write_model
from permuted import LABELS, canonical, network_of, noisy, tensors_of, write
from teaching import PLANS, REGIONS, distribution, loss_of, mean_of, opened, write_tasks
from torch.distributions import kl_divergence

from nnunet_transplant import device
from nnunet_transplant.ensemble import ensemble_logits
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.fitting.head import head, output_layer
from nnunet_transplant.volumes import Patch

HEAD = ("decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias")


@pytest.mark.parametrize("kind", ["folds", "regions"])
def test_a_fitted_head_is_the_best_of_all_heads(tmp_path: Path, kind: str) -> None:
    """Where all voxels are taken, and those that the ensemble is not sure of once more: the gradient of the mean
    divergence and of the Dice of all voxels by the head vanishes, and nothing but the head has changed."""
    regions = kind == "regions"
    bias = torch.full((2,), -5.0) if regions else torch.tensor([5.0, 0, 0])  # much is background for sure
    folders = [write_model(tmp_path / str(seed), REGIONS if regions else LABELS, [1, 2] if regions else None, seed=seed,
                           plans=PLANS, change={HEAD[1]: bias, HEAD[0]: 3 * torch.randn(
                               len(bias), 4, 1, 1, generator=torch.Generator().manual_seed(seed))})
               for seed in range(2)]
    experts = opened(folders)
    merged = mean_of(experts)
    fitted = head(merged, experts)
    assert all(torch.equal(fitted[name], merged[name]) for name in merged if name not in HEAD)
    teacher = torch.stack([*ensemble_logits(experts)]).float()
    sure = (teacher.sigmoid() < 0.01).all(1) if regions else teacher.softmax(1)[:, 0] > 0.99
    assert 0.1 < sure.float().mean() < 0.9
    counts = torch.where(sure, 1.0, 2.0)
    images = torch.stack([patch.image for patch in experts.patches])
    shown = [row for row in range(0 if regions else 1, teacher.shape[1])
             if ((teacher[:, row] > 0) if regions else teacher.argmax(1) == row).any()]
    assert shown

    def loss_and_slope(tensors: dict[str, torch.Tensor]) -> tuple[float, float]:
        network = experts.merged_network(tensors).requires_grad_(True)
        said = network(images)
        each = kl_divergence(*(distribution(logits, regions) for logits in (teacher, said)))
        loss = (counts * (each.mean(1) if regions else each)).sum() / counts.sum()
        for row in shown:
            p, q = (logits.sigmoid()[:, row] if regions else logits.softmax(1)[:, row] for logits in (said, teacher))
            loss = loss + 1 - 2 * (counts * p * q).sum() / (counts * (p * p + q * q)).sum()
        loss.backward()
        layer = network.decoder.seg_layers[1]
        return loss.item(), torch.cat([layer.weight.grad.flatten(), layer.bias.grad]).norm().item()
    before, slope = loss_and_slope(merged)
    after, flat = loss_and_slope(fitted)
    assert after < before and flat < 1e-3 * slope
    for seed in range(5):  # no other head near by is better
        other = noisy({name: fitted[name] for name in HEAD}, 0.02, seed)
        assert loss_and_slope(fitted | other)[0] > after
    again = head(merged, opened(folders))
    assert all(torch.equal(fitted[name], again[name]) for name in HEAD)


def test_a_head_that_says_what_the_ensemble_says_stays(tmp_path: Path) -> None:
    experts = opened([write_model(tmp_path / "m", LABELS, plans=PLANS)])
    merged = mean_of(experts)
    fitted = head(merged, experts)
    assert loss_of(experts, fitted, False) < 1e-6
    images = torch.stack([patch.image for patch in experts.patches])
    with torch.no_grad():
        one, other = (experts.merged_network(tensors)(images).softmax(1) for tensors in (merged, fitted))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_tasks_share_a_fitted_head(tmp_path: Path) -> None:
    """A few voxels of each patch help, all of them help more."""
    experts = opened(write_tasks(tmp_path))
    merged = mean_of(experts)
    losses = [loss_of(experts, tensors, False) for tensors in (
        merged, head(merged, experts, positions=64), head(merged, experts))]
    assert losses[2] < losses[1] < losses[0]


def test_the_head_is_the_layer_whose_output_is_the_networks() -> None:
    network = network_of(PLANS)
    network.decoder.deep_supervision = False
    image = torch.randn(1, 1, 16, 16)
    assert output_layer(network, image) is network.decoder.seg_layers[1]
    for hooks in (module._forward_hooks for module in network.modules()):
        assert not hooks
    conv = torch.nn.Conv2d
    for last in (torch.nn.Sigmoid(), conv(2, 2, 3)):
        odd = torch.nn.Sequential(conv(1, 2, 1), last)
        with pytest.raises(TransplantError, match="convolution of single voxels"):
            output_layer(odd, image)


def test_one_patch_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = opened(write_tasks(tmp_path))
    images = experts.images
    counts: list[int] = []

    def counted(patches: Sequence[Patch]) -> torch.Tensor:
        counts.append(len(patches))
        return images(patches)
    monkeypatch.setattr(experts, "images", counted)
    head(mean_of(experts), experts)
    assert set(counts) == {1}


def test_in_half_precision_steps_come_near_to_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The precision of GPUs, by the CPU's autocast."""
    experts = opened(write_tasks(tmp_path))
    merged = mean_of(experts)
    before, expected = loss_of(experts, merged, False), loss_of(experts, head(merged, experts), False)
    monkeypatch.setattr(device, "FORWARD", {"cpu": torch.float16})
    monkeypatch.setattr(device, "GRADIENTS", {"cpu": torch.bfloat16})
    found = head(merged, replace(experts))  # which has seen nothing yet
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert loss_of(experts, found, False) < expected + 0.02 * (before - expected)


def test_a_fitted_head_keeps_its_type(tmp_path: Path) -> None:
    tensors = [{name: tensor.half() for name, tensor in tensors_of(network_of(PLANS, seed=seed),
                                                                   canonical(PLANS)).items()} for seed in range(2)]
    folders = [write(tmp_path / str(i), PLANS, each) for i, each in enumerate(tensors)]
    experts = opened(folders)
    fitted = head(mean_of(experts), experts)
    assert all(tensor.dtype == torch.float16 for tensor in fitted.values())
