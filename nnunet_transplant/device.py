"""Where networks run: which device, in which precision, how much memory it has left, how many threads."""
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch

from nnunet_transplant.errors import TransplantError, note, out_of_memory
from nnunet_transplant.steps import did_you_mean

T = TypeVar("T")

AUTO = "auto"
_THERE: dict[str, Callable[[], bool]] = {  # in the order in which auto takes them
    "cuda": lambda: torch.cuda.is_available(), "mps": lambda: torch.backends.mps.is_available(), "cpu": lambda: True}


def torch_device(name: str = AUTO) -> torch.device:
    """The device by nnU-Net's -device names, or with "auto" the first that is there of CUDA, MPS and the CPU. Raises
    TransplantError for one that is not."""
    if name == AUTO:
        name = next(each for each, is_there in _THERE.items() if is_there())
    if name not in _THERE:
        raise TransplantError(f"-device must be {AUTO}, {', '.join(_THERE)}, not {name}{did_you_mean(name, _THERE)}")
    if not _THERE[name]():
        raise TransplantError(f"this machine has no {name} device: leave out -device, or choose cpu")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# Precision: float32, but on GPUs. What networks say is half precision there, as nnU-Net predicts. Half precision rounds
# small gradients to 0: where these count it is bfloat16, which has the range of float32.

FORWARD = {"cuda": torch.float16}
GRADIENTS = {"cuda": torch.bfloat16}


@contextmanager
def forward_only(device: torch.device) -> Iterator[None]:
    """For passes without gradients."""
    with torch.no_grad(), _autocast(device, FORWARD):
        yield


def with_gradients(device: torch.device) -> AbstractContextManager:
    """For the forward pass of a step or of a Fisher matrix; the loss is better outside, in float32."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return nullcontext()
    return _autocast(device, GRADIENTS)


def _autocast(device: torch.device, types: dict[str, torch.dtype]) -> AbstractContextManager:
    return torch.autocast(device.type, types[device.type]) if device.type in types else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Memory

class BatchSize:
    """How many patches pass a network at a time: as many as were planned, and fewer where memory runs out."""

    def __init__(self, planned: int, device: torch.device) -> None:
        self.size, self.device = planned, device

    def run(self, work: Callable[[int], T]) -> T:
        """work(size), from its start again with half the size where it runs out of memory. Raises what work raises,
        where single patches do not fit either."""
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if self.size == 1 or not out_of_memory(error):
                    raise
            # not above: the error holds the frames that hold the tensors
            self.size = (self.size + 1) // 2
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            note(f"memory ran out on {self.device.type}: {self.size} patches pass the network at a time")


def threads_of_nnunet(device: torch.device) -> None:
    """As many threads as nnU-Net's own prediction takes: one beside a GPU, on a CPU all cores."""
    torch.set_num_threads(1 if device.type == "cuda" else multiprocessing.cpu_count())


def memory_left(device: torch.device) -> int:
    """Bytes that a device can still give, about."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # not Linux
        return 8 << 30
