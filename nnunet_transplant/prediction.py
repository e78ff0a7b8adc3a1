"""nnU-Net's own predictor for models in memory: trained folds as an ensemble, or a merged model."""
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from tqdm import tqdm

from nnunet_transplant.architecture import build_network
from nnunet_transplant.data.images import check_images
from nnunet_transplant.device import AUTO, threads_of_nnunet, torch_device
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import MergedModel
from nnunet_transplant.model_folder import TrainedModel

HALF_PRECISION = ("the merged weights give logits beyond half precision, in which nnU-Net sums them: merge with "
                  "smaller -weights or -lambda")
WINDOWS_AFTER = 3.0  # seconds after which a case has a bar of its windows


class BatchPredictor(nnUNetPredictor):
    """nnU-Net's sliding window, as many windows at a time as the plans' batch has; the logits are the same up to
    rounding, and not finite where half precision is not enough for them. On a CPU torch has fast convolutions for
    batches only, unless the images are large; a GPU is better filled."""

    def _internal_predict_sliding_window_return_logits(self, data: torch.Tensor, slicers: Sequence[tuple],
                                                       do_on_device: bool = True) -> torch.Tensor:
        data = data.to(self.device if do_on_device else "cpu")
        patch_size, batch_size = self.configuration_manager.patch_size, self.configuration_manager.batch_size
        gaussian = compute_gaussian(tuple(patch_size), sigma_scale=1 / 8, value_scaling_factor=10, device=data.device)
        logits = data.new_zeros(self.label_manager.num_segmentation_heads, *data.shape[1:], dtype=torch.half)
        weights = data.new_zeros(data.shape[1:], dtype=torch.half)
        for start in range(0, len(slicers), batch_size):
            batch = slicers[start:start + batch_size]
            windows = torch.stack([data[window] for window in batch]).to(self.device)
            for window, prediction in zip(batch, self._internal_maybe_mirror_and_predict(windows), strict=True):
                logits[window] += prediction.to(data.device) * gaussian
                weights[window[1:]] += gaussian
        return logits.div_(weights)


class WatchedPredictor(nnUNetPredictor):
    """nnU-Net's predictor. A case that takes long has a bar of its windows, below another bar, and gone at its end:
    nnU-Net's own bar would leave a line for each."""

    def _internal_predict_sliding_window_return_logits(self, data: torch.Tensor, slicers: Sequence[tuple],
                                                       do_on_device: bool = True) -> torch.Tensor:
        with tqdm(desc="sliding window", total=len(slicers), position=1, leave=False,
                  delay=WINDOWS_AFTER) as self.bar:
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)

    def _internal_maybe_mirror_and_predict(self, x: torch.Tensor) -> torch.Tensor:
        prediction = super()._internal_maybe_mirror_and_predict(x)
        self.bar.update()
        return prediction


def predictor(models: MergedModel | Sequence[MergedModel | TrainedModel], device: torch.device, step_size: float = 0.5,
              mirroring: bool = True, on_device: bool = True, verbose: bool = False, progress_bar: bool = True,
              kind: type[nnUNetPredictor] = nnUNetPredictor) -> nnUNetPredictor:
    """An nnUNetPredictor as nnU-Net itself would initialise it from the model's folder: several folds are an ensemble.
    """
    models = [models] if isinstance(models, MergedModel) else models
    first = models[0]
    with contextlib.redirect_stdout(io.StringIO()):  # it says on a CPU that it is not on a GPU
        result = kind(
            tile_step_size=step_size, use_gaussian=True, use_mirroring=mirroring,
            perform_everything_on_device=on_device, device=device, verbose=verbose,
            verbose_preprocessing=verbose, allow_tqdm=progress_bar)
    parameters = [model.state_dict if isinstance(model, MergedModel) else model.state_dict() for model in models]
    network = build_network(first.plans, first.configuration, first.dataset_json, first.trainer,
                            deep_supervision=False)
    plans = PlansManager(first.plans)
    result.manual_initialization(network, plans, plans.get_configuration(first.configuration), parameters,
                                 first.dataset_json, first.trainer.__name__, first.mirroring_axes)
    return result


def predict_folder(models: Mapping[str, MergedModel], images: Path | str, output: Path | str, *, device: str = AUTO,
                   step_size: float = 0.5, mirroring: bool = True, on_device: bool = True,
                   save_probabilities: bool = False, continue_prediction: bool = False, npp: int = 3, nps: int = 3,
                   prev_stage_predictions: Path | str | None = None, num_parts: int = 1, part_id: int = 0,
                   verbose: bool = False, progress: bool = False) -> Path:
    """Predict a folder of images, with channel numbers as nnU-Net wants them (CASE_0000.nii.gz), as nnUNetv2_predict
    does it with the model written to disk: the same voxels. Several models are an ensemble.

    npp, nps: processes for preprocessing and for export; 0 and 0 starts none. The other options are nnUNetv2_predict's.
    Returns the folder of predictions. Raises TransplantError for missing images or channels, logits that overflow.
    """
    check_prediction_options(step_size, num_parts, part_id)
    images, output = Path(images), Path(output)
    where = torch_device(device)
    threads_of_nnunet(where)
    nnunet = predictor(list(models.values()), where, step_size, mirroring, on_device, verbose, progress)
    if nnunet.configuration_manager.previous_stage_name is not None and not prev_stage_predictions:
        raise TransplantError("this is the second stage of a cascade: give -prev_stage_predictions")
    cases = find_images(images, nnunet)
    ending = nnunet.dataset_json["file_ending"]
    names = [case_name(files, ending) for files in cases]
    if prev_stage_predictions:
        check_previous_stage(Path(prev_stage_predictions), names[part_id::num_parts], ending)
    output.mkdir(parents=True, exist_ok=True)
    options = {"save_probabilities": save_probabilities, "overwrite": not continue_prediction,
               "folder_with_segs_from_prev_stage": None if prev_stage_predictions is None
               else str(prev_stage_predictions)}
    with overflow_explained():
        if npp == 0 and nps == 0:
            part = slice(part_id, None, num_parts)
            nnunet.predict_from_files_sequential(cases[part], [str(output / name) for name in names[part]], **options)
        else:
            nnunet.predict_from_files(str(images), str(output), num_processes_preprocessing=npp,
                                      num_processes_segmentation_export=nps, num_parts=num_parts, part_id=part_id,
                                      **options)
    return output


def check_prediction_options(step_size: float, num_parts: int = 1, part_id: int = 0) -> None:
    if not 0 < step_size <= 1:
        raise TransplantError(f"-step_size must be above 0 and at most 1, not {step_size:g}")
    if not 0 <= part_id < num_parts:
        raise TransplantError(f"-part_id must lie between 0 and {num_parts - 1}, not {part_id}")


def find_images(images: Path, predictor: nnUNetPredictor) -> list[list[str]]:
    """The files of every case in a folder of images. Raises TransplantError where there are none, or where they have
    not as many channels as the model."""
    if not images.is_dir():
        raise TransplantError(f"there is no folder {images}")
    ending = predictor.dataset_json["file_ending"]
    if not any(images.glob(f"*_[0-9][0-9][0-9][0-9]{ending}")):
        raise TransplantError(f"{images} has no image CASE_0000{ending}")
    cases = create_lists_from_splitted_dataset_folder(str(images), ending, num_processes=1)
    check_images({case_name(files, ending): files for files in cases}, ending, str(images), "the model",
                 predictor.plans_manager.plans, predictor.dataset_json)
    return cases


def case_name(files: Sequence[str], ending: str) -> str:
    """CASE of CASE_0000.nii.gz, ..."""
    return Path(files[0]).name[:-len("_0000" + ending)]


def check_previous_stage(folder: Path, cases: Sequence[str], ending: str) -> None:
    """Raise TransplantError unless the previous stage of a cascade has predicted every case."""
    if not folder.is_dir():
        raise TransplantError(f"-prev_stage_predictions: there is no folder {folder}")
    missing = [case for case in cases if not (folder / f"{case}{ending}").is_file()]
    if missing:
        raise TransplantError(f"-prev_stage_predictions: {folder} has no {missing[0]}{ending}"
                              + (f", nor of {len(missing) - 1} more cases" if len(missing) > 1 else "")
                              + ": predict them with the previous stage first")


@contextlib.contextmanager
def overflow_explained() -> Iterator[None]:
    """nnU-Net sums logits in half precision and raises RuntimeError where they overflow, which merged weights can
    cause: say so."""
    try:
        yield
    except RuntimeError as error:
        if "Encountered inf" not in str(error):
            raise
        raise TransplantError(HALF_PRECISION) from error
