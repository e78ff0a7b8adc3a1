"""Where networks run: which device, how much memory it has left, how many threads."""
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.steps import did_you_mean

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
