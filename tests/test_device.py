"""Which device networks run on."""
import multiprocessing
from pathlib import Path

import pytest
import torch

from nnunet_transplant import device
from nnunet_transplant.device import memory_left, threads_of_nnunet, torch_device
from nnunet_transplant.errors import TransplantError


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
