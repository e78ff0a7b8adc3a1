"""The permutation spec on every architecture that nnU-Net builds: permuted as it says, a network gives the same output;
with any one axis left out it does not."""
import functools
import re
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.dinov2_eva import Eva
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2, PrimusV3
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed_deeper
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual import BottleneckD
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from factory import RESIDUAL, dataset_json, small_plans
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from torch import nn

from nnunet_transplant.alignment.graph import tensor_names
from nnunet_transplant.alignment.spec import Group, Segment, Spec, derive, permute, segment_order
from nnunet_transplant.architecture import build_network, canonical_names
from nnunet_transplant.errors import TransplantError

CHANNELS, CLASSES = 2, 3  # no layer has so many units: axes of these sizes are inputs and outputs
TOLERANCE = 1e-5          # relative, of every output


# ---------------------------------------------------------------------------------------------------------------------
# Networks

@dataclass(frozen=True)
class Case:
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of the input's voxels


CASES: dict[str, Case] = {}


def from_plans(dim: int, residual: bool, trainer: type[nnUNetTrainer] = nnUNetTrainer, network: str | None = None,
               **arch: object) -> nn.Module:
    """As nnU-Net builds it, with deep supervision."""
    plans = small_plans(dim, residual)
    name, configuration = next(iter(plans["configurations"].items()))
    configuration["architecture"]["arch_kwargs"] |= arch
    if network is not None:
        configuration["architecture"]["network_class_name"] = network
    dataset = dataset_json({"background": 0, "one": 1, "two": 2}, channel_names={"0": "T1", "1": "T2"})
    return build_network(plans, name, dataset, trainer)


def preset(dim: int, stages: int, most: int) -> nn.Module:
    """The stages and blocks of nnU-Net's ResEnc planners, an eighth of their features. Each stage halves one axis only,
    so that the smallest input is small."""
    blocks = [1, 3, 4, 6, 6, 6, 6, 6][:stages]
    strides = [[1] * dim] + [[2 if axis == stage % dim else 1 for axis in range(dim)] for stage in range(stages - 1)]
    return from_plans(dim, True, n_stages=stages, n_blocks_per_stage=blocks, strides=strides,
                      kernel_sizes=[[3] * dim] * stages, n_conv_per_stage_decoder=[1] * (stages - 1),
                      features_per_stage=[min(32 * 2 ** stage, most) // 8 for stage in range(stages)])


def unet(encoder: type[nn.Module], dim: int, decoder: type[nn.Module] = UNetDecoder, **options: object) -> nn.Module:
    """What dynamic-network-architectures builds on request, though no plans of nnU-Net ask for it."""
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    built = encoder(**{"input_channels": CHANNELS, "n_stages": 3, "features_per_stage": [4, 6, 6], "conv_op": conv,
                       "kernel_sizes": 3, "strides": [1, 2, 2], "conv_bias": True, "norm_op": norm, "norm_op_kwargs":
                       {"affine": True}, "nonlin": nn.LeakyReLU, "nonlin_kwargs": {}, "return_skips": True} | options)
    return nn.Sequential(built, decoder(built, CLASSES, 1, True))


def bottleneck() -> nn.Module:
    return ResidualEncoderUNet(
        CHANNELS, 3, [8, 12, 12], nn.Conv2d, 3, [1, 2, 2], [2, 2, 1], CLASSES, 1, False, nn.InstanceNorm2d,
        {"affine": True}, nonlin=nn.ReLU, nonlin_kwargs={}, deep_supervision=True, block=BottleneckD,
        bottleneck_channels=[4, 5, 6], stem_channels=7)


def primus(kind: type[nn.Module] = Primus, **options: object) -> nn.Module:
    return kind(CHANNELS, 24, (8, 8, 8), CLASSES, eva_depth=2, eva_numheads=2, input_shape=(8, 16, 16),
                **{"init_values": None} | options)


def primus_v2() -> nn.Module:
    network = primus(PrimusV2)
    network.down_projection = PatchEmbed_deeper(CHANNELS, 24, base_features=4)
    return network


class Tokens(nn.Module):
    """DINOv2's transformer with a head, as its own outputs leave the stream of tokens as it is."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.eva = Eva(CHANNELS, (16, 16, 8), (16, 8, 8), 24, (8, 8, 8), 2, 2, **options)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.eva(x)["x_norm_patchtokens"])


class GroupNorms(nn.Module):
    """Group norms on their own, on a residual stream, and after a concatenation."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(CHANNELS, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.PReLU(12),
                                   nn.Conv2d(12, 8, 3, padding=1), nn.GroupNorm(groups, 8))
        self.up = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.PReLU())
        self.both = nn.Sequential(nn.GroupNorm(4, 16), nn.ReLU())  # two groups of each half
        self.last = nn.Sequential(nn.Conv2d(16, 4, 1), nn.GroupNorm(4, 4), nn.ReLU())  # an instance norm
        self.head = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = self.stem(x)
        stream = torch.relu(stream + self.block(stream))
        return self.head(self.last(self.both(torch.cat([stream, self.up(stream)], 1))))


class Assorted(nn.Module):
    """Interpolation, a depthwise convolution, a module used twice, tied weights, an attention gate of one channel, a
    learned scale, an image beside units, a split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.one, self.other = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.other.weight = self.one.weight
        self.gate = nn.Conv2d(6, 1, 1)
        self.scale = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.ones(1, 6, 2, 2))
        self.down, self.up = nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.glu = nn.Conv2d(6 + CHANNELS, 10, 1)
        self.halves = nn.Conv2d(5, 10, 1)
        self.head = nn.Conv2d(10, CLASSES, 1)
        self.register_buffer("mask", torch.rand(1, 1, 4, 4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.depthwise(self.stem(x)))
        y = torch.tanh(self.twice(torch.tanh(self.twice(y))))
        y = torch.tanh(self.one(y)) * self.other(y)
        y = self.up(self.down(y) + self.table) * torch.sigmoid(self.gate(y)) * self.scale * self.mask
        left, right = self.glu(torch.cat([y, x], 1)).chunk(2, 1)
        y = self.halves(left * torch.sigmoid(right))
        return self.head(torch.cat([torch.relu(y[:, :5]), torch.tanh(y[:, 5:])], 1))


# M, L and XL differ in the size of their patches alone, and by that in the number of stages.
PRESETS = {"ResEnc 3d, 6 stages": Case(lambda: preset(3, 6, 320), (8, 8, 2)),
           "ResEnc 3d, 7 stages": Case(lambda: preset(3, 7, 320), (8, 8, 4)),
           "ResEnc 2d, 7 stages": Case(lambda: preset(2, 7, 512), (16, 16)),
           "ResEnc 2d, 8 stages": Case(lambda: preset(2, 8, 512), (32, 16))}
CASES |= PRESETS
for dim in (2, 3):
    CASES |= {
        f"PlainConvUNet {dim}d": Case(lambda dim=dim: from_plans(dim, False), (8,) * dim),
        f"ResidualEncoderUNet {dim}d": Case(lambda dim=dim: from_plans(dim, True), (8,) * dim),
        f"PlainConvUNet {dim}d, batch norm": Case(lambda dim=dim: from_plans(dim, False, nnUNetTrainerBN), (4,) * dim),
        f"ResidualEncoderUNet {dim}d, batch norm":
            Case(lambda dim=dim: from_plans(dim, True, nnUNetTrainerBN), (4,) * dim),
        f"ResidualUNet {dim}d": Case(lambda dim=dim: from_plans(
            dim, True, network=RESIDUAL.replace("ResidualEncoderUNet", "ResidualUNet")), (8,) * dim),
        f"squeeze-excitation {dim}d": Case(lambda dim=dim: unet(
            ResidualEncoder, dim, n_blocks_per_stage=[1, 2, 1], squeeze_excitation=True, stochastic_depth_p=0.1),
            (8,) * dim)}
CASES |= {
    "skips that only pool": Case(lambda: from_plans(2, True, features_per_stage=[6, 6, 6],
                                                    n_blocks_per_stage=[1, 2, 1]), (8, 8)),
    "bottleneck blocks": Case(bottleneck, (8, 8)),
    "dropout, no biases": Case(lambda: from_plans(
        2, False, conv_bias=False, dropout_op="torch.nn.Dropout2d", dropout_op_kwargs={"p": 0.5}), (8, 8)),
    "norm after the activation": Case(lambda: from_plans(2, False, nonlin_first=True), (8, 8)),
    "no norms": Case(lambda: from_plans(2, False, norm_op=None), (4, 4)),
    "max pooling": Case(lambda: unet(PlainConvEncoder, 2, n_conv_per_stage=1, pool="max"), (8, 8)),
    "average pooling": Case(lambda: unet(ResidualEncoder, 2, n_blocks_per_stage=1, pool_type="avg"), (8, 8)),
    "Primus": Case(primus, (8, 16, 16)),
    "Primus, everything scaled": Case(lambda: primus(init_values=0.1, scale_attn_inner=True), (8, 16, 16)),
    "Primus, register tokens": Case(lambda: primus(num_register_tokens=3), (8, 16, 16)),
    "Primus, no absolute positions": Case(lambda: primus(use_abs_pos_embed=False), (8, 16, 16)),
    "Primus, no rotary positions": Case(lambda: primus(use_rot_pos_emb=False), (8, 16, 16)),
    "PrimusV2": Case(primus_v2, (8, 16, 16)),
    "PrimusV3": Case(lambda: primus(PrimusV3, scale_attn_inner=True, ch_per_level=(4, 6, 6, 8)), (8, 16, 16)),
    "DINOv2": Case(Tokens, (16, 16, 8)),
    "DINOv2, smaller input": Case(lambda: Tokens(scale_mlp=False, init_values=0.1), (16, 8, 8)),
    "group norms": Case(GroupNorms, (4, 4)),
    "assorted": Case(Assorted, (4, 4)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Permuting them

def with_random_weights(network: nn.Module) -> nn.Module:
    """In float64; norms start as the identity, the last ones of residual blocks as zeros that would hide errors."""
    generator = torch.Generator().manual_seed(1)
    for tensor in network.double().state_dict().values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
        elif tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network


def cycle(size: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that leaves nothing in place."""
    order, permutation = rng.permutation(size), np.empty(size, int)
    permutation[order] = np.roll(order, 1)
    return permutation


def random_permutation(group: Group, rng: np.random.Generator) -> np.ndarray:
    inside = group.size // group.blocks
    blocks = [block * inside + cycle(inside, rng) for block in cycle(group.blocks, rng)]
    return np.concatenate(blocks)


class Permuted:
    """A network of random weights, its spec, and what it gives with other tensors."""

    def __init__(self, case: Case) -> None:
        image = torch.randn(1, CHANNELS, *case.shape, generator=torch.Generator().manual_seed(0))
        network = case.network()
        self.spec = derive(network, image.shape)
        self.network, self.image = with_random_weights(network), image.double()
        self.own = self.network.state_dict(keep_vars=True)
        self.tensors = {name: self.own[name].detach().clone() for name in canonical_names(self.network).values()}
        rng = np.random.default_rng(2)
        self.orders = {name: random_permutation(group, rng) for name, group in self.spec.groups.items()}
        with torch.no_grad():
            self.expected = self.outputs()
        # an instance norm takes away the mean, and with it the bias that was added before
        self.instance = any(isinstance(module, (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm))
                            for module in network.modules())

    def outputs(self) -> list[torch.Tensor]:
        result = self.network(self.image)
        return list(result) if isinstance(result, (list, tuple)) else [result]

    def moved(self, group: Group, segments: Iterable[Segment]) -> dict[str, torch.Tensor]:
        """The tensors of these segments of a group alone, permuted by them."""
        spec = Spec({group.name: replace(group, segments=tuple(segments))})
        return permute({name: self.tensors[name] for name in spec.by_tensor()}, spec, self.orders)

    def change(self, tensors: Mapping[str, torch.Tensor]) -> float:
        """How much the outputs change with these tensors: of all the largest change, relative."""
        for name, tensor in tensors.items():
            self.own[name].data = tensor
        with torch.no_grad():
            outputs = self.outputs()
        for name in tensors:
            self.own[name].data = self.tensors[name]
        return max(float((one - other).abs().max() / other.abs().max())
                   for one, other in zip(outputs, self.expected, strict=True))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These networks are so small that threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def permuted(name: str) -> Permuted:
    return Permuted(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_permuted_by_the_spec_the_output_is_the_same(name: str) -> None:
    case = permuted(name)
    assert case.change(permute(case.tensors, case.spec, case.orders)) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if name not in PRESETS])
def test_with_any_one_axis_left_out_it_is_not(name: str) -> None:
    case = permuted(name)
    for group in case.spec.groups.values():
        for segment in group.segments:
            change = case.change(case.moved(group, [other for other in group.segments if other is not segment]))
            assert (change < TOLERANCE) == (case.instance and not segment.counts), (group.name, segment, change)


@pytest.mark.parametrize("name", PRESETS)
def test_with_any_one_axis_left_out_it_is_not_in_large_networks(name: str) -> None:
    """To leave one out changes as much as to move it alone: how much, to first order, a gradient tells for all."""
    case = permuted(name)
    generator = torch.Generator().manual_seed(0)
    weighted = [output * torch.randn(output.shape, generator=generator) for output in case.outputs()]
    sum(output.sum() for output in weighted).backward()
    size = float(sum(output.detach().abs().sum() for output in weighted))
    for group in case.spec.groups.values():
        for segment in group.segments:
            moved = case.moved(group, [segment])[segment.tensor] - case.tensors[segment.tensor]
            change = abs(float((moved * case.own[segment.tensor].grad).sum())) / size
            assert (change < 1e-12) == (not segment.counts), (group.name, segment, change)


@pytest.mark.parametrize("name", CASES)
def test_every_axis_is_accounted_for(name: str) -> None:
    case = permuted(name)
    groups = case.spec.groups.values()
    places = Counter((segment.tensor, segment.axis, segment.start + index)
                     for group in groups for segment in group.segments for index in range(group.size))
    assert set(places.values()) == {1}
    assert {tensor for tensor, _, _ in places} <= set(case.tensors)  # the last names of tied tensors
    covered = Counter((tensor, axis) for tensor, axis, _ in places)
    program = case.spec.program
    names = tensor_names(program)
    for tensor in {names[node.name] for node in program.graph.nodes if node.users and node.name in names
                   } & set(case.tensors):
        shape = case.tensors[tensor].shape
        axes = range(2) if tensor.endswith("weight") and len(shape) > 1 else range(len(shape))[:1]
        for axis in axes:
            assert shape[axis] - covered[tensor, axis] in (0, 1, CHANNELS, CLASSES), (tensor, axis)
    for group in groups:
        assert group.size % group.blocks == 0 and len(group.segments) > 1 and group.taps
        for tap in group.taps:
            node = next(node for node in program.graph.nodes if node.name == tap.node)
            assert node.meta["val"].shape[tap.axis] == group.size
    lines = case.spec.text().splitlines()
    assert len(lines) == len(groups) + sum(len(group.segments) for group in groups)
    assert len({line for line in lines if line.startswith(" ")}) == len(lines) - len(groups)


@pytest.mark.parametrize("name", CASES)
def test_back_again_it_has_the_same_bits(name: str) -> None:
    case = permuted(name)
    there = permute(case.tensors, case.spec, case.orders)
    back = permute(there, case.spec, {group: np.argsort(order) for group, order in case.orders.items()})
    assert all(torch.equal(back[tensor], case.tensors[tensor]) for tensor in case.tensors)
    moved = {segment.tensor for group in case.spec.groups.values() for segment in group.segments}
    assert {tensor for tensor in there if not torch.equal(there[tensor], case.tensors[tensor])} == moved


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
