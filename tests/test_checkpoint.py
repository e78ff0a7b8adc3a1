"""Reading checkpoints without trusting them, and writing files and folders whole or not at all."""
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import write_model

from nnunet_transplant import checkpoint
from nnunet_transplant.errors import TransplantError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model") / "fold_0" / "checkpoint_final.pth"


def test_reads_what_nnunet_writes(path: Path) -> None:
    content = torch.load(path, weights_only=False)
    content["logging"] = {"mean_fg_dice": [np.float32(0.5), np.float64(0.25)], "train_losses": [np.float32(1)],
                          "n": [np.int64(3)]}
    content["_best_ema"] = np.float64(0.7)
    content["init_args"]["device"] = torch.device("cuda")
    torch.save(content, path)
    read = checkpoint.read(path)
    assert read["logging"] == content["logging"] and read["init_args"] == content["init_args"]
    assert all(torch.equal(read["network_weights"][name], tensor) for name, tensor in
               content["network_weights"].items())


def test_reads_the_scalars_of_numpy_1(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy 1 names its scalars numpy.core.multiarray.scalar: rewrite the name in the pickle as it would."""
    class Old(pickle._Pickler):
        def save_global(self, obj: object, name: str | None = None) -> None:
            if getattr(obj, "__module__", "") == "numpy._core.multiarray":
                self.write(pickle.GLOBAL + b"numpy.core.multiarray\nscalar\n")
            else:
                super().save_global(obj, name)
        dispatch = pickle._Pickler.dispatch | {type(np.float64(0).__reduce__()[0]): save_global}
    module = type(sys)("old_pickle")
    module.Pickler, module.HIGHEST_PROTOCOL = Old, 2
    content = torch.load(path, weights_only=False) | {"_best_ema": np.float64(0.7)}
    torch.save(content, path, pickle_module=module)
    assert b"numpy.core.multiarray" in path.read_bytes()
    assert checkpoint.read(path)["_best_ema"] == 0.7


def test_reading_maps_the_file(path: Path) -> None:
    weights = checkpoint.read(path)["network_weights"]
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for name, tensor in weights.items():
        assert any(start <= tensor.data_ptr() < end for start, end in ranges), name


def test_truncation_anywhere_is_one_clear_error(path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(TransplantError, match="truncated or damaged"):
            checkpoint.read(path)


@pytest.mark.parametrize(("content", "message"), [
    ([1, 2], "holds no dictionary"),
    ({"state_dict": {}}, "no 'network_weights'"),
    ({"network_weights": {}, "init_args": {}, "trainer_name": "nnUNetTrainer"}, "does not say its configuration"),
    ({"network_weights": {"a": 1}, "init_args": {"configuration": "2d"}, "trainer_name": "T"}, "more than tensors"),
])
def test_other_files_are_no_nnunet_checkpoints(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(TransplantError, match=message):
        checkpoint.read(tmp_path / "file.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TransplantError, match="there is no checkpoint"):
        checkpoint.read(tmp_path / "none.pth")


def test_same_content_same_bytes_whatever_the_name(tmp_path: Path) -> None:
    content = {"network_weights": {"a": torch.arange(6.0), "b": torch.ones(3)}}
    for name in ("one.pth", "another_name.pth"):
        checkpoint.write(content, tmp_path / name)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another_name.pth").read_bytes()


def test_sha256_depends_on_names_types_shapes_and_values() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.int64)}
    same = checkpoint.tensors_sha256(dict(reversed(tensors.items())))
    assert checkpoint.tensors_sha256(tensors) == same
    for name, other in (("a", torch.arange(4.0).reshape(2, 2)), ("a", torch.arange(4.0).double()),
                        ("a", torch.arange(1.0, 5.0)), ("c", torch.arange(4.0))):
        assert checkpoint.tensors_sha256(tensors | {name: other}) != same
    assert checkpoint.tensors_sha256({"scalar": torch.tensor(7)})


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    checkpoint.write_safetensors({"a": torch.ones(3)}, path, {"key": "value"})
    tensors, metadata = checkpoint.read_safetensors(path)
    assert torch.equal(tensors["a"], torch.ones(3)) and metadata == {"key": "value"}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TransplantError, match="not a complete"):
        checkpoint.read_safetensors(path)
    os.remove(path)
    with pytest.raises(TransplantError, match="there is no file"):
        checkpoint.read_safetensors(path)
