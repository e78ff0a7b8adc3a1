"""The models that are merged, as networks that run on patches of volumes."""
import hashlib
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from nnunet_transplant.architecture import Network, build_network, canonical_names
from nnunet_transplant.cache import Cache
from nnunet_transplant.checkpoint import tensors_sha256
from nnunet_transplant.device import BatchSize, forward_only
from nnunet_transplant.heads import JoinedHeads, head_rows, join_head, merged_dataset_json, scaled_to_one
from nnunet_transplant.labels import has_regions
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.nnunet import nnUNetTrainer
from nnunet_transplant.vectors import weighted_sum
from nnunet_transplant.volumes import Patch, configuration_of, images_of, targets_of

T = TypeVar("T")

CPU = torch.device("cpu")
SLICES = 8  # of a volume that a 2d model has a look at


@dataclass
class Experts:
    """The models, and patches of the volumes that may be looked at (none where there are no volumes). Networks are on
    `device`, without deep supervision, in eval mode, and ask for no gradients.

    tensors: of each model's network, by canonical name: in common units, where models are aligned.
    joined: the labels and the head of the merged model.
    shared: names of the tensors that will be merged, where not all are; the units that others make stay each model's.
    """
    models: Sequence[TrainedModel]
    tensors: Sequence[Network]
    joined: JoinedHeads
    trainer: type[nnUNetTrainer]
    patches: Sequence[Patch] = ()
    device: torch.device = CPU
    shared: frozenset[str] = frozenset()
    progress: bool = False
    cache: Cache | None = None
    _kept: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """make(), the first time; then what it was. For what takes long and depends on nothing but the key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def kept(self, what: str, models: Sequence[int], options: Sequence[Any], make: Callable[[], T]) -> T:
        """As `once`, and in the cache, where there is one: for tensors that depend on these models, on the patches and
        on some options alone."""
        key = what, *models, str(options)
        if self.cache is None:
            return self.once(key, make)
        cache, depends = self.cache, [*(self._hash_of(model) for model in models), self._hash_of_patches, *options]
        return self.once(key, lambda: cache.kept(what, depends, make))

    def _hash_of(self, model: int) -> str:
        described = [tensors_sha256(self.tensors[model]), self.models[model].layout.modules,
                     self.models[model].dataset_json["labels"], self.trainer.__name__]
        return self.once(("hash", model), lambda: hashlib.sha256(str(described).encode()).hexdigest())

    @cached_property
    def _hash_of_patches(self) -> str:
        digest = hashlib.sha256()
        for patch in self.patches:
            digest.update(patch.image.numpy().tobytes())
            digest.update(b"" if patch.values is None else patch.values.tobytes())
        return digest.hexdigest()

    @cached_property
    def dataset_json(self) -> dict[str, Any]:
        """Of the merged model."""
        return merged_dataset_json(self.models[0], self.joined)

    @property
    def plans(self) -> dict[str, Any]:
        return self.models[0].plans

    @property
    def configuration(self) -> ConfigurationManager:
        return configuration_of(self.models[0])

    @property
    def same_labels(self) -> bool:
        """Whether all heads mean the same, so that they say something of the units they read."""
        return self.joined.rows is None

    @property
    def regions(self) -> bool:
        """Whether the merged model's labels are regions."""
        return has_regions(self.dataset_json["labels"])

    def network(self, model: int) -> nn.Module:
        """One model's own network."""
        return self._network(self.models[model].dataset_json, self.tensors[model])

    def merged_network(self, merged: Network) -> nn.Module:
        """A network with the merged labels and these tensors, by canonical name."""
        return self._network(self.dataset_json, merged)

    def _network(self, dataset_json: Mapping[str, Any], tensors: Network) -> nn.Module:
        first = self.models[0]
        network = build_network(first.plans, first.configuration, dataset_json, self.trainer, deep_supervision=False)
        network.load_state_dict({name: tensors[first.layout.canonical[name]] for name in first.layout.shapes})
        return network.to(self.device).eval().requires_grad_(False)

    def heads(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """The merged heads by canonical name: joined, or where the labels are the same, averaged."""
        merged = {}
        for name in self.models[0].layout.names:
            if name in self.models[0].layout.heads:
                heads = [theta[name].float() for theta in self.tensors]
                result = weighted_sum(heads, scaled_to_one(weights)) if self.same_labels \
                    else join_head(heads, weights, self.joined)
                merged[name] = result.to(self.tensors[0][name].dtype)
        return merged

    def images(self, patches: Sequence[Patch]) -> torch.Tensor:
        """A batch (patches, channels, *patch_size)."""
        return images_of(patches, self.device)

    def targets(self, patches: Sequence[Patch], dataset_json: Mapping[str, Any] | None = None) -> torch.Tensor:
        """What a model with these labels (default: the merged ones) should say: see `volumes.targets_of`."""
        return targets_of(patches, self.plans, self.dataset_json if dataset_json is None else dataset_json, self.device)

    def see(self, number: int, data: np.ndarray) -> np.ndarray:
        """Where in a volume (channels, x, y, z), shrunk to one patch, a structure is: models and their structures each
        in turn, by a running number. Where the model sees nothing of it, the voxel where it comes nearest to that. A
        cheap look, in one forward pass. A 2d model looks at some slices. Bool (x, y, z), of the shrunken volume."""
        same_labels = self._structures[number % len(self._structures)]
        model, row = same_labels[number // len(self._structures) % len(same_labels)]
        size = tuple(self.configuration.patch_size)
        images = torch.from_numpy(data)[None]
        flat = len(size) < data.ndim - 1
        if flat:
            count = min(SLICES, data.shape[1])
            images = images[0, :, (np.arange(count) * 2 + 1) * data.shape[1] // (2 * count)].transpose(0, 1)
        small = nn.functional.interpolate(images, [min(pair) for pair in zip(images.shape[2:], size, strict=True)],
                                          mode="bilinear" if flat else "trilinear")
        room = [most - length for most, length in zip(size, small.shape[2:], strict=True)]
        padded = nn.functional.pad(small, [pad for length in reversed(room) for pad in (0, length)])
        network = self.once(("looks", model), lambda: self.network(model))
        with forward_only(self.device):
            logits = network(padded.to(self.device)).float().cpu()
        score = logits[:, row]
        if not has_regions(self.models[model].dataset_json["labels"]):
            score = score - torch.cat([logits[:, :row], logits[:, row + 1:]], 1).amax(1)
        score = score[(slice(None), *(slice(length) for length in small.shape[2:]))]
        there = score > 0
        found = (there if there.any() else score == score.max()).numpy()
        return found if flat else found[0]

    @cached_property
    def _structures(self) -> list[list[tuple[int, int]]]:
        """Of models of the same labels, of each model, the rows of its structures: (model, row)."""
        alike: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for model, trained in enumerate(self.models):
            alike.setdefault(tuple(head_rows(trained.plans, trained.dataset_json).items()), []).append(model)
        return [[(model, row) for model in models for _, row in rows] for rows, models in alike.items()]

    def bar(self, items: Iterable[T], what: str) -> Iterable[T]:
        return tqdm(items, desc=what, delay=3, disable=not self.progress)


# ---------------------------------------------------------------------------------------------------------------------
# Running statistics of batch norms, which weights that were merged or moved no longer fit. An instance norm needs no
# such thing: it has no memory and takes the statistics of its input.

def has_running_statistics(names: Iterable[str]) -> bool:
    return any(name.endswith(".running_mean") for name in names)


def running_statistics(experts: Experts, network: nn.Module) -> dict[str, torch.Tensor]:
    """The running means and variances of a network on the experts' patches, by canonical name."""
    count = len(experts.patches)

    def run(size: int) -> None:
        parts = math.ceil(count / size)  # as equal as can be: every batch counts the same
        batches = [experts.patches[part * count // parts:(part + 1) * count // parts] for part in range(parts)]
        update_bn((experts.images(batch) for batch in experts.bar(batches, "running statistics")), network)

    BatchSize(experts.configuration.batch_size, experts.device).run(run)
    canonical = canonical_names(network)
    return {canonical[name]: buffer.detach().cpu().clone() for name, buffer in network.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")}
