"""tau = theta - theta_0: the base that task vectors start from, and files to share both.

A task vector file (.safetensors) holds tau.NAME for every tensor of the body and head.NAME for the heads. With a
density, tau.NAME.kept says bit by bit which entries tau.NAME.values has. theta_0 + tau is not always theta in floating
point: where it is not, exact.NAME.index and exact.NAME.values hold theta itself, so that a float32 file is lossless.
The metadata has one key, RECORD, with the JSON object that `Header` describes.
"""
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import parse_json

RECORD = "nnunet_transplant"  # our key in checkpoints, in dataset.json and in the metadata of .safetensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def theta_0_path(model_folder: Path, sha256: str) -> Path:
    """Where a model folder keeps the base its folds were fine-tuned from; folds may differ in it."""
    return model_folder / f"theta_0_{sha256[:16]}.safetensors"


def read_theta_0(path: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """theta_0 by canonical names. Raises TransplantError where the file is missing, damaged, not what it says, or not
    the one of this SHA-256."""
    tensors, metadata = checkpoints.read_safetensors(path)
    found = checkpoints.tensors_sha256(tensors)
    if found != metadata.get("sha256") or sha256 not in (None, found):
        raise TransplantError(f"{path} does not hold the weights it names: its SHA-256 differs")
    return tensors


def write_theta_0(theta_0: Mapping[str, torch.Tensor], path: Path) -> None:
    checkpoints.write_safetensors(theta_0, path, {"sha256": checkpoints.tensors_sha256(theta_0)})


@dataclass(frozen=True)
class Header:
    """What a task vector file says beside its tensors: enough to check the base, to predict and to trace it."""
    theta_0: str                           # SHA-256 of the base
    plans: dict[str, Any]
    dataset_json: dict[str, Any]           # without the paths of patient images
    configuration: str
    trainer_name: str                      # the trainer that builds the network
    mirroring_axes: list[int] | None
    fold: str
    source: dict[str, str]                 # path and sha256 of the checkpoint it was extracted from
    dtype: str
    density: float


def write_task_vector(theta: Mapping[str, torch.Tensor], theta_0: Mapping[str, torch.Tensor], heads: frozenset[str],
                      header: Header, path: Path) -> None:
    """Write theta - theta_0 and the heads of theta; dtype and density as the header says.

    Below density 1 the entries of largest magnitude of the whole task vector are kept.
    """
    dtype = DTYPES[header.dtype]
    exact = header.density == 1 and dtype == torch.float32
    limit = _smallest_kept(theta, theta_0, header.density) if header.density < 1 else 0.0
    tensors = {}
    for name, tensor in theta.items():
        if name in heads:
            tensors[f"head.{name}"] = tensor
        elif not tensor.is_floating_point():
            tensors[f"exact.{name}"] = tensor
        else:
            base = theta_0[name].float()
            tau = tensor.float() - base
            if header.density < 1:
                kept = tau.abs() >= limit
                tensors[f"tau.{name}.kept"] = torch.from_numpy(np.packbits(kept.reshape(-1).numpy()))
                tensors[f"tau.{name}.values"] = tau[kept].to(dtype)
                continue
            tensors[f"tau.{name}"] = tau.to(dtype)
            off = (base + tau != tensor.float()).reshape(-1).nonzero()[:, 0] if exact else torch.empty(0)
            if len(off):
                tensors[f"exact.{name}.index"] = off
                tensors[f"exact.{name}.values"] = tensor.reshape(-1)[off]
    checkpoints.write_safetensors(tensors, path, {RECORD: json.dumps(asdict(header))})


def _smallest_kept(theta: Mapping[str, torch.Tensor], theta_0: Mapping[str, torch.Tensor], density: float) -> float:
    magnitudes = np.concatenate([(theta[name].float() - base.float()).abs().reshape(-1).numpy()
                                 for name, base in theta_0.items() if base.is_floating_point()])
    keep = max(1, round(density * magnitudes.size))
    return float(np.partition(magnitudes, magnitudes.size - keep)[magnitudes.size - keep])


def read_header(path: Path) -> Header:
    """Raises TransplantError for a file that is no task vector."""
    _, metadata = checkpoints.read_safetensors(path, tensors=False)
    try:
        header = Header(**parse_json(metadata[RECORD], str(path)))
        kinds = {"theta_0": str, "plans": dict, "dataset_json": dict, "configuration": str, "trainer_name": str,
                 "fold": str, "source": dict}
        if not all(isinstance(getattr(header, name), kind) for name, kind in kinds.items()):
            raise TypeError
        if any(type(axis) is not int or not 0 <= axis <= 2 for axis in header.mirroring_axes or ()):
            raise ValueError
        names = (header.trainer_name, header.configuration, header.fold)  # the last becomes the name of a folder
        if not (header.trainer_name.isidentifier() and all(name.isprintable() and len(name) < 200 for name in names)
                and header.fold == Path(header.fold).name):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TransplantError(f"{path} is not a task vector file of nnunet_transplant_extract") from error
    return header


def apply_task_vector(path: Path, theta_0: Mapping[str, torch.Tensor],
                      shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """theta by canonical names, in the order of `shapes`: theta_0 + tau, and the heads. Tensors have theta_0's types.

    Raises TransplantError where the file does not fit these shapes.
    """
    tensors, _ = checkpoints.read_safetensors(path)
    try:
        theta = {name: _restored(name, tensors, theta_0, shape) for name, shape in shapes.items()}
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise TransplantError(f"{path} does not fit the network of its plans") from error
    return theta


def _restored(name: str, tensors: Mapping[str, torch.Tensor], theta_0: Mapping[str, torch.Tensor],
              shape: tuple[int, ...]) -> torch.Tensor:
    stored = tensors.get(f"head.{name}", tensors.get(f"exact.{name}"))
    if stored is None:
        base = theta_0[name].float()
        if f"tau.{name}.kept" in tensors:
            bits = np.unpackbits(tensors[f"tau.{name}.kept"].numpy(), count=base.numel()).astype(bool)
            tau = torch.zeros(base.numel())
            tau[torch.from_numpy(bits)] = tensors[f"tau.{name}.values"].float()
            tau = tau.reshape(base.shape)
        else:
            tau = tensors[f"tau.{name}"].float()
        stored = base + tau
        if f"exact.{name}.index" in tensors:
            stored.view(-1)[tensors[f"exact.{name}.index"]] = tensors[f"exact.{name}.values"].float()
        stored = stored.to(theta_0[name].dtype)
    if tuple(stored.shape) != shape:
        raise ValueError(name)
    return stored
