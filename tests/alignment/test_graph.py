"""Several networks run through one traced graph: what they say, and what is kept of it."""
import weakref

import pytest
import torch
from factory import small_plans
from permuted import canonical, image_of, network_of, plans_of, tensors_of
from torch import nn

from nnunet_transplant.alignment.graph import Run, exported, lowest_head, tensor_names
from nnunet_transplant.errors import TransplantError


def outputs_of(program: object, networks: list[dict[str, torch.Tensor]], image: torch.Tensor) -> list[list]:
    """The outputs of each network, as the network would return them."""
    wanted = next(node for node in program.graph.nodes if node.op == "output").all_input_nodes
    found = {}
    with torch.no_grad():
        for node, values in Run(program)(networks, image):
            if node in wanted:
                found[node] = [value[node].clone() for value in values]
    return [[found[node][i] for node in wanted] for i in range(len(networks))]


@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual3d", "residual2d", "batch3d"])
def test_networks_side_by_side_say_what_each_says_alone(kind: str) -> None:
    plans = plans_of(kind)
    networks = [network_of(plans, seed=seed) for seed in range(3)]
    image = image_of(plans)
    before = image.clone()
    tensors = [tensors_of(network, canonical(plans)) for network in networks]
    program = exported(network_of(plans).to("meta"), image.shape)
    found = outputs_of(program, tensors, image)
    for network, each, own in zip(networks, found, tensors, strict=True):
        with torch.no_grad():
            expected = network(image)
        assert len(each) == len(expected) == 2  # with deep supervision
        for one, other in zip(each, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        state = network.state_dict()
        assert all(torch.equal(own[name], state[name]) for name in own)  # nothing was overwritten
    assert torch.equal(image, before)


def test_every_tensor_goes_by_its_canonical_name() -> None:
    plans = plans_of("residual3d")
    program = exported(network_of(plans).to("meta"), (1, 1, 8, 8, 8))
    names = canonical(plans)
    used = {name for node, name in tensor_names(program).items()
            if next(n for n in program.graph.nodes if n.name == node).users}
    assert used == set(names.values())


def test_constants_come_with_a_network_that_is_not_on_meta() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 2, 1)
            self.register_buffer("where", torch.arange(16.0).reshape(1, 1, 4, 4), persistent=False)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.layer(image + self.where)
    network, image = Positions(), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found, = outputs_of(exported(network, image.shape), [network.state_dict()], image)
    torch.testing.assert_close(found[0], network(image).detach(), rtol=0, atol=0)


def test_values_are_freed_after_their_last_use() -> None:
    plans = plans_of("residual2d")
    network, image = network_of(plans), image_of(plans)
    program = exported(network_of(plans).to("meta"), image.shape)
    tensors = tensors_of(network, canonical(plans))
    order = {node: at for at, node in enumerate(program.graph.nodes)}
    made: list[tuple[object, weakref.ref, int]] = []  # node, its value, which object it is: in-place ones share it
    with torch.no_grad():
        for node, values in Run(program)([tensors, tensors], image):
            made += [(node, weakref.ref(value[node]), id(value[node])) for value in values]
            now = order[node]
            needed = {number for other, alive, number in made if alive() is not None
                      and max((order[user] for user in other.users), default=now) >= now}
            kept = {number for _, alive, number in made if alive() is not None}
            assert kept == needed


def test_only_the_lowest_head_is_untrained() -> None:
    plans = small_plans(2)
    arch = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arch |= {"n_stages": 4, "features_per_stage": [4] * 4, "kernel_sizes": [[3, 3]] * 4, "n_conv_per_stage": [1] * 4,
             "strides": [[1, 1], [2, 2], [2, 2], [2, 2]], "n_conv_per_stage_decoder": [1] * 3}
    network = network_of(plans).to("meta")
    heads = [name for name in canonical(plans) if "seg_layers" in name]
    assert len(heads) == 6
    # nnU-Net weights outputs 1, 1/2, ... from full resolution down, and the last 0; the decoder counts its stages up
    lowest = {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}
    assert lowest_head(exported(network, (1, 1, 16, 16))) == lowest
    network.decoder.deep_supervision = False
    assert lowest_head(exported(network, (1, 1, 16, 16))) == frozenset()


def test_what_cannot_be_traced_is_named() -> None:
    class Undecided(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image if float(image.sum()) > 0 else -image
    network = nn.Sequential(nn.Conv2d(1, 1, 1), Undecided())
    with pytest.raises(TransplantError, match="cannot trace 1 "):
        exported(network, (1, 1, 4, 4))
