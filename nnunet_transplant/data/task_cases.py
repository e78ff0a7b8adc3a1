"""Writing the cases of task datasets: what belongs to one case, in all tasks at once, and so many cases at a time."""
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import blosc2
import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_transplant.data.tasks import remap_labels
from nnunet_transplant.errors import TransplantError


@dataclass(frozen=True)
class DataFolder:
    """A folder of preprocessed cases, the configuration that makes it, and where its images come from: linked from
    the parent's folder, or if that is None preprocessed, once for all tasks (shared) or for each of them."""
    identifier: str
    configuration: str
    parent: Path | None
    shared: bool


@dataclass(frozen=True)
class TaskFolders:
    """A task on its way: the hidden folders that it is built in and those that they will be renamed to."""
    name: str
    value_map: dict[int, int]
    dataset_json: dict
    raw: Path
    preprocessed: Path
    final_raw: Path
    final_preprocessed: Path


def for_each_case(work: Callable[[str, dict], None], files: dict[str, dict], num_processes: int,
                  progress: bool) -> None:
    """work(case, its files) for every case, num_processes at a time. The first error stops it."""
    bar = partial(tqdm, desc="preprocessing cases", total=len(files), disable=not progress)
    if num_processes <= 1:
        for case, case_files in bar(files.items()):
            work(case, case_files)
        return
    with ProcessPoolExecutor(min(num_processes, len(files)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, case, case_files) for case, case_files in files.items()]
        try:
            for future in bar(as_completed(futures)):
                future.result()
        except BrokenProcessPool as error:
            raise TransplantError("a background process died, most likely for lack of memory: try a smaller -np"
                                  ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_case(case: str, files: dict, targets: Sequence[TaskFolders], folders: Sequence[DataFolder],
              plans: dict) -> None:
    """Everything that belongs to one case, in all tasks."""
    manager = PlansManager(plans)
    reader = manager.image_reader_writer_class()
    try:
        image, properties = reader.read_images(files["images"])
        parent_seg, seg_properties = reader.read_seg(files["label"])
    except (RuntimeError, AssertionError, ValueError) as error:
        raise TransplantError(f"cannot read the images or the label map of case {case}: {error}") from error
    if image.shape[1:] != parent_seg.shape[1:]:
        raise TransplantError(f"case {case}: the images have the shape {image.shape[1:]}, the label map has "
                              f"{parent_seg.shape[1:]}")
    for target in targets:
        label_name = f"{case}{target.dataset_json['file_ending']}"
        label_file = target.raw / "labelsTr" / label_name
        try:
            seg = remap_labels(parent_seg, target.value_map)
        except TransplantError as error:
            raise TransplantError(f"{files['label']}: {error}") from error
        reader.write_seg(seg[0], str(label_file), seg_properties)
        shutil.copyfile(label_file, target.preprocessed / "gt_segmentations" / label_name)
        seg, _ = reader.read_seg(str(label_file))
        for folder in folders:
            configuration = manager.get_configuration(folder.configuration)
            data_folder = target.preprocessed / folder.identifier
            if folder.parent is not None:
                image_folder = final_image_folder = folder.parent
            elif folder.shared and target is not targets[0]:
                image_folder = targets[0].preprocessed / folder.identifier
                final_image_folder = targets[0].final_preprocessed / folder.identifier
            else:
                preprocessor = configuration.preprocessor_class(verbose=False)
                preprocessor.run_case_save(str(data_folder / case), files["images"], str(label_file), manager,
                                           configuration, target.dataset_json)
                continue
            _save_labels(data_folder / case, image, seg, deepcopy(properties), manager, configuration,
                         target.dataset_json, image_folder / f"{case}.b2nd")
            _link(image_folder / f"{case}.b2nd", data_folder / f"{case}.b2nd", final_image_folder / f"{case}.b2nd")


def _save_labels(truncated: Path, image: np.ndarray, seg: np.ndarray, properties: dict, manager: PlansManager,
                 configuration: ConfigurationManager, dataset_json: dict, preprocessed_image: Path) -> None:
    """CASE_seg.b2nd and CASE.pkl as nnU-Net's preprocessor writes them, without the images' normalisation, resampling
    and compression. image: (channels, x, y, z), seg: (1, x, y, z), both as read."""
    labels_only = ConfigurationManager({
        **configuration.configuration, "resampling_fn_data": "no_resampling_hack", "resampling_fn_data_kwargs": {},
        "normalization_schemes": ["NoNormalization"] * len(image), "use_mask_for_norm": [False] * len(image)})
    _, seg, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        image, seg, properties, manager, labels_only, dataset_json)
    shape = blosc2.open(str(preprocessed_image), mode="r").shape
    if tuple(shape) != (len(image), *seg.shape[1:]):
        raise TransplantError(f"{preprocessed_image} has the shape {shape}, but the raw images and the plans give "
                              f"{(len(image), *seg.shape[1:])}: preprocess its dataset again")
    seg = seg.astype(np.int16, copy=False)
    blocks, chunks = comp_blosc2_params(seg.shape, tuple(configuration.patch_size), seg.itemsize)
    # nnU-Net chooses how to compress; the one voxel that it writes as the image makes room for the link
    voxel = (1, 1, 1, 1)
    nnUNetDatasetBlosc2.save_case(np.zeros(voxel, np.float32), seg, properties, str(truncated), chunks=voxel,
                                  blocks=voxel, chunks_seg=chunks, blocks_seg=blocks)
    truncated.with_name(f"{truncated.name}.b2nd").unlink()


def _link(source: Path, target: Path, final_source: Path) -> None:
    """Hard-link source as target, or where the file systems do not allow it, a symbolic link to where source will be
    when the folders have their final names."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        target.symlink_to(os.path.realpath(final_source))
