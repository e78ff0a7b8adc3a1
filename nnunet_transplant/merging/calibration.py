"""The volumes that data-driven methods look at, preprocessed as the models want them and cut into patches."""
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from tqdm import tqdm

from nnunet_transplant.architecture import build_network, canonical_names
from nnunet_transplant.data.cases import Cases, choose_cases, open_cases, open_splits
from nnunet_transplant.data.images import check_images
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import head_rows, origin
from nnunet_transplant.labels import foreground_values, has_regions
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.nnunet import nnUNetTrainer

IGNORED = -1  # in targets: voxels of the dataset's ignore label


@dataclass(frozen=True)
class Volumes:
    """Which volumes a method may look at.

    datasets: names or ids of datasets in nnUNet_raw.
    cases: of each dataset, as nnunet_transplant_split_tasks takes them (FILE, train:K, val:K); all by default.
    n_cases: how many of them to take of each dataset, spread evenly over the sorted names.
    device: where the networks run, "cpu" or "cuda".
    """
    datasets: Sequence[str | int]
    n_cases: int = 8
    cases: str | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Patch:
    """A patch of a preprocessed volume, of the plans' patch size."""
    image: torch.Tensor        # (channels, *patch_size), float32
    values: np.ndarray | None  # (*patch_size): the dataset's own label values, where the case has a label map
    cases: Cases               # the dataset it comes from


@dataclass(frozen=True)
class Calibration:
    """Patches of real volumes, and the networks to run on them: on `device`, without deep supervision, in eval mode."""
    models: Sequence[TrainedModel]
    tensors: Sequence[Mapping[str, torch.Tensor]]  # of each model's network, by canonical name: aligned, where they are
    dataset_json: dict[str, Any]         # of the merged model
    heads: dict[str, torch.Tensor]       # of the merged model, by canonical name
    trainer: type[nnUNetTrainer]
    patches: Sequence[Patch]
    volumes: Volumes
    progress: bool = False
    found: dict[str, Any] = field(default_factory=dict)  # what a method found out, for merge.json

    @property
    def device(self) -> torch.device:
        return torch.device(self.volumes.device)

    @property
    def configuration(self) -> ConfigurationManager:
        return PlansManager(self.models[0].plans).get_configuration(self.models[0].configuration)

    def network(self, model: int) -> nn.Module:
        """One model's own network."""
        return self._network(self.models[model].dataset_json, self.tensors[model])

    def merged_network(self, merged: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """A network with the merged labels and the merged tensors, by canonical name. Without them: with the merged
        heads; the rest of its weights are the first model's, to be replaced."""
        return self._network(self.dataset_json, {**self.tensors[0], **self.heads} if merged is None else merged)

    def _network(self, dataset_json: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        first = self.models[0]
        network = build_network(first.plans, first.configuration, dataset_json, self.trainer, deep_supervision=False)
        network.load_state_dict({name: tensors[first.layout.canonical[name]] for name in first.layout.shapes})
        return network.to(self.device).eval().requires_grad_(False)

    def images(self, patches: Sequence[Patch]) -> torch.Tensor:
        """A batch (patches, channels, *patch_size)."""
        return torch.stack([patch.image for patch in patches]).to(self.device)

    def targets(self, patches: Sequence[Patch], dataset_json: dict[str, Any] | None = None) -> torch.Tensor:
        """What a model with these labels (default: the merged ones) should say: (patches, *patch_size) with the head's
        rows for a softmax head, (patches, rows, *patch_size) of 0 and 1 for regions; IGNORED where the dataset ignores.

        Raises TransplantError for a dataset that lacks a structure, or the label map of a case.
        """
        labels = self.dataset_json if dataset_json is None else dataset_json
        return torch.from_numpy(np.stack([self._target(patch, labels) for patch in patches])).to(self.device)

    def _target(self, patch: Patch, dataset_json: dict[str, Any]) -> np.ndarray:
        if patch.values is None:
            raise TransplantError(f"{patch.cases.dataset} has cases without labels, which this method needs")
        rows = head_rows(self.models[0].plans, dataset_json)
        regions = has_regions(dataset_json["labels"])
        target = np.zeros(((len(rows),) if regions else ()) + patch.values.shape, np.int64)
        own = foreground_values(patch.cases.dataset_json["labels"])
        for structure, row in rows.items():
            parts = origin(dataset_json, structure)
            missing = [part for part in parts if part not in own]
            if missing:
                raise TransplantError(f"{patch.cases.dataset} has no label {missing[0]}, which {structure} consists of")
            mask = np.isin(patch.values, [value for part in parts for value in own[part]])
            if regions:
                target[row] = mask
            else:
                target[mask] = row
        ignore = patch.cases.dataset_json["labels"].get("ignore")
        if ignore is not None:
            target[..., patch.values == ignore] = IGNORED
        return target

    def bar(self, items: Any, what: str) -> tqdm:
        return tqdm(items, desc=what, delay=3, disable=not self.progress)

    def provenance(self) -> dict[str, Any]:
        cases = {patch.cases.dataset: list(patch.cases.files) for patch in self.patches}
        return {"datasets": cases, "n_cases": self.volumes.n_cases, "cases": self.volumes.cases,
                "device": self.volumes.device} | self.found


def module_weights(network: nn.Module) -> dict[str, nn.Module]:
    """Canonical tensor name -> the module whose `weight` it is."""
    canonical = canonical_names(network)
    return {canonical[f"{name}.weight"]: module for name, module in network.named_modules()
            if f"{name}.weight" in canonical}


def open_calibration(volumes: Volumes, models: Sequence[TrainedModel], dataset_json: dict[str, Any],
                     heads: dict[str, torch.Tensor], trainer: type[nnUNetTrainer],
                     progress: bool = False) -> Calibration:
    """Read and preprocess volumes by the models' plans and cut them into patches side by side.

    Raises TransplantError for datasets, cases or channels that are not there, and for second stages of a cascade.
    """
    patches = []
    bar = tqdm(preprocessed(volumes, models[0]), desc="reading volumes", delay=3, disable=not progress)
    patch_size = PlansManager(models[0].plans).get_configuration(models[0].configuration).patch_size
    for data, values, cases in bar:
        cut = _cut(data, np.zeros(data.shape[1:]) if values is None else values, patch_size, cases)
        patches += cut if values is not None else [replace(patch, values=None) for patch in cut]
    return Calibration(models, [model.tensors() for model in models], dataset_json, heads, trainer, patches, volumes,
                       progress)


def preprocessed(volumes: Volumes, model: TrainedModel) -> Iterator[tuple[np.ndarray, np.ndarray | None, Cases]]:
    """Each volume as the model's plans preprocess it: image (channels, x, y, z), label values (x, y, z) or None where
    the case has no label map, and the dataset's chosen cases."""
    if volumes.n_cases < 1:
        raise TransplantError(f"-n_cases must be at least 1, not {volumes.n_cases}")
    volumes_of = [_choose(open_cases(dataset), volumes) for dataset in volumes.datasets]
    for cases in volumes_of:
        check_images({case: files["images"] for case, files in cases.files.items()}, cases.dataset_json["file_ending"],
                     cases.dataset, "the model", model.plans, model.dataset_json)
    plans = PlansManager(model.plans)
    configuration = plans.get_configuration(model.configuration)
    if configuration.previous_stage_name is not None:
        raise TransplantError("methods that look at volumes cannot run the second stage of a cascade")
    preprocessor = configuration.preprocessor_class(verbose=False)
    for cases in volumes_of:
        for case, files in cases.files.items():
            labels = files["label"] if Path(files["label"]).is_file() else None
            try:
                data, seg, _ = preprocessor.run_case(files["images"], labels, plans, configuration, cases.dataset_json)
            except Exception as error:  # the readers and the resampling meet unfit images with any exception
                raise TransplantError(f"nnU-Net cannot read and preprocess case {case} of {cases.dataset} "
                                      f"({type(error).__name__}: {' '.join(str(error).split())})") from error
            yield np.asarray(data, np.float32), np.asarray(seg)[0] if labels else None, cases


def _choose(cases: Cases, volumes: Volumes) -> Cases:
    names = list(cases.files)
    if volumes.cases is not None:
        names = choose_cases(volumes.cases, names, open_splits(cases.dataset))
    step = max(1.0, len(names) / volumes.n_cases)
    return cases.chosen([names[int(i * step)] for i in range(min(volumes.n_cases, len(names)))], labelled=False)


def _cut(data: np.ndarray, seg: np.ndarray, patch_size: Sequence[int], cases: Cases) -> list[Patch]:
    """Patches side by side that cover the volume, padded with zeros where it is smaller; 2d patches slice by slice."""
    if len(patch_size) < seg.ndim:
        return [patch for index in range(len(seg)) for patch in _cut(data[:, index], seg[index], patch_size, cases)]
    data, seg = padded(data, seg, patch_size)
    steps = compute_steps_for_sliding_window(seg.shape, tuple(patch_size), 1.0)
    patches = []
    for corner in itertools.product(*steps):
        inside = tuple(slice(start, start + size) for start, size in zip(corner, patch_size, strict=True))
        patches.append(Patch(torch.from_numpy(data[(slice(None), *inside)].copy()), seg[inside].copy(), cases))
    return patches


def padded(data: np.ndarray, seg: np.ndarray, patch_size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """A volume (channels, x, y, z) and its labels with zeros around them, so that a patch fits in."""
    missing = [max(0, size - have) for size, have in zip(patch_size, seg.shape, strict=True)]
    padding = [(pad // 2, pad - pad // 2) for pad in missing]
    return np.pad(data, [(0, 0), *padding]), np.pad(seg, padding)
