"""The volumes that steps of a merge look at, preprocessed as the models want them and cut into patches."""
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_transplant.data.cases import Cases, choose_cases, open_cases, open_splits, spread
from nnunet_transplant.data.images import check_images
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import head_rows, origin
from nnunet_transplant.labels import foreground_values, has_regions
from nnunet_transplant.model_folder import TrainedModel

IGNORED = -1  # in targets: voxels of the dataset's ignore label
N_CASES = 8   # volumes of a dataset, unless told


@dataclass(frozen=True)
class Volumes:
    """Which volumes may be looked at.

    datasets: names or ids of datasets in nnUNet_raw.
    n_cases: how many of them to take of each dataset, spread evenly over the sorted names.
    cases: of each dataset, as nnunet_transplant_split_tasks takes them (FILE, train:K, val:K); all by default.
    """
    datasets: Sequence[str | int]
    n_cases: int = N_CASES
    cases: str | None = None


@dataclass(frozen=True)
class Patch:
    """A patch of a preprocessed volume, of the plans' patch size."""
    image: torch.Tensor        # (channels, *patch_size), float32
    values: np.ndarray | None  # (*patch_size): the dataset's own label values, where the case has a label map
    cases: Cases               # the dataset it comes from


def volumes_of(dataset: str | int, fold: str | int, n_cases: int, cases: str | None = None) -> Volumes:
    """The validation cases of a fold, all cases (fold "all"), or those chosen; of them so many."""
    if cases is None and str(fold) != "all":
        cases = f"val:{fold}"
    return Volumes([dataset], n_cases, cases)


def configuration_of(model: TrainedModel) -> ConfigurationManager:
    return PlansManager(model.plans).get_configuration(model.configuration)


def open_patches(volumes: Volumes, model: TrainedModel, progress: bool = False) -> list[Patch]:
    """Read and preprocess volumes by a model's plans and cut them into patches side by side.

    Raises TransplantError for datasets, cases or channels that are not there, and for second stages of a cascade.
    """
    patches: list[Patch] = []
    patch_size = configuration_of(model).patch_size
    for data, values, cases in tqdm(preprocessed(volumes, model), desc="reading volumes", delay=3,
                                    disable=not progress):
        cut = _cut(data, np.zeros(data.shape[1:]) if values is None else values, patch_size, cases)
        patches += cut if values is not None else [replace(patch, values=None) for patch in cut]
    return patches


def preprocessed(volumes: Volumes, model: TrainedModel) -> Iterator[tuple[np.ndarray, np.ndarray | None, Cases]]:
    """Each of the chosen volumes, see `preprocess`."""
    return preprocess([_choose(open_cases(dataset), volumes) for dataset in volumes.datasets], model)


def preprocess(datasets: Sequence[Cases], model: TrainedModel) -> Iterator[tuple[np.ndarray, np.ndarray | None, Cases]]:
    """Each volume as the model's plans preprocess it: image (channels, x, y, z), label values (x, y, z) or None where
    the case has no label map, and the dataset's cases."""
    for cases in datasets:
        check_images({case: files["images"] for case, files in cases.files.items()}, cases.dataset_json["file_ending"],
                     cases.dataset, "the model", model.plans, model.dataset_json)
    plans, configuration = PlansManager(model.plans), configuration_of(model)
    if configuration.previous_stage_name is not None:
        raise TransplantError("steps that look at volumes cannot run the second stage of a cascade")
    preprocessor = configuration.preprocessor_class(verbose=False)
    for cases in datasets:
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
    return cases.chosen(spread(names, volumes.n_cases), labelled=False)


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
    return pad_nd_image(data, patch_size), pad_nd_image(seg, patch_size)


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def images_of(patches: Sequence[Patch], device: torch.device) -> torch.Tensor:
    """(patches, channels, *patch_size)."""
    return torch.stack([patch.image for patch in patches]).to(device)


def targets_of(patches: Sequence[Patch], plans: Mapping[str, Any], dataset_json: Mapping[str, Any],
               device: torch.device) -> torch.Tensor:
    """What a model with these labels should say: (patches, *patch_size) with the head's rows for a softmax head,
    (patches, rows, *patch_size) of 0 and 1 for regions; IGNORED where the dataset ignores.

    Raises TransplantError for a dataset that lacks a structure, or the label map of a case.
    """
    return torch.from_numpy(np.stack([_target(patch, plans, dataset_json) for patch in patches])).to(device)


def _target(patch: Patch, plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> np.ndarray:
    if patch.values is None:
        raise TransplantError(f"{patch.cases.dataset} has cases without labels, which this step needs")
    rows = head_rows(plans, dataset_json)
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
