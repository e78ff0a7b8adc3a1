"""nnU-Net's own predictor for models in memory: trained folds as an ensemble, or a merged model."""
import contextlib
import io
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_transplant.architecture import build_network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging import MergedModel
from nnunet_transplant.model_folder import TrainedModel


def torch_device(name: str) -> torch.device:
    """The device by nnU-Net's -device names, with nnU-Net's thread settings. Raises TransplantError if it is absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name not in available:
        raise TransplantError(f"-device must be cpu, cuda or mps, not {name}")
    if not available[name]:
        raise TransplantError(f"this machine has no {name} device: choose another -device, such as cpu")
    torch.set_num_threads(1 if name == "cuda" else multiprocessing.cpu_count())
    return torch.device(name)


def predictor(models: MergedModel | Sequence[TrainedModel], device: torch.device, step_size: float = 0.5,
              mirroring: bool = True, on_device: bool = True, verbose: bool = False,
              progress_bar: bool = True) -> nnUNetPredictor:
    """An nnUNetPredictor as nnU-Net itself would initialise it from the model's folder: several folds are an ensemble.
    """
    first = models if isinstance(models, MergedModel) else models[0]
    with contextlib.redirect_stdout(io.StringIO()):  # it says on a CPU that it is not on a GPU
        result = nnUNetPredictor(
            tile_step_size=step_size, use_gaussian=True, use_mirroring=mirroring,
            perform_everything_on_device=on_device, device=device, verbose=verbose,
            verbose_preprocessing=verbose, allow_tqdm=progress_bar)
    parameters = [models.weights] if isinstance(models, MergedModel) else [model.state_dict() for model in models]
    network = build_network(first.plans, first.configuration, first.dataset_json, first.trainer,
                            deep_supervision=False)
    plans = PlansManager(first.plans)
    result.manual_initialization(network, plans, plans.get_configuration(first.configuration), parameters,
                                 first.dataset_json, first.trainer.__name__, first.mirroring_axes)
    return result


def find_cases(images: Path, predictor: nnUNetPredictor) -> list[list[str]]:
    """The files of every case in a folder of images. Raises TransplantError where there are none, or where a case has
    not as many channels as the model."""
    if not images.is_dir():
        raise TransplantError(f"there is no folder {images}")
    ending = predictor.dataset_json["file_ending"]
    if not any(images.glob(f"*_[0-9][0-9][0-9][0-9]{ending}")):
        raise TransplantError(f"{images} has no image CASE_0000{ending}")
    cases = create_lists_from_splitted_dataset_folder(str(images), ending, num_processes=1)
    channels = len(predictor.dataset_json.get("channel_names", predictor.dataset_json.get("modality")))
    for files in cases:
        if len(files) != channels:
            raise TransplantError(f"the model takes {channels} channel{'s' * (channels > 1)}, but {images} has "
                                  f"{len(files)} for {Path(files[0]).name.rpartition('_')[0]}")
    return cases


@contextlib.contextmanager
def overflow_explained() -> Iterator[None]:
    """nnU-Net sums logits in half precision and raises RuntimeError where they overflow, which merged weights can
    cause: say so."""
    try:
        yield
    except RuntimeError as error:
        if "Encountered inf" not in str(error):
            raise
        raise TransplantError("the merged weights give logits beyond half precision, in which nnU-Net sums them: merge "
                              "with smaller -weights or -lambda") from error
