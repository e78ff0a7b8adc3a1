"""Which device networks run on, in which precision, and what happens when its memory runs out."""
import importlib
import multiprocessing
import pkgutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from factory import write_volumes

from nnunet_transplant import device
from nnunet_transplant.device import (
    BatchSize,
    forward_only,
    memory_left,
    threads_of_nnunet,
    torch_device,
    with_gradients,
)
from nnunet_transplant.errors import TransplantError, TransplantNote


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> set[str]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in request.param)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in request.param)
    return request.param


@pytest.mark.parametrize("there", [{"cuda", "mps"}, {"mps"}, {"cuda"}, set()], indirect=True, ids=sorted)
def test_auto_is_the_first_that_is_there(there: set[str]) -> None:
    expected = next(name for name in ("cuda", "mps", "cpu") if name in {*there, "cpu"})
    assert torch_device() == torch_device("auto") == torch.device(expected)
    for name in ("cuda", "mps", "cpu"):
        if name in {*there, "cpu"}:
            assert torch_device(name) == torch.device(name)
        else:
            with pytest.raises(TransplantError, match=f"this machine has no {name} device: leave out -device"):
                torch_device(name)


def test_others_are_refused() -> None:
    with pytest.raises(TransplantError, match=r"-device must be auto, cuda, mps, cpu, not gpu"):
        torch_device("gpu")
    with pytest.raises(TransplantError, match=r"did you mean cuda\?"):
        torch_device("cudda")


def test_threads_are_those_of_nnunets_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for name in ("cpu", "mps", "cuda"):
        threads_of_nnunet(torch.device(name))
    assert set_to == [multiprocessing.cpu_count(), multiprocessing.cpu_count(), 1]


def test_asking_for_a_device_sets_no_threads() -> None:
    before = torch.get_num_threads()
    torch_device("cpu")
    assert torch.get_num_threads() == before


def test_memory_is_what_the_machine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < memory_left(torch.device("cpu")) < 2 ** 46
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda which: (123, 456))
    assert memory_left(torch.device("cuda")) == 123
    monkeypatch.setattr(device, "Path", lambda name: tmp_path / "nothing")
    assert memory_left(torch.device("cpu")) == 8 << 30  # not Linux


WITH_A_DEVICE = {
    "merge": ["-m", "A", "B", "-fit", "head", "-d", 501], "predict": ["-m", "A", "-i", ".", "-o", "out"],
    "evaluate": ["-m", "A", "-d", 501], "sweep": ["-m", "A", "B", "-d", 501],
    "flatness": ["-m", "A", "-d", 501], "landscape": ["-m", "A", "B", "-d", 501]}


def test_every_command_with_a_device_is_here(run: Callable) -> None:
    package = importlib.import_module("nnunet_transplant.cli")
    commands = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = {name for name in commands if name not in ("common", "steps") and "-device " in run(name, "-h")[1]}
    assert found == set(WITH_A_DEVICE)


@pytest.mark.parametrize("there", [set()], indirect=True, ids=["none"])
@pytest.mark.parametrize("name", ["cuda", "mps"])
@pytest.mark.parametrize("command", WITH_A_DEVICE)
def test_a_device_that_is_not_there_is_said_before_models_are_read(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nnunet_folders: None, run: Callable, there: set[str],
        command: str, name: str) -> None:
    """None of the models is there: to read them would be another error."""
    monkeypatch.chdir(tmp_path)
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "A": 1}, 1, (8, 8, 8))
    status, out, err = run(command, *WITH_A_DEVICE[command], "-o", "out", "-f", "all", "-device", name)
    assert (status, out) == (1, "")
    assert err == (f"nnunet_transplant_{command}: error: this machine has no {name} device: leave out -device, or "
                   "choose cpu\n")
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Precision: the CPU's own autocast stands in for a GPU's.

CPU = torch.device("cpu")


def test_a_cpu_computes_in_float32() -> None:
    layer, image = torch.nn.Conv2d(1, 2, 3), torch.randn(1, 1, 8, 8)
    with forward_only(CPU):
        said = layer(image)
    assert said.dtype == torch.float32 and not said.requires_grad
    with with_gradients(CPU):
        assert layer(image).requires_grad


def test_what_a_gpu_would_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (device.FORWARD["cuda"], device.GRADIENTS["cuda"]) == (torch.float16, torch.bfloat16)
    monkeypatch.setattr(device, "FORWARD", {"cpu": torch.float16})
    monkeypatch.setattr(device, "GRADIENTS", {"cpu": torch.bfloat16})
    layer, image = torch.nn.Linear(2, 2), torch.randn(1, 2)
    with forward_only(CPU):
        said = layer(image)
    assert said.dtype == torch.float16 and not said.requires_grad
    with with_gradients(CPU):
        said = layer(image)
    assert said.dtype == torch.bfloat16 and said.requires_grad


def test_an_old_gpu_takes_its_gradients_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert isinstance(with_gradients(torch.device("cuda")), nullcontext)


# ---------------------------------------------------------------------------------------------------------------------
# Memory that runs out

def fits(most: int, error: Exception) -> Callable[[int], int]:
    def work(size: int) -> int:
        if size > most:
            raise error
        return size
    return work


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_fewer_patches_pass_where_memory_runs_out(error: Exception) -> None:
    batches = BatchSize(5, CPU)
    with pytest.warns(TransplantNote) as notes:
        assert batches.run(fits(2, error)) == 2
    assert [str(each.message) for each in notes] == [
        f"memory ran out on cpu: {size} patches pass the network at a time" for size in (3, 2)]
    assert batches.run(fits(2, AssertionError())) == 2  # it remembers
    with pytest.raises(type(error)), pytest.warns(TransplantNote):
        batches.run(fits(0, error))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        BatchSize(4, CPU).run(fits(0, RuntimeError("shapes do not fit")))
