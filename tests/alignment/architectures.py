"""Every architecture that nnU-Net builds, and others with what networks may hold, permuted as their specs say."""
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
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

from nnunet_transplant.alignment.spec import Group, Segment, Spec, permute
from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.architecture import build_network, canonical_names

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


@functools.cache
def permuted(name: str) -> Permuted:
    return Permuted(CASES[name])
