"""Read and write nnU-Net checkpoints: safely, lazily, and so that a file is there whole or not at all."""
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nnunet_transplant.errors import TransplantError

# What the pickles of nnU-Net's own checkpoints name beside tensors and plain Python: NumPy scalars in the training log.
_NUMPY_SCALARS: list = [
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "bool")},
    (np.generic.__reduce__(np.float64(0))[0], "numpy._core.multiarray.scalar"),
    (np.generic.__reduce__(np.float64(0))[0], "numpy.core.multiarray.scalar"),  # files written with NumPy 1
]


def read(path: Path, trust: bool = False) -> dict[str, Any]:
    """Read an nnU-Net checkpoint without running code from it and without copying its tensors into memory.

    Tensors are maps of the file: a tensor costs memory only where it is read, the optimiser state none. nnU-Net itself
    loads checkpoints with `weights_only=False`, so a downloaded model can run code there; here it cannot unless
    `trust` is set.

    Raises TransplantError for a missing, damaged or unsafe file, or one that is no nnU-Net v2 checkpoint.
    """
    if not path.is_file():
        raise TransplantError(f"there is no checkpoint {path}")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except Exception as error:
        # Damaged pickles raise nearly anything: RuntimeError, EOFError, KeyError, UnicodeDecodeError, ...
        unsafe = [] if trust else _unsafe_globals(path)
        if unsafe:
            raise TransplantError(
                f"{path} is refused: beside weights it asks for {', '.join(unsafe)}, which can run code. "
                "If you trust its origin, pass --trust_checkpoints") from error
        raise TransplantError(f"{path} is not a complete PyTorch checkpoint (truncated or damaged)") from error
    _check_is_nnunet(checkpoint, path)
    return checkpoint


def _unsafe_globals(path: Path) -> list[str]:
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _check_is_nnunet(checkpoint: Any, path: Path) -> None:
    if not isinstance(checkpoint, dict):
        raise TransplantError(f"{path} is not an nnU-Net v2 checkpoint: it holds no dictionary")
    expected = {"network_weights": dict, "init_args": dict, "trainer_name": str}
    for key, kind in expected.items():
        if not isinstance(checkpoint.get(key), kind):
            raise TransplantError(f"{path} is not an nnU-Net v2 checkpoint: it has no '{key}'")
    if not isinstance(checkpoint["init_args"].get("configuration"), str):
        raise TransplantError(f"{path} is not an nnU-Net v2 checkpoint: it does not say its configuration")
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
               for name, tensor in checkpoint["network_weights"].items()):
        raise TransplantError(f"{path} is not an nnU-Net v2 checkpoint: 'network_weights' holds more than tensors")


def write(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint with `torch.save`, atomically; the same content gives the same bytes.

    Names that share one tensor object are stored once. To an open file torch writes no file name into the archive.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(dict(checkpoint), file)
        except RuntimeError as error:  # torch's writer hides the disk's own words
            raise OSError(f"could not write {path}: {error.__context__ or error}") from error
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors (no two sharing memory) and string metadata as .safetensors, atomically."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  temporary, metadata=dict(metadata))


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file. Raises TransplantError where it is missing or damaged."""
    if not path.is_file():
        raise TransplantError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            # safetensors' handle is no mapping: its keys() is the only way to its names
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TransplantError(f"{path} is not a complete .safetensors file") from error


@contextmanager
def atomic_path(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or a folder to; renamed to `path` at the end, or removed.

    A file replaces an existing one. A folder does so only with `replace`: of two writers of the same folder one wins
    whole, the other gets a TransplantError. What a killed process left of the same target is cleared away first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.old.{os.getpid()}.tmp")
    try:
        yield temporary
        if replace and path.is_dir():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if old.exists():
                os.rename(old, path)
            if path.is_dir():
                raise TransplantError(f"{path} was written by somebody else in the meantime") from error
            raise
    finally:
        _remove(temporary)
        _remove(old)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a target; what one had already moved aside to replace comes back."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_running(left):
            continue
        if left.name.startswith(f".{path.name}.old.") and not path.exists():
            os.rename(left, path)
        else:
            _remove(left)


def _is_running(temporary: Path) -> bool:
    """Whether the process that writes to this temporary name still exists."""
    owner = temporary.name.removesuffix(".tmp").rpartition(".")[2]
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names: what identifies theta_0."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
