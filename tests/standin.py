"""A GPU played by the CPU: tensors that say that they are on it, hold their numbers in CPU tensors, and refuse what a
GPU's tensors refuse: to be mixed with tensors of the CPU, to be NumPy arrays, and on MPS to be float64.

What it does not play: the precision of autocast, memory that runs out, and operations that a device lacks."""
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch._dynamo  # which asks torch for its devices when it is first imported
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)  # from one device to another
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
OUTSIDE = torch.device("meta")  # where torch's C++ believes these tensors to be: there it asks for no driver


class _Inside(threading.local):
    """Whether a torch function of tensors that are there runs in this thread: what C++ makes then on the device where
    it believes them to be, it makes for them."""
    there = False


INSIDE = _Inside()


class OnDevice(torch.Tensor):
    """A tensor on the device that is played."""
    held: torch.Tensor
    played: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, played: torch.device) -> "OnDevice":
        if played.type == "mps" and held.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=OUTSIDE)
        made.held, made.played = held, played
        return made

    device = property(lambda self: self.played)
    is_cpu, is_cuda, is_mps, is_meta = (property(lambda self, name=name: self.played.type == name)
                                        for name in ("cpu", "cuda", "mps", "meta"))

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.played} device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
                        "to host memory first.")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"{self.held!r} on {self.played}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # torch.save, read again with map_location="cpu"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of all torch functions of tensors that are there, backward passes too."""
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        if type((kwargs or {}).get("generator", PlayedGenerator())) is not PlayedGenerator:
            raise RuntimeError("Expected a generator of the tensor's device but found one of 'cpu'")
        before, INSIDE.there = INSIDE.there, True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs or {})
        finally:
            INSIDE.there = before

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        played = next(leaf.played for leaf in _leaves((args, kwargs or {})) if isinstance(leaf, OnDevice))
        return compute(operation, args, kwargs or {}, played)


def _index(index: Any) -> Any:
    """With tensors for lists: C++ would move their numbers to where it believes the tensor to be, and lose them."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.as_tensor(index) if isinstance(index, (list, np.ndarray)) else index


class PlayedGenerator(torch.Generator):
    """A generator of the device that is played, whose draws are those of the CPU's."""


class Playing(TorchDispatchMode):
    """Where tensors that are made on a device, or moved to it, are on the one that is played."""

    def __init__(self, played: torch.device) -> None:
        super().__init__()
        self.played = played

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, args, kwargs or {}, self.played)


def compute(operation: Any, args: Any, kwargs: dict[str, Any], played: torch.device) -> Any:
    """An operation of torch on the tensors that are held; what comes of it is on the device played, where an argument
    is, or where it was asked for there."""
    tensors = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    asked = kwargs.get("device")
    if asked is not None and asked.type == OUTSIDE.type and INSIDE.there:
        asked = played
    is_there = bool(there) if asked is None else asked.type == played.type
    if operation is aten._has_compatible_shallow_copy_type.default:
        return args[0] is args[1]  # else a module makes new parameters
    if there and operation not in MOVES:
        check_devices(operation, args, tensors)
    if asked is not None and is_there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = {id(tensor.held): tensor for tensor in there}

    def held(value: Any) -> Any:
        return value.held if isinstance(value, OnDevice) else value

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or id(value) in wrappers:
            return wrappers.get(id(value), value)
        return OnDevice(value, played)
    found = operation(*_map(held, args), **_map(held, kwargs))
    if operation is aten.copy_.default:
        return args[0]
    return _map(wrapped, found) if is_there else found


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """What an operation takes or returns, with the function of everything in it."""
    if isinstance(value, dict):
        return {key: _map(function, each) for key, each in value.items()}
    return type(value)(_map(function, each) for each in value) if isinstance(value, (list, tuple)) else function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _map(found.append, value)
    return found


def check_devices(operation: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError, as torch does, for an operation on tensors of two devices; numbers (of no dimension) of the
    CPU, and indices, may be anywhere."""
    indices = _leaves(args[1]) if operation in INDEXING and isinstance(args[0], OnDevice) else []
    anywhere = {id(index) for index in indices}
    for tensor in tensors:
        free = tensor.is_cpu and (tensor.dim() == 0 or id(tensor) in anywhere)
        if not isinstance(tensor, OnDevice) and not free:
            raise RuntimeError("Expected all tensors to be on the same device, but found at least two devices, one of "
                               f"them {tensor.device}! ({operation})")


@contextmanager
def standin(name: str) -> Iterator[torch.device]:
    """A device, cuda or mps, that this machine seems to have, and only this one."""
    played = torch.device(name, 0)
    move, generator = torch.Tensor.to, torch.Generator

    def to(tensor: torch.Tensor, *where: Any, **options: Any) -> torch.Tensor:
        """In any thread; with the device's number, for which C++ would ask the driver."""
        known = OUTSIDE if isinstance(tensor, OnDevice) else played
        numbered = dict.fromkeys((name, torch.device(name), played), known)
        with Playing(played):
            return move(tensor, *(numbered.get(each, each) if isinstance(each, (str, torch.device)) else each
                                  for each in where),
                        **{key: numbered.get(value, value) if key == "device" else value
                           for key, value in options.items()})

    def made(where: Any = "cpu") -> Any:
        return PlayedGenerator() if torch.device(where).type == name else generator(where)

    def is_it(other: str) -> Callable[..., bool]:
        return lambda *_, **__: name == other
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with ExitStack() as stack:
        for where, what, instead in (
                (torch.Tensor, "to", to), (torch, "Generator", made), (torch.cuda, "is_available", is_it("cuda")),
                (torch.backends.mps, "is_available", is_it("mps")), (torch.cuda, "_lazy_init", nothing),
                (torch.cuda, "is_bf16_supported", lambda **_: True), (torch.cuda, "empty_cache", nothing),
                (torch.mps, "empty_cache", nothing), (torch.cuda, "mem_get_info", lambda *_: (1 << 30, 1 << 31)),
                (torch.accelerator, "current_accelerator", nothing),  # which Adam asks whether it is recorded
                (torch.cuda, "is_current_stream_capturing", lambda: False)):
            stack.enter_context(patch.object(where, what, instead))
        stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        stack.enter_context(Playing(played))
        yield torch.device(name)
