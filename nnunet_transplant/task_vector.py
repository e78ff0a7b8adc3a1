"""tau = theta - theta_0: the base that task vectors start from, and the file a model folder keeps it in."""
from collections.abc import Mapping
from pathlib import Path

import torch

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.errors import TransplantError

RECORD = "nnunet_transplant"  # our key in checkpoints and in dataset.json


def theta_0_path(model_folder: Path, sha256: str) -> Path:
    """Where a model folder keeps the base its folds were fine-tuned from; folds may differ in it."""
    return model_folder / f"theta_0_{sha256[:16]}.safetensors"


def read_theta_0(path: Path) -> dict[str, torch.Tensor]:
    """theta_0 by canonical names. Raises TransplantError where the file is missing, damaged or not what it says."""
    tensors, metadata = checkpoints.read_safetensors(path)
    if checkpoints.tensors_sha256(tensors) != metadata.get("sha256"):
        raise TransplantError(f"{path} does not hold the weights it names: its SHA-256 differs")
    return tensors


def write_theta_0(theta_0: Mapping[str, torch.Tensor], path: Path) -> None:
    checkpoints.write_safetensors(theta_0, path, {"sha256": checkpoints.tensors_sha256(theta_0)})
