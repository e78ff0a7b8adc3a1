"""The empirical risk of a trained model: nnU-Net's loss on seeded patches of a dataset's labelled cases."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from nnunet_transplant.architecture import build_network, canonical_parameters
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import origin
from nnunet_transplant.labels import foreground_values
from nnunet_transplant.loss import Loss, segmentation_loss
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.vectors import added_up
from nnunet_transplant.volumes import Patch, Volumes, configuration_of, images_of, padded, preprocessed

CPU = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Risk:
    """The mean over patches of nnU-Net's loss as a function of a network's parameters: deep supervision as in training,
    dropout off, no augmentation. Dice is that of each patch, whatever the plans say of batches, so that it is a mean.
    """
    model: TrainedModel
    network: nn.Module
    patches: Sequence[Patch]
    device: torch.device
    progress: bool = False

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What takes part in the loss, by canonical name: not the lowest head of deep supervision, which has no weight
        in it."""
        every = canonical_parameters(self.network)
        gradients = torch.autograd.grad(self.loss(self.patches[:1]), list(every.values()), allow_unused=True)
        return {name: parameter for (name, parameter), gradient in zip(every.items(), gradients, strict=True)
                if gradient is not None}

    @cached_property
    def _loss_of_logits(self) -> Loss:
        return segmentation_loss(self.model.plans, self.model.dataset_json, batch_dice=False, device=self.device)

    def loss(self, patches: Sequence[Patch]) -> torch.Tensor:
        """The mean over these patches, differentiable."""
        outputs = self.network(images_of(patches, self.device))
        if not isinstance(outputs, (list, tuple)):
            return self._loss_of_logits(outputs, patches)
        weights = [0.5 ** i for i in range(len(outputs) - 1)] or [1.0]  # nnU-Net's: none for the lowest
        return added_up(weight / sum(weights) * self._loss_of_logits(logits, patches)
                        for weight, logits in zip(weights, outputs, strict=False))

    def mean(self) -> float:
        """Over all patches, in batches as large as the plans', without a gradient."""
        with torch.no_grad():
            total = sum(float(self.loss(patches)) * len(patches)
                        for patches in self.batches(configuration_of(self.model).batch_size))
        return total / len(self.patches)

    def bar(self, items: Iterable[T], what: str) -> Iterable[T]:
        return tqdm(items, desc=what, delay=3, disable=not self.progress)

    def batches(self, size: int) -> Iterator[Sequence[Patch]]:
        for start in range(0, len(self.patches), size):
            yield self.patches[start:start + size]


def open_risk(model: TrainedModel, volumes: Volumes, patches: int, seed: int = 0, device: torch.device = CPU,
              progress: bool = False) -> Risk:
    """A model's risk on so many patches of labelled cases. See `draw` for which patches.

    Raises TransplantError for datasets, cases, channels or label maps that are not there, or lack a structure of the
    model's.
    """
    if patches < 1:
        raise TransplantError(f"-n_patches must be at least 1, not {patches}")
    network = build_network(model.plans, model.configuration, model.dataset_json, model.trainer)
    network.load_state_dict(model.state_dict())
    return Risk(model, network.to(device).eval(), draw(model, volumes, patches, seed), device, progress)


def draw(model: TrainedModel, volumes: Volumes, count: int, seed: int) -> list[Patch]:
    """Patches from the cases in turn. Every second one is centred on a voxel of a random structure of the model's that
    the case has, as far as the patch then lies in the volume; the others lie anywhere. The same for the same seed,
    cases and plans.
    """
    found = list(preprocessed(volumes, model))
    size = configuration_of(model).patch_size
    patches = []
    for index in range(count):
        data, values, cases = found[index % len(found)]
        if values is None:
            raise TransplantError(f"{cases.dataset} has cases without labels, which the loss needs")
        own = foreground_values(cases.dataset_json["labels"])
        wanted = [[value for part in origin(model.dataset_json, structure) for value in own.get(part, ())]
                  for structure in foreground_values(model.dataset_json["labels"])] if index % 2 else []
        image, labels = _patch(data, values, size, wanted, np.random.default_rng([seed, index]))
        patches.append(Patch(torch.from_numpy(image), labels, cases))
    return patches


def _patch(data: np.ndarray, values: np.ndarray, size: Sequence[int], wanted: Sequence[Sequence[int]],
           rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image (channels, *size) and label values (*size) around a voxel of one of the wanted structures, if any is there;
    of a volume and a 2d size, a slice."""
    flat = len(size) < values.ndim
    size = (1, *size) if flat else tuple(size)
    data, values = padded(data, values, size)
    there = [mask for mask in (np.isin(values, parts) for parts in wanted) if mask.any()]
    if there:
        voxels = np.argwhere(there[rng.integers(len(there))])
        corner = voxels[rng.integers(len(voxels))] - np.array(size) // 2
        start = np.clip(corner, 0, np.array(values.shape) - size).tolist()
    else:
        start = rng.integers(0, np.array(values.shape) - np.array(size) + 1).tolist()
    inside = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
    image, labels = data[(slice(None), *inside)].copy(), values[inside].copy()
    return (image[:, 0], labels[0]) if flat else (image, labels)
