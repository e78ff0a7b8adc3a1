"""What damaged and hostile files come to: the model or one clear error, and nothing else (fuzz.py)."""
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import write_model
from mutation import Call, Entry, Shadowed, rewrite, tiny_plans

from nnunet_transplant import checkpoint
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.model_folder import open_models

FUZZ = Path(__file__).with_name("fuzz.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def test_mutated_files_are_opened_or_refused() -> None:
    done = subprocess.run([sys.executable, FUZZ, "--files", "2100", "--json"], capture_output=True, text=True,
                          env=os.environ | ONE_THREAD)
    assert done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout)
    failures = [f"python tests/fuzz.py --reader {reader} --seed {seed} --files 1\n{reason}"
                for one in result["readers"].values() for reader, seed, reason in one["failures"]]
    assert not failures, f"{len(failures)} failures\n\n" + "\n\n".join(failures[:5])
    assert done.returncode == 0
    outcomes = {reader: one["outcomes"] for reader, one in result["readers"].items()}
    assert sum(sum(words.values()) for words in outcomes.values()) >= 2000
    for reader, words in outcomes.items():  # else the mutations are not what they are meant to be
        assert words["opened"] >= 20 and words["refused"] >= 20, reader


BAD_READERS = """
import json, os, signal, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
import fuzz
from nnunet_transplant.errors import TransplantError

def escape():
    raise KeyError("escaped")

def hang():
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass

def wrap():
    try:
        bytearray(10**10)
    except MemoryError as error:
        raise TransplantError("this file is damaged") from error

def refuse(message):
    raise TransplantError(message)

os.chdir(tempfile.mkdtemp())
fuzz.SECONDS = 0.3
result = {}
for name, what in {"escape": escape, "hang": hang, "memory": wrap,
                   "death": lambda: os.kill(os.getpid(), signal.SIGKILL),
                   "code": lambda: os.system(f"touch {fuzz.RAN_CODE}"), "no message": lambda: refuse(""),
                   "message": lambda: refuse("this file is damaged")}.items():
    fuzz.open_one = lambda originals, reader, seed: what() if seed == 1 else None
    done = fuzz.run(None, "plans.json", range(4))
    result[name] = [done["outcomes"], [[seed, reason] for _, seed, reason in done["failures"]]]
print(json.dumps(result))
"""


@pytest.mark.slow
def test_the_fuzzer_notices_what_no_reader_may_do() -> None:
    done = subprocess.run([sys.executable, "-c", BAD_READERS, FUZZ.parent], capture_output=True, text=True,
                          env=os.environ | ONE_THREAD)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result.pop("message") == [{"opened": 3, "refused": 1}, []]
    expected = {"escape": "KeyError", "hang": "more than 0.3 s", "memory": "asked for more than", "death": "died with "
                "status -9", "code": "code ran", "no message": "a message of 0 characters"}
    assert result.keys() == expected.keys()
    for name, (outcomes, failures) in result.items():
        assert outcomes == {"opened": 3, "failed": 1}, name
        assert failures[0][0] == 1 and expected[name] in failures[0][1], name


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_model(tmp_path / "model", {"background": 0, "A": 1}, plans=tiny_plans())


def change_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def arch(plans: dict) -> dict[str, Any]:
    return plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]


@pytest.mark.parametrize("change", [
    lambda plans: arch(plans).update(nonlin="os.system", nonlin_kwargs={"command": "touch ran_code"}),
    lambda plans: arch(plans).update(norm_op="subprocess.Popen", norm_op_kwargs={"args": ["touch", "ran_code"]}),
    lambda plans: arch(plans).update(nonlin="torch.nn.functional.importlib.os.system",
                                     nonlin_kwargs={"command": "touch ran_code"}),
    lambda plans: arch(plans).update(dropout_op="ran_code_at_import.Dropout"),
    lambda plans: plans["configurations"]["3d_fullres"]["architecture"].update(
        network_class_name="ran_code_at_import.Network"),
])
def test_plans_run_no_code(model: Path, change: Callable[[dict], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net imports and calls what its plans name."""
    Path("ran_code_at_import.py").write_text("open('ran_code', 'w')")
    monkeypatch.syspath_prepend(Path.cwd())
    change_json(model / "plans.json", change)
    with pytest.raises(TransplantError, match="can run code"):
        open_models(model)
    assert not Path("ran_code").exists()


@pytest.mark.parametrize("change", [
    lambda plans: arch(plans).update(n_conv_per_stage=[1, 10**6]),
    lambda plans: arch(plans).update(n_stages=10**6, features_per_stage=4, kernel_sizes=3, strides=1,
                                     n_conv_per_stage=1, n_conv_per_stage_decoder=1),
    lambda plans: arch(plans).update(n_stages=10**9, features_per_stage=4, kernel_sizes=3, strides=1),
    lambda plans: arch(plans).update(kernel_sizes=[[3] * 3] * 10**5),
    lambda plans: arch(plans).update(features_per_stage=[10**6, 10**6]),
])
def test_plans_of_giant_networks_cost_nothing(model: Path, change: Callable[[dict], object]) -> None:
    change_json(model / "plans.json", change)
    with pytest.raises(TransplantError, match="out of this world|larger network|does not fit the network"):
        open_models(model)


def test_networks_whose_module_has_moved_are_found_as_nnunet_finds_them(model: Path) -> None:
    change_json(model / "plans.json", lambda plans: plans["configurations"]["3d_fullres"]["architecture"].update(
        network_class_name="dynamic_network_architectures.architectures.plain_unet.PlainConvUNet"))
    with pytest.warns(UserWarning, match="not found. Attempting to locate"):
        assert open_models(model)


SCALAR = np.float64(0).__reduce__()[0]
WEIGHTS = "'network_weights' holds more than tensors"


@pytest.mark.parametrize(("change", "message"), [
    ({"more": Call(bytearray, 10**10)}, "bytearray, which can run code or fill the memory"),
    ({"more": Call(torch.Tensor, 10**12)}, "torch.Tensor, which"),
    ({"_best_ema": Call(SCALAR, Call(np.dtype, "V4000000000"))}, "truncated or damaged"),
    ({"network_weights": {"a": torch.zeros(1).expand(10**12)}}, "larger than the file"),
    ({"network_weights": {f"a{i}": torch.zeros(10**5).expand(100, 10**5) for i in range(4)}}, "larger than the file"),
    ({"network_weights": {"a": torch.zeros(2, device="meta")}}, "meta_tensor"),
    ({"network_weights": {"a": torch.zeros(2, dtype=torch.complex64)}}, "torch.ComplexFloatStorage"),
    ({"network_weights": {"a": torch.zeros(2).to_sparse()}}, "sparse"),
    ({"network_weights": Shadowed({"a": 1})}, WEIGHTS),
    ({"inference_allowed_mirroring_axes": "abc"}, "no axes of an image"),
    ({"inference_allowed_mirroring_axes": 5}, "no axes of an image"),
    ({"inference_allowed_mirroring_axes": (-1,)}, "no axes of an image"),
    ({"inference_allowed_mirroring_axes": torch.arange(3)}, "no axes of an image"),
    ({"trainer_name": "../../x"}, "no name of a class"),
    ({"init_args": {"configuration": "a\nb"}}, "does not say its configuration"),
])
def test_checkpoints_that_no_training_writes(model: Path, change: dict, message: str) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(path, weights_only=False) | change, path)
    with pytest.raises(TransplantError, match=message):
        checkpoint.read(path)


def test_attributes_that_hide_methods_do_no_harm(model: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    hidden = Shadowed(content | {key: Shadowed(content[key]) for key in ("network_weights", "init_args")})
    torch.save(hidden, path)
    assert isinstance(torch.load(path, weights_only=False).items, int)
    assert checkpoint.read(path)["network_weights"].keys() == content["network_weights"].keys()


def test_archives_that_unpack_to_more_than_they_are(model: Path) -> None:
    path = model / "fold_0" / "checkpoint_final.pth"

    def compress(entries: list[Entry]) -> list[Entry]:
        squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
        pickled = next(entry for entry in entries if entry.name.endswith("data.pkl"))
        pickled.method, pickled.raw = 8, squeeze.compress(bytes(10**8)) + squeeze.flush()
        pickled.size = 10**8
        return entries
    path.write_bytes(rewrite(path.read_bytes(), compress))
    with pytest.raises(TransplantError, match="truncated or damaged"):
        checkpoint.read(path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda dataset: dataset.pop("labels"), "'labels' in"),
    (lambda dataset: dataset["labels"].update(A=[]), "'labels' in"),
    (lambda dataset: dataset["labels"].update(A=-1), "'labels' in"),
    (lambda dataset: dataset["labels"].update({"a\nb": 2}), "'labels' in"),
    (lambda dataset: dataset.update(labels={"background": 0} | {str(i): i for i in range(1, 20_000)}), "'labels' in"),
    (lambda dataset: dataset.update(channel_names=["MRI"]), "'channel_names' in"),
    (lambda dataset: dataset.update(regions_class_order="12"), "'regions_class_order' in"),
    (lambda dataset: dataset.update(nnunet_transplant=5), "'nnunet_transplant' in"),
    (lambda dataset: dataset.update(nnunet_transplant={"classes": {"A": [1]}}), "'classes' of 'nnunet_transplant' in"),
    (lambda dataset: dataset.update(nnunet_transplant={"parent_labels": {"x": "y"}}), "'parent_labels' of"),
    (lambda dataset: dataset.update(nested=[[[[[[[[json.loads("[" * 90 + "]" * 90)]]]]]]]]), "nested too deep"),
    (lambda dataset: dataset.update(long=" " * 11_000_000), "too long: 10 MB"),
])
def test_dataset_json_that_no_dataset_has(model: Path, change: Callable[[dict], object], message: str) -> None:
    change_json(model / "dataset.json", change)
    with pytest.raises(TransplantError, match=message):
        open_models(model)


def test_names_that_a_figure_could_take_for_formulas(tmp_path: Path) -> None:
    name = "$x_{$"
    model = write_model(tmp_path / "$m_{$", {"background": 0, name: 1} | {f"structure {i}": i for i in range(2, 200)},
                        plans=tiny_plans())
    write_merge(merge_folders([model]), tmp_path / "merged")
    assert name in json.loads((tmp_path / "merged" / "dataset.json").read_text())["labels"]


def test_labels_that_are_written_as_text_are_numbers_as_for_nnunet(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", {"background": "0", "A": "1"}, plans=tiny_plans())
    assert open_models(model)[0].labels.all_labels == [0, 1]
