"""What the tracer finds in networks, and what it says it cannot follow."""
import re
import resource
from collections.abc import Callable

import numpy as np
import pytest
import torch
from architectures import CASES, CHANNELS, CLASSES, TOLERANCE, Permuted, from_plans, permuted, primus
from factory import dataset_json, small_plans
from torch import nn

from nnunet_transplant.alignment.spec import Spec, segment_order
from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.architecture import build_network
from nnunet_transplant.errors import TransplantError

# ---------------------------------------------------------------------------------------------------------------------
# What it says

def test_the_spec_of_a_small_network() -> None:
    network = from_plans(2, False, n_stages=2, features_per_stage=[4, 6], strides=[[1, 1], [2, 2]],
                         kernel_sizes=[[3, 3]] * 2, n_conv_per_stage=[1, 1], n_conv_per_stage_decoder=[1])
    assert derive(network, (1, CHANNELS, 8, 8)).text() == """\
decoder.encoder.stages.0.0.convs.0.all_modules.0: 4 units
  makes   decoder.encoder.stages.0.0.convs.0.all_modules.0.weight axis 0, 0 to 3
  follows decoder.encoder.stages.0.0.convs.0.all_modules.0.bias axis 0, 0 to 3
  makes   decoder.encoder.stages.0.0.convs.0.all_modules.1.weight axis 0, 0 to 3
  makes   decoder.encoder.stages.0.0.convs.0.all_modules.1.bias axis 0, 0 to 3
  reads   decoder.encoder.stages.1.0.convs.0.all_modules.0.weight axis 1, 0 to 3
  reads   decoder.stages.0.convs.0.all_modules.0.weight axis 1, 4 to 7
decoder.encoder.stages.1.0.convs.0.all_modules.0: 6 units
  makes   decoder.encoder.stages.1.0.convs.0.all_modules.0.weight axis 0, 0 to 5
  follows decoder.encoder.stages.1.0.convs.0.all_modules.0.bias axis 0, 0 to 5
  makes   decoder.encoder.stages.1.0.convs.0.all_modules.1.weight axis 0, 0 to 5
  makes   decoder.encoder.stages.1.0.convs.0.all_modules.1.bias axis 0, 0 to 5
  reads   decoder.transpconvs.0.weight axis 0, 0 to 5
decoder.stages.0.convs.0.all_modules.0: 4 units
  makes   decoder.stages.0.convs.0.all_modules.0.weight axis 0, 0 to 3
  follows decoder.stages.0.convs.0.all_modules.0.bias axis 0, 0 to 3
  makes   decoder.stages.0.convs.0.all_modules.1.weight axis 0, 0 to 3
  makes   decoder.stages.0.convs.0.all_modules.1.bias axis 0, 0 to 3
  reads   decoder.seg_layers.0.weight axis 1, 0 to 3
decoder.transpconvs.0: 4 units
  makes   decoder.transpconvs.0.weight axis 1, 0 to 3
  reads   decoder.stages.0.convs.0.all_modules.0.weight axis 1, 0 to 3
  makes   decoder.transpconvs.0.bias axis 0, 0 to 3"""


def segments(spec: Spec, group: str) -> set[tuple[str, int, int]]:
    return {(segment.tensor, segment.axis, segment.start) for segment in spec.groups[group].segments}


def test_a_skip_that_only_pools_ties_two_stages() -> None:
    spec = permuted("skips that only pool").spec
    streams = [group for group in spec.groups.values() if len(group.segments) > 20]
    assert len(streams) == 1
    assert {f"decoder.encoder.stages.{stage}.blocks.0.conv2.all_modules.0.weight" for stage in range(3)} <= {
        segment.tensor for segment in streams[0].segments}


def test_attention_heads_are_blocks() -> None:
    spec = permuted("Primus, everything scaled").spec
    heads = spec.groups["eva.blocks.1.attn.v_proj"]
    assert (heads.size, heads.blocks) == (24, 2)
    assert {segment.tensor.removeprefix("eva.blocks.1.attn."): (segment.axis, segment.rigid)
            for segment in heads.segments} == {
        "v_proj.weight": (0, False), "v_proj.bias": (0, False), "norm.weight": (0, False), "norm.bias": (0, False),
        "proj.weight": (1, False), "q_proj.weight": (0, True), "q_proj.bias": (0, True), "k_proj.weight": (0, True)}
    order = np.concatenate([12 + np.arange(12)[::-1], np.arange(12)])
    for segment in heads.segments:
        expected = np.concatenate([np.arange(12, 24), np.arange(12)]) if segment.rigid else order
        assert np.array_equal(segment_order(heads, segment, order), expected)
    assert {name for name, _, _ in segments(spec, "eva.blocks.1.mlp.fc1_g")} == {
        f"eva.blocks.1.mlp.{name}" for name in ("fc1_g.weight", "fc1_g.bias", "fc1_x.weight", "fc1_x.bias",
                                                "norm.weight", "norm.bias", "fc2.weight")}


def test_groups_of_a_group_norm_are_blocks() -> None:
    spec = permuted("group norms").spec
    assert {name: group.blocks for name, group in spec.groups.items()} == {
        "stem.0": 2, "block.0": 3, "up.0": 2, "last.0": 1}


def test_units_are_alike_only_where_all_that_is_done_to_them_is() -> None:
    spec = permuted("assorted").spec
    assert segments(spec, "halves[0:5]") == {("halves.weight", 0, 0), ("halves.bias", 0, 0), ("head.weight", 1, 0)}
    assert segments(spec, "halves[5:10]") == {("halves.weight", 0, 5), ("halves.bias", 0, 5), ("head.weight", 1, 5)}
    assert {("glu.weight", 0, 0), ("glu.weight", 0, 5)} <= segments(spec, "glu[0:5]")  # one is the other's gate
    assert {("twice.weight", 0, 0), ("twice.weight", 1, 0)} <= segments(spec, "stem")
    assert {("other.weight", 0, 0), ("one.bias", 0, 0), ("other.bias", 0, 0)} <= segments(spec, "table")


@pytest.mark.parametrize("name, before", [
    ("PlainConvUNet 2d", True), ("ResidualEncoderUNet 3d", True), ("dropout, no biases", True),
    ("PlainConvUNet 2d, batch norm", True), ("norm after the activation", False), ("no norms", False)])
def test_what_a_norm_takes_away(name: str, before: bool) -> None:
    """The scale of a unit's weights (free), its bias (counts for nothing)."""
    case = Permuted(CASES[name])
    found = [segment for group in case.spec.groups.values() for segment in group.segments]
    normed = {tensor for tensor in case.tensors if tensor.endswith("all_modules.0.weight")} if before else set()
    assert {segment.tensor for segment in found if segment.free} == normed
    assert all(segment.axis == 0 for segment in found if segment.free)
    idle = {tensor.replace("weight", "bias") for tensor in normed} | {t for t in case.tensors if "running" in t}
    assert {segment.tensor for segment in found if not segment.counts} == idle & set(case.tensors)
    if case.instance and before:
        for module in case.network.modules():
            if hasattr(module, "eps"):
                module.eps = 0.0
        with torch.no_grad():
            case.expected = case.outputs()
        scaled = {name: case.tensors[name] * (0.1 + torch.rand_like(case.tensors[name]).mean(
            [*range(1, case.tensors[name].dim())], keepdim=True)) for name in normed}
        biases = {name: torch.rand_like(case.tensors[name]) for name in idle & set(case.tensors)}
        assert case.change(scaled | biases) < TOLERANCE


def test_without_deep_supervision_only_the_heads_it_has_read() -> None:
    plans, dataset = small_plans(2), dataset_json({"background": 0, "one": 1})
    full, last = (derive(build_network(plans, "2d", dataset, deep_supervision=deep), (1, 1, 8, 8))
                  for deep in (True, False))
    assert full.by_tensor().keys() - last.by_tensor().keys() == {"decoder.seg_layers.0.weight"}
    assert "decoder.seg_layers.1.weight" in last.by_tensor()


def test_a_network_without_weights_has_the_same_spec_and_one_with_keeps_them() -> None:
    network = primus()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    spec = derive(network, (1, CHANNELS, 8, 16, 16))
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.device("meta"):
        empty = primus()
    assert derive(empty, (1, CHANNELS, 8, 16, 16)) == spec


def test_memory_does_not_grow_with_voxels() -> None:
    with torch.device("meta"):
        network = from_plans(3, True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, the most so far
    spec = derive(network, (1, CHANNELS, 128, 128, 128))  # 64 MiB a value of 4 features
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    assert spec == permuted("ResidualEncoderUNet 3d").spec


# ---------------------------------------------------------------------------------------------------------------------
# What it cannot follow

class Around(nn.Module):
    """Some layer on eight units."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.stem, self.inside, self.head = nn.Conv2d(CHANNELS, 8, 1), inside, nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inside(self.stem(x)))


class Does(nn.Module):
    def __init__(self, does: Callable[[torch.Tensor], torch.Tensor], *numbers: int) -> None:
        super().__init__()
        self.does = does
        self.weight = nn.Parameter(torch.rand(numbers)) if numbers else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.does(x) if self.weight is None else self.does(x, self.weight)


class Attention(nn.Module):
    """Of two heads, over voxels."""

    def __init__(self, change: Callable[..., tuple] = lambda q, k, v: (q, k, v)) -> None:
        super().__init__()
        self.change, self.qkv, self.out = change, nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).reshape(1, 3, 2, 4, 16).transpose(3, 4).unbind(1)
        found = nn.functional.scaled_dot_product_attention(*self.change(*heads))
        return self.out(found.transpose(2, 3).reshape(1, 8, 4, 4))


def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(x, 2 * weight)


LADDER = torch.arange(1.0, 9.0)


@pytest.mark.parametrize("inside, message", [
    (Does(lambda x: 2 * x if x.sum() > 0 else x), "cannot trace inside (GuardOnDataDependentSymNode: Could not guard"),
    (Does(lambda x: torch.from_numpy(x.numpy())), "cannot trace inside (RuntimeError"),
    (nn.Conv2d(8, 8, 1, groups=2), "cannot follow inside: a convolution in 2 groups"),
    (nn.ConvTranspose2d(8, 8, 1, groups=4), "cannot follow inside: a convolution in 4 groups"),
    (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "cannot follow aten.pad.default in inside"),
    (Does(layer, 8, 8, 1, 1), "cannot follow inside: it computes weights"),
    (Does(lambda x: torch.fft.fft2(x).real), "cannot follow aten.fft_fft2.default in inside"),
    (Does(lambda x: x + x.flip(1)), "cannot follow aten.flip.default in inside"),
    (nn.Softmax(1), "cannot follow aten.softmax.int in inside"),
    (nn.LayerNorm([8, 4, 4]), "cannot follow aten.layer_norm.default in inside"),
    (Does(lambda x: x.reshape(1, 2, 4, 4, 4).mean(2).repeat(1, 4, 1, 1)), "cannot follow inside: it sums up some of"),
    (Does(lambda x: torch.cat([x[:, ::2].relu(), x[:, 1::2].tanh()], 1)), "units of stem.weight lie scattered"),
    (nn.Sequential(nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)), "units of stem are divided into groups in several ways"),
    (nn.Sequential(Does(lambda x: torch.cat([x, x.tanh()], 1)), nn.GroupNorm(2, 16), nn.Conv2d(16, 8, 1)), None),
    (Attention(), None),
    (Attention(lambda q, k, v: (q * LADDER[:4], k, v)), None),  # the same for every head
    (Attention(lambda q, k, v: (q * LADDER.reshape(2, 1, 4), k, v)), "cannot follow inside: its heads differ"),
    (Attention(lambda q, k, v: (q[..., :2], k[..., :2], v)), "queries, keys and values differ in size"),
    (Attention(lambda q, k, v: (q, k, v, torch.zeros(16, 16))), "aten.scaled_dot_product_attention.default in inside"),
])
def test_it_says_what_it_cannot_follow(inside: nn.Module, message: str | None) -> None:
    network, shape = Around(inside), (1, CHANNELS, 4, 4)
    if message is None:
        assert derive(network, shape).groups
    else:
        with pytest.raises(TransplantError, match=re.escape(message)):
            derive(network, shape)


@pytest.mark.parametrize("inside, moves", [
    (Does(lambda x: x), True),
    (Does(lambda x: x * LADDER[:4]), True),
    (Does(lambda x: x * torch.arange(4.0)[:, None]), True),
    (Does(lambda x: x * LADDER.reshape(8, 1, 1)), False),
    (Does(lambda x: x * LADDER.repeat(16).reshape(8, 4, 4)), False),
    (Does(lambda x: x + torch.arange(8.0)[:, None, None]), False),
    (Does(lambda x: x[:, LADDER.numel() // 2:].repeat(1, 2, 1, 1) + x), True),  # in pairs
    (Does(lambda x, w: (x.reshape(1, 2, 4, 4, 4) * w).reshape(1, 8, 4, 4), 2, 4, 1, 1), False),  # no axis of units
    (Does(lambda x, w: x * w, 8, 1, 1), True),
    (Does(lambda x, w: x * w, 8, 4, 4), True),
    (Does(lambda x, w: nn.functional.conv2d(x, w) * w.reshape(1, 8, 8, 1)[..., :4, :], 8, 8, 1, 1), False),
])
def test_units_beside_constants_of_their_own_stay(inside: nn.Module, moves: bool) -> None:
    spec = derive(Around(inside), (1, CHANNELS, 4, 4))
    assert ("stem.weight" in spec.by_tensor()) == moves


def test_units_beside_the_image_and_outputs_stay() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, 4, 1)
            self.head = nn.Conv2d(4, CLASSES, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            features = self.two(self.one(x) + x)
            return self.head(features), features
    assert not derive(Beside(), (1, CHANNELS, 4, 4)).groups
