"""The volumes that steps of a merge look at, preprocessed as the models want them and cut into patches."""
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_transplant.data.cases import Cases, choose_cases, open_cases, open_splits, spread
from nnunet_transplant.data.images import check_images
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import read_json
from nnunet_transplant.heads import head_rows, origin
from nnunet_transplant.labels import foreground_values, has_regions
from nnunet_transplant.mergeable import preprocess_alike
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.parallel import ahead
from nnunet_transplant.steps import N_PATCHES

IGNORED = -1  # in targets: voxels of the dataset's ignore label
N_CASES = 8     # volumes of a dataset, unless told
SEED = 0        # of the places of patches
N_HELD_BACK = 8  # patches of all volumes together that no step looks at, to check the merge on
READERS = 3     # volumes that are read at the same time, as nnUNetv2_predict does

Look = Callable[[int, np.ndarray], np.ndarray]  # running number, image -> where something is


@dataclass(frozen=True)
class Volumes:
    """Which volumes may be looked at.

    datasets: names or ids of datasets in nnUNet_raw.
    n_cases: how many of them to take of each dataset, spread evenly over the sorted names.
    cases: of each dataset, as nnunet_transplant_split_tasks takes them (FILE, train:K, val:K); all by default.
    n_patches: how many patches of all of them together are looked at, at most; None: what steps want.
    """
    datasets: Sequence[str | int]
    n_cases: int = N_CASES
    cases: str | None = None
    n_patches: int | None = None


@dataclass(frozen=True)
class Patch:
    """A patch of a preprocessed volume, of the plans' patch size."""
    image: torch.Tensor        # (channels, *patch_size), float32
    values: np.ndarray | None  # (*patch_size): the dataset's own label values, where the case has a label map
    cases: Cases               # the dataset it comes from
    held_back: bool = False    # it is there to check a merge on, no step looks at it


def volumes_of(dataset: str | int, fold: str | int, n_cases: int, cases: str | None = None) -> Volumes:
    """The validation cases of a fold, all cases (fold "all"), or those chosen; of them so many."""
    if cases is None and str(fold) != "all":
        cases = f"val:{fold}"
    return Volumes([dataset], n_cases, cases)


def configuration_of(model: TrainedModel) -> ConfigurationManager:
    return PlansManager(model.plans).get_configuration(model.configuration)


def open_patches(volumes: Volumes, model: TrainedModel, look: Look | None = None,
                 progress: bool = False, labels: bool = True, readers: int = READERS,
                 n_held_back: int = 0) -> list[Patch]:
    """Read and preprocess volumes by a model's plans and keep patches of them: all that cover them, side by side, where
    these are not too many. Otherwise every volume gives as many as the others: half of them centred on a voxel where
    there is something to segment, as far as they then lie in the volume, the others out of those that cover it. The
    same for the same volumes.

    look: a mask of something to segment, which may be coarser than the volume, for each such patch; without it, or
        where it is empty, patches lie anywhere.
    labels: whether to read the label maps, too, where there are any. readers: volumes read at the same time; a CT takes
        1.5 GB while it is resampled. n_held_back: how many more patches, held back, out of those that cover the volumes
        and are not taken.
    Raises TransplantError for datasets, cases or channels that are not there, and for second stages of a cascade.
    """
    n_patches = N_PATCHES if volumes.n_patches is None else volumes.n_patches
    if n_patches < 1:
        raise TransplantError(f"-n_patches must be at least 1, not {n_patches}")
    chosen = [_choose(open_cases(dataset), volumes) for dataset in volumes.datasets]
    each = math.ceil(n_patches / len(chosen))  # of a volume that gives no patch nothing need be read
    chosen = [cases.chosen(spread(list(cases.files), each), labelled=False) for cases in chosen]
    count = sum(len(cases.files) for cases in chosen)
    patches: list[Patch] = []
    held_back: list[Patch] = []
    size = configuration_of(model).patch_size
    numbers = itertools.count()
    see = None if look is None else lambda image: look(next(numbers), image)
    bar = tqdm(preprocess(chosen, model, labels, readers), desc="reading volumes", total=count, delay=3,
               disable=not progress)
    for index, (data, values, cases) in enumerate(bar):
        most = math.ceil((n_patches - len(patches)) / (count - index))
        more = math.ceil((n_held_back - len(held_back)) / (count - index))
        found = cut(data, values, size, most, see, index, more)
        patches += [Patch(torch.from_numpy(image), there, cases) for image, there in found[:most]]
        held_back += [Patch(torch.from_numpy(image), there, cases, True) for image, there in found[most:]]
    return patches + held_back


def cut(data: np.ndarray, values: np.ndarray | None, size: Sequence[int], most: int,
        look: Callable[[np.ndarray], np.ndarray] | None, seed: int,
        more: int = 0) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """At most so many patches of a volume (channels, x, y, z), with their labels, and behind these more that are held
    back: see `open_patches`. 2d patches are slices."""
    flat = len(size) < data.ndim - 1
    size = (1, *size) if flat else tuple(size)
    whole = pad_nd_image(data, size)
    labels = None if values is None else pad_nd_image(values, size)
    shape = whole.shape[1:]
    corners = list(itertools.product(*compute_steps_for_sliding_window(shape, size, 1.0)))
    if len(corners) > most:
        rng = np.random.default_rng([SEED, seed])
        masks = [] if look is None else [look(data) for _ in range(most // 2)]
        around = [_around(mask, data.shape[1:], shape, size, rng) for mask in masks if mask.any()]
        order, others = rng.permutation(len(corners)), most - len(around)
        corners = [*around, *(corners[i] for part in (order[:others], order[others:others + more])
                              for i in sorted(part))]
    found = []
    for corner in corners:
        inside = tuple(slice(start, start + length) for start, length in zip(corner, size, strict=True))
        image = whole[(slice(None), *inside)].copy()
        part = None if labels is None else labels[inside].copy()
        found.append((image[:, 0], None if part is None else part[0]) if flat else (image, part))
    return found


def _around(there: np.ndarray, inner: Sequence[int], shape: Sequence[int], size: Sequence[int],
            rng: np.random.Generator) -> tuple[int, ...]:
    """The corner of a patch around a random voxel of a mask, which may be coarser than the volume. inner, shape: of the
    volume before and after it was padded."""
    voxels = np.argwhere(there)
    middle = (2 * voxels[rng.integers(len(voxels))] + 1) * np.array(inner) // (2 * np.array(there.shape))
    before = (np.array(shape) - np.array(inner)) // 2
    return tuple(np.clip(middle + before - np.array(size) // 2, 0, np.array(shape) - np.array(size)).tolist())


def preprocessed(volumes: Volumes, model: TrainedModel) -> Iterator[tuple[np.ndarray, np.ndarray | None, Cases]]:
    """Each of the chosen volumes, see `preprocess`."""
    return preprocess([_choose(open_cases(dataset), volumes) for dataset in volumes.datasets], model)


def preprocess(datasets: Sequence[Cases], model: TrainedModel, labels: bool = True,
               readers: int = READERS) -> Iterator[tuple[np.ndarray, np.ndarray | None, Cases]]:
    """Each volume as the model's plans preprocess it: image (channels, x, y, z), label values (x, y, z) or None where
    the case has no label map or `labels` is False, and the dataset's cases. What nnUNet_preprocessed holds so is read
    from there. Several are read at the same time, on threads: what takes long in it lets others work."""
    for cases in datasets:
        check_images({case: files["images"] for case, files in cases.files.items()}, cases.dataset_json["file_ending"],
                     cases.dataset, "the model", model.plans, model.dataset_json)
    plans, configuration = PlansManager(model.plans), configuration_of(model)
    if configuration.previous_stage_name is not None:
        raise TransplantError("steps that look at volumes cannot run the second stage of a cascade")
    preprocessor = configuration.preprocessor_class(verbose=False)

    def read(what: tuple[Cases, Path | None, str]) -> tuple[np.ndarray, np.ndarray | None, Cases]:
        cases, there, case = what
        files = cases.files[case]
        label = files["label"] if labels and Path(files["label"]).is_file() else None
        if there is not None and (there / f"{case}.b2nd").is_file():
            image, seg, *_ = nnUNetDatasetBlosc2(str(there), [case]).load_case(case)
            return np.asarray(image[:], np.float32), None if label is None else np.asarray(seg[:])[0], cases
        try:
            data, seg, _ = preprocessor.run_case(files["images"], label, plans, configuration, cases.dataset_json)
        except Exception as error:  # the readers and the resampling meet unfit images with any exception
            raise TransplantError(f"nnU-Net cannot read and preprocess case {case} of {cases.dataset} "
                                  f"({type(error).__name__}: {' '.join(str(error).split())})") from error
        return np.asarray(data, np.float32), None if label is None else np.asarray(seg)[0], cases

    wanted = [(cases, _preprocessed_folder(cases, model), case) for cases in datasets for case in cases.files]
    return ahead(read, wanted, min(readers, os.cpu_count() or 1))


@dataclass(frozen=True)
class _OfDataset:
    """How a dataset is preprocessed."""
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str


def _preprocessed_folder(cases: Cases, model: TrainedModel) -> Path | None:
    """Where nnUNet_preprocessed holds the cases as the model wants them, if it does: by plans of the same name that
    preprocess alike, the labels too."""
    folder = os.environ.get("nnUNet_preprocessed")
    if folder is None:
        return None
    path = Path(folder) / cases.dataset / f"{model.plans.get('plans_name')}.json"
    if not path.is_file():
        return None
    planned = _OfDataset(read_json(path), cases.dataset_json, model.configuration)
    if model.configuration not in planned.plans.get("configurations", {}) or not preprocess_alike(model, planned):
        return None
    own, wanted = (PlansManager(each.plans).get_configuration(each.configuration) for each in (planned, model))
    for key in ("resampling_fn_seg", "resampling_fn_seg_kwargs"):
        if own.configuration.get(key) != wanted.configuration.get(key):
            return None
    return path.parent / own.data_identifier


def _choose(cases: Cases, volumes: Volumes) -> Cases:
    names = list(cases.files)
    if volumes.cases is not None:
        names = choose_cases(volumes.cases, names, open_splits(cases.dataset))
    return cases.chosen(spread(names, volumes.n_cases), labelled=False)


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
