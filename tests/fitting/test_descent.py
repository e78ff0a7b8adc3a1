"""Steps towards the ensemble: what they go down, and how a batch passes."""
from pathlib import Path

import pytest
import torch
from teaching import distribution, mean_of, opened, plain_dice_loss, write_same
from torch.distributions import kl_divergence

from nnunet_transplant.ensemble import Teacher
from nnunet_transplant.fitting.descent import distance, gradients


@pytest.mark.parametrize("regions", [False, True])
def test_the_distance_is_the_divergence_and_three_tenths_of_both_dice_losses(regions: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    student, teacher = (3 * torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    apart = float(kl_divergence(*(distribution(each, regions) for each in (teacher, student))).mean())
    dice = sum(plain_dice_loss(student, teacher, regions, power) for power in (1, 2))
    assert float(distance(student, teacher, regions)) == pytest.approx(apart + 0.3 * dice)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_has_the_same_gradient_however_it_passes(tmp_path: Path, size: int) -> None:
    experts = opened(write_same(tmp_path), patches=5)
    network = experts.merged_network(mean_of(experts)).requires_grad_(True)
    teacher = Teacher(experts, 0)
    images = torch.stack([patch.image for patch in experts.patches])
    distance(network(images), teacher(experts.patches).float(), False).backward()
    expected = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    gradients(experts, network, teacher, experts.patches, size)
    found = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
