"""The empirical risk of a trained model: nnU-Net's loss on seeded patches of a dataset's labelled cases."""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_transplant.architecture import build_network, canonical_parameters
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import origin
from nnunet_transplant.labels import foreground_values
from nnunet_transplant.merging.calibration import Calibration, Patch, Volumes, padded, preprocessed
from nnunet_transplant.merging.coefficients import Loss, segmentation_loss
from nnunet_transplant.model_folder import TrainedModel


@dataclass(frozen=True)
class Risk:
    """The mean over patches of nnU-Net's loss as a function of a network's parameters: deep supervision as in training,
    dropout off, no augmentation. Dice is that of each patch, whatever the plans say of batches, so that it is a mean.
    """
    calibration: Calibration
    network: nn.Module

    @property
    def patches(self) -> Sequence[Patch]:
        return self.calibration.patches

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
        return segmentation_loss(self.calibration, batch_dice=False)

    def loss(self, patches: Sequence[Patch]) -> torch.Tensor:
        """The mean over these patches, differentiable."""
        outputs = self.network(self.calibration.images(patches))
        if not isinstance(outputs, (list, tuple)):
            return self._loss_of_logits(outputs, patches)
        weights = [0.5 ** i for i in range(len(outputs) - 1)] or [1.0]  # nnU-Net's: none for the lowest
        return sum(weight / sum(weights) * self._loss_of_logits(logits, patches)
                   for weight, logits in zip(weights, outputs, strict=False))

    def mean(self) -> float:
        """Over all patches, in batches as large as the plans', without a gradient."""
        with torch.no_grad():
            total = sum(float(self.loss(patches)) * len(patches)
                        for patches in self.batches(self.calibration.configuration.batch_size))
        return total / len(self.patches)

    def batches(self, size: int) -> Iterator[Sequence[Patch]]:
        for start in range(0, len(self.patches), size):
            yield self.patches[start:start + size]


def open_risk(model: TrainedModel, volumes: Volumes, patches: int, seed: int = 0, progress: bool = False) -> Risk:
    """A model's risk on so many patches of labelled cases. See `draw` for which patches.

    Raises TransplantError for datasets, cases, channels or label maps that are not there, or lack a structure of the
    model's.
    """
    if patches < 1:
        raise TransplantError(f"-n_patches must be at least 1, not {patches}")
    calibration = Calibration([model], [model.tensors()], model.dataset_json, {}, model.trainer,
                              draw(model, volumes, patches, seed), volumes, progress)
    network = build_network(model.plans, model.configuration, model.dataset_json, model.trainer)
    network.load_state_dict(model.state_dict())
    return Risk(calibration, network.to(calibration.device).eval())


def volumes_of(dataset: str | int, fold: str | int, n_cases: int, cases: str | None = None,
               device: str = "cpu") -> Volumes:
    """The validation cases of a fold, all cases (fold "all"), or those chosen; of them so many."""
    if cases is None and str(fold) != "all":
        cases = f"val:{fold}"
    return Volumes([dataset], n_cases, cases, device)


def draw(model: TrainedModel, volumes: Volumes, count: int, seed: int) -> list[Patch]:
    """Patches from the cases in turn. Every second one is centred on a voxel of a random structure of the model's that
    the case has, as far as the patch then lies in the volume; the others lie anywhere. The same for the same seed,
    cases and plans.
    """
    found = list(preprocessed(volumes, model))
    plans = PlansManager(model.plans)
    size = plans.get_configuration(model.configuration).patch_size
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
        start = voxels[rng.integers(len(voxels))] - np.array(size) // 2
        start = np.clip(start, 0, np.array(values.shape) - size)
    else:
        start = rng.integers(0, np.array(values.shape) - size + 1)
    inside = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
    image, labels = data[(slice(None), *inside)].copy(), values[inside].copy()
    return (image[:, 0], labels[0]) if flat else (image, labels)
