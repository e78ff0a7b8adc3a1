"""Read and write nnU-Net checkpoints and .safetensors files: safely and lazily."""
import hashlib
import os
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import MOST_TEXT, atomic_path


class _NumpyType:
    """numpy.dtype in a pickle: types of numbers and no others, which NumPy would make of any size."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise ValueError(code)
        self.type = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.type = self.type.newbyteorder(state[1])


def _numpy_scalar(kind: _NumpyType, data: bytes) -> Any:
    return np.frombuffer(data, kind.type, count=1)[0]


# What the pickles of nnU-Net's checkpoints name: tensors of these types, and the NumPy scalars in the training log.
# What torch takes for safe is more, and some of it can fill the memory.
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8,
           torch.int16, torch.int32, torch.int64}
_NUMPY: list[Any] = [(_NumpyType, "numpy.dtype"), (_numpy_scalar, "numpy._core.multiarray.scalar"),
          (_numpy_scalar, "numpy.core.multiarray.scalar")]  # the last in files written with NumPy 1
_NAMES = {
    *map(str, _DTYPES), *(name for _, name in _NUMPY),
    *(f"torch.{kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Bool", "Byte", "Char", "Short", "Int",
                                          "Long")),
    "torch.storage.UntypedStorage", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.Size",
    "torch.device", "collections.OrderedDict", "_codecs.encode", "builtins.set", "__builtin__.set", "builtins.complex",
    "__builtin__.complex"}


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
        unsafe = [] if trust else sorted(_names_in_pickle(path) - _NAMES)
        if not unsafe:
            with torch.serialization.safe_globals(_NUMPY), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about files that are refused anyway
                checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except Exception as error:
        # Damaged pickles raise nearly anything: RuntimeError, EOFError, KeyError, UnicodeDecodeError, ...
        raise TransplantError(f"{path} is not a complete PyTorch checkpoint (truncated or damaged)") from error
    if unsafe:
        names = ", ".join(name[:80] for name in unsafe[:5])
        raise TransplantError(f"{path} is refused: beside weights it asks for {names}, which can run code or fill the "
                              "memory. If you trust its origin, pass --trust_checkpoints")
    return _checked(checkpoint, path)


def _names_in_pickle(path: Path) -> set[str]:
    """Every function and class that a checkpoint asks for. Raises nearly anything for what is no checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    # torch compresses nothing: a small file that unpacks to a large one is made to fill the memory
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("compressed")
    if any(entry.file_size > MOST_TEXT for entry in entries if "/data/" not in entry.filename):
        raise ValueError("no pickle of nnU-Net's is so long")
    with open(path, "rb") as file:
        pickled = torch._C.PyTorchFileReader(file).get_record("data.pkl")  # the one that torch.load reads
    names: set[str] = set()
    for opcode, value, _ in pickletools.genops(pickled):
        if opcode.proto > 2:
            raise ValueError("not written by torch.save")
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(value).replace(" ", "."))
    return names


def _checked(checkpoint: Any, path: Path) -> dict[str, Any]:
    """The checkpoint as plain dictionaries, with weights that a network can have."""
    def refused(why: str) -> TransplantError:
        return TransplantError(f"{path} is not an nnU-Net v2 checkpoint: {why}")

    if not isinstance(checkpoint, dict):
        raise refused("it holds no dictionary")
    checkpoint = _plain(checkpoint)
    expected = {"network_weights": dict, "init_args": dict, "trainer_name": str}
    for key, kind in expected.items():
        if not isinstance(checkpoint.get(key), kind):
            raise refused(f"it has no '{key}'")
    if not (checkpoint["trainer_name"].isidentifier() and len(checkpoint["trainer_name"]) < 200):
        raise refused("its 'trainer_name' is no name of a class")
    checkpoint["init_args"] = _plain(checkpoint["init_args"])
    configuration = checkpoint["init_args"].get("configuration")
    if not (isinstance(configuration, str) and configuration.isprintable() and len(configuration) < 200):
        raise refused("it does not say its configuration")
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    axes = () if axes is None else axes
    if not (isinstance(axes, (tuple, list)) and all(
            isinstance(axis, (int, np.integer)) and not isinstance(axis, bool) and 0 <= axis <= 2 for axis in axes)):
        raise refused("its 'inference_allowed_mirroring_axes' are no axes of an image")
    checkpoint["inference_allowed_mirroring_axes"] = tuple(map(int, axes)) or None
    checkpoint["network_weights"] = weights = _plain(checkpoint["network_weights"])
    for name, tensor in weights.items():
        if not (isinstance(name, str) and name.isprintable() and len(name) < 500 and isinstance(tensor, torch.Tensor)
                and tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
                and not tensor.is_neg()):
            raise refused("'network_weights' holds more than tensors of plain numbers")
        weights[name] = tensor.detach() if tensor.requires_grad else tensor
    # nnU-Net names a tensor up to four times; a few bytes can claim to be a tensor of any size
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > 4 * path.stat().st_size:
        raise refused("its tensors are larger than the file")
    return checkpoint


def _plain(mapping: dict) -> dict:
    # not mapping.items(): a pickle can give an OrderedDict attributes that hide its methods
    return dict(dict.items(mapping))


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
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors lets nobody else read its files
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                  temporary, metadata=dict(metadata))
        os.chmod(temporary, mode)


def read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors (none if not wanted) and metadata of a .safetensors file. Raises TransplantError where it is missing or
    damaged."""
    if not path.is_file():
        raise TransplantError(f"there is no file {path}")
    try:
        with open(path, "rb") as start:
            if int.from_bytes(start.read(8), "little") > MOST_TEXT:  # the length of the header
                raise ValueError("too long")
        with safe_open(path, framework="pt") as file:
            # safetensors' handle is no mapping: its keys() is the only way to its names
            names = file.keys() if tensors else []
            content = {name: file.get_tensor(name) for name in names}
            metadata = dict(file.metadata() or {})
    except Exception as error:  # beside its own error whatever torch says to a type or a shape
        raise TransplantError(f"{path} is not a complete .safetensors file") from error
    if any(tensor.dtype not in _DTYPES for tensor in content.values()):
        raise TransplantError(f"{path} holds more than tensors of plain numbers")
    return content, metadata


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names: what identifies theta_0."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
