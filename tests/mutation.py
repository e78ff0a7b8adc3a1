"""Seeded damage, by accident and by intent, to every file that a model folder is read from.

A `Mutation` makes the bytes of one file from a random generator, the same for the same seed. What an attacker would
write in a file creates RAN_CODE in the current folder where it gets its way. fuzz.py opens what comes out.
"""
import builtins
import collections
import copy
import io
import json
import math
import os
import pickle
import pickletools
import random
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factory import base_network, small_plans, write_model
from safetensors.torch import load, save

from nnunet_transplant.checkpoint import tensors_sha256
from nnunet_transplant.extraction import extract
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.task_vector import RECORD

RAN_CODE = "ran_code"
COMMAND = f"touch {RAN_CODE}"

Mutation = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 65_537, 10**6, 10**9, 2**31 - 1, -2**31, 2**32, 2**63 - 1, 2**64, 10**30, 0.5,
           -0.0, 1e308, math.nan, math.inf, -math.inf)
STRINGS = ("", "0", "3", "nan", "background", "ignore", "abc", "../../x", "/etc/passwd", "a\nb", "\x00", "\x1b[2J",
           "\ud800", "$x_{$", "%s{0}", "os.system", "torch.nn.Identity", "a" * 5000, "ü" * 70)


def tiny_plans() -> dict[str, Any]:
    """Plans of the smallest U-Net: opening it costs little."""
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        n_stages=2, features_per_stage=[2, 4], kernel_sizes=[[3] * 3] * 2, strides=[[1] * 3, [2] * 3],
        n_conv_per_stage=[1, 1], n_conv_per_stage_decoder=[1])
    return plans


def write_originals(root: Path) -> dict[str, Path]:
    """Sound models, of plain labels and of regions; each merges with the one of the same name and `_2`. Beside its own
    files each holds a merge.json and itself as a task vector."""
    parent = {"parent": "Dataset001_P", "parent_labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "in": 3},
              "parent_regions_class_order": [1, 2, 3]}
    labels: dict[str, tuple] = {
        "plain": ({"background": 0, "A": 1}, None, {"nnunet_transplant": {"classes": {"A": ["A", "a"]}}}),
        "plain_2": ({"background": 0, "B": 1, "C": 2, "ignore": 3}, None, {}),
        "regions": ({"background": 0, "core": [1, 2]}, [1], {"nnunet_transplant": parent | {"classes": {
            "core": ["core"]}}}),
        "regions_2": ({"background": 0, "whole": [1, 2], "in": 2}, [1, 2], {"nnunet_transplant": parent | {"classes": {
            "whole": ["whole"], "in": ["in"]}}})}
    plans = tiny_plans()
    base = base_network(plans=plans)
    folders = {name: write_model(root / name, *labels[name][:2], seed=i, plans=plans, base=base, axes=(0, 1, 2),
                                 **labels[name][2]) for i, name in enumerate(labels)}
    for name, folder in folders.items():
        write_merge(merge_folders([folder], recipe=Recipe("ties")), root / "merged" / name)
        shutil.copyfile(root / "merged" / name / "merge.json", folder / "merge.json")
        extract(folder, folder / "task_vector.safetensors", density=0.5 if name == "plain" else 1.0)
    return folders


# ----------------------------------------------------------------------------------------------------- any file


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """What disks, networks and editors do to a file."""
    out = bytearray(data)

    def place() -> int:  # half of them where a file has its structure: near its ends
        edge = min(len(out), 2000)
        return rng.choice([rng.randrange(len(out) + 1), rng.randrange(edge + 1), len(out) - rng.randrange(edge + 1)])

    for _ in range(rng.choice([1, 1, 2, 5])):
        at, size = place(), rng.choice([1, 2, 8, 100, 5000])
        kind = rng.randrange(8)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at:at + size] = rng.choice([b"\x00", b"\xff", b"0", b"["]) * size
        elif kind == 2:
            out[at:at + size] = rng.randbytes(size)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            out[at:at] = rng.randbytes(size)
        elif kind == 5:
            del out[at:at + size]
        elif kind == 6:
            out[at:at] = out[at:at + size] * rng.choice([1, 10])
        else:
            other = place()
            out[at:at + size], out[other:other + size] = out[other:other + size], out[at:at + size]
    return bytes(out)


def any_mutation(*choices: tuple[int, Mutation]) -> Mutation:
    """One of several, by weight."""
    weights, mutations = zip(*choices, strict=True)
    return lambda rng, data: rng.choices(mutations, weights)[0](rng, data)


# ------------------------------------------------------------------------------------- trees: JSON, dictionaries


def nested(depth: int, inner: Any = 0) -> Any:
    for i in range(depth):
        inner = [inner] if i % 2 else {"x": inner}
    return inner


def garbage(rng: random.Random) -> Any:
    """A value where another is expected."""
    return rng.choice([
        lambda: rng.choice(NUMBERS), lambda: rng.choice(NUMBERS), lambda: rng.choice(STRINGS),
        lambda: None, lambda: rng.random() < 0.5, lambda: [], lambda: {}, lambda: [rng.choice(NUMBERS)] * 3,
        lambda: {"0": rng.choice(STRINGS)}, lambda: [[]], lambda: [None, "x", 1], lambda: [1] * 20_000,
        lambda: {str(i): i for i in range(2000)}, lambda: nested(rng.choice([5, 100])),
    ])()


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in nested dictionaries and lists; wide containers by their first entries."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        here = [(node, key) for key in (list(node)[:50] if isinstance(node, dict) else range(min(len(node), 50)))]
        found += here
        todo += [value for container, key in here if isinstance(value := container[key], (dict, list))]
    return found


def damage_tree(rng: random.Random, tree: Any, value: Callable[[random.Random], Any] = garbage) -> None:
    """A few structural changes: keys lost, types changed, numbers extreme, values swapped."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = places(tree)
        if not found:
            return
        container, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind <= 3:
            container[key] = value(rng)
        elif kind == 4:
            other, there = rng.choice(found)
            container[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(container[key])
        elif kind == 5:
            old = container[key]
            numeric = isinstance(old, (int, float)) and not isinstance(old, bool)
            container[key] = rng.choice(NUMBERS) if numeric else rng.choice([[old], {"0": old}, str(old)[:100]])
        elif kind == 6 and isinstance(container, dict):
            container[rng.choice([*STRINGS, str(key) + " "])] = container.pop(key)
        elif isinstance(container[key], list):
            container[key] = container[key][:20] * rng.choice([0, 2, 1000])
        elif isinstance(container[key], dict):
            container[key][rng.choice(STRINGS)] = value(rng)
        else:
            container[key] = value(rng)


def json_tree(hostile: Callable[[random.Random, dict], None] | None = None) -> Mutation:
    """A JSON file with another content; `hostile` may do the same on purpose."""
    def mutate(rng: random.Random, data: bytes) -> bytes:
        tree = json.loads(data)
        if hostile is not None and rng.random() < 0.5:
            hostile(rng, tree)
        else:
            damage_tree(rng, tree)
        return json.dumps(tree, indent=rng.choice([None, 4])).encode()
    return mutate


def json_text(rng: random.Random, data: bytes) -> bytes:
    """JSON that its grammar allows and few readers expect, or nearly JSON."""
    tree = json.loads(data)
    key = rng.choice(list(tree))
    text = json.dumps(tree)
    return rng.choice([
        lambda: ("{" + f"{json.dumps(key)}: 7, " + text[1:]).encode(),             # twice the same key
        lambda: (text[:-1] + f", {json.dumps(key)}: null}}").encode(),
        lambda: text.encode("utf-16"), lambda: text.encode("utf-32-le"), lambda: b"\xef\xbb\xbf" + text.encode(),
        lambda: b"", lambda: b"null", lambda: b"[]", lambda: b'"x"', lambda: b"NaN", lambda: b"[" * 100_000,
        lambda: b"[" * 100_000 + b"]" * 100_000,
        lambda: (text[:-1] + ', "deep": ' + '{"x":' * 900 + "0" + "}" * 900 + "}").encode(),
        lambda: (text[:-1] + ', "deep": ' + "[" * 500 + "]" * 500 + "}").encode(),
        lambda: (text[:-1] + ', "long": ' + "9" * rng.choice([400, 5000]) + "}").encode(),
        lambda: (text[:-1] + ', "\\ud800": "\\udfff"}').encode(),
        lambda: (text[:-1] + ', "wide": [' + "[]," * 200_000 + "0]}").encode(),
        lambda: text.replace(": 1", ": 1e999").encode(), lambda: text.replace(": 1", ": -0").encode(),
        lambda: text.replace(" ", "\x00").encode(), lambda: text.replace('"', "'").encode(),
        lambda: text.encode() + text.encode(), lambda: text.encode() + b"\xff\xfe",
    ])()


# --------------------------------------------------------------------------------------- plans.json, dataset.json


def hostile_plans(rng: random.Random, plans: dict) -> None:
    """Plans that ask for a giant network, or for code: nnU-Net imports and calls the classes that they name."""
    configuration = next(iter(plans["configurations"].values()))
    architecture = configuration["architecture"]
    arch = architecture["arch_kwargs"]
    giant = rng.choice([10**4, 10**5, 10**6, 10**9, 2**62])
    command = {"command": COMMAND}
    rng.choice([
        lambda: arch.update(nonlin="os.system", nonlin_kwargs=command),
        lambda: arch.update(norm_op="subprocess.Popen", norm_op_kwargs={"args": COMMAND.split()}),
        lambda: arch.update(dropout_op="os.system", dropout_op_kwargs=command),
        lambda: arch.update(nonlin="torch.nn.modules.module.warnings.sys.modules", nonlin_kwargs=command),
        lambda: arch.update(nonlin="torch.nn.functional.importlib.os.system", nonlin_kwargs=command),
        lambda: arch.update(nonlin=f"{RAN_CODE}_at_import.Module"),
        lambda: arch.update(conv_op="subprocess.getoutput"),
        lambda: arch.update(extra=f"{RAN_CODE}_at_import") or architecture["_kw_requires_import"].append("extra"),
        lambda: architecture.update(network_class_name="os.system", arch_kwargs=command, _kw_requires_import=[]),
        lambda: architecture.update(network_class_name="builtins.eval"),
        lambda: architecture.update(network_class_name=f"{RAN_CODE}_at_import.Network"),
        lambda: arch.update(n_stages=giant),
        lambda: arch.update(n_stages=giant, features_per_stage=4, kernel_sizes=3, strides=1, n_conv_per_stage=1,
                            n_conv_per_stage_decoder=1),
        lambda: arch.update(features_per_stage=[giant, giant]),
        lambda: arch.update(features_per_stage=giant),
        lambda: arch.update(n_conv_per_stage=[1, giant]),
        lambda: arch.update(n_conv_per_stage=giant),
        lambda: arch.update(conv_op="torch.nn.Identity", n_conv_per_stage=giant),
        lambda: arch.update(n_conv_per_stage_decoder=[giant]),
        lambda: arch.update(kernel_sizes=[[giant] * 3] * 2),
        lambda: arch.update(strides=[[1] * 3, [giant] * 3]),
        lambda: arch.update(kernel_sizes=[[3] * 3] * 100_000),
        lambda: arch.update(nonlin="torch.nn.Transformer", nonlin_kwargs={"num_encoder_layers": giant}),
        lambda: arch.update(nonlin="torch.nn.Linear", nonlin_kwargs={"in_features": giant, "out_features": giant}),
        lambda: arch.update(norm_op_kwargs={"eps": math.nan, "affine": giant}),
        lambda: arch.update(features_per_stage=["4", "8"]),
        lambda: configuration.update(inherits_from=next(iter(plans["configurations"]))),
        lambda: configuration.update(inherits_from=rng.choice(STRINGS)),
        lambda: configuration.update(previous_stage=rng.choice([*STRINGS, 5, ["x"]])),
        lambda: configuration.update(normalization_schemes=rng.choice([["CTNormalization"], 5, "CTNormalization"])),
        lambda: configuration.update(patch_size=rng.choice([[], [giant] * 3, "abc", [16, 16], None])),
        lambda: plans.update(label_manager=rng.choice([*STRINGS, "np", "recursive_find_python_class", 7])),
        lambda: plans.update(dataset_name=rng.choice([[], {}, 7, None, *STRINGS])),
        lambda: plans.update(configurations=rng.choice([[], {}, 7, {"3d_fullres": []}])),
        lambda: plans.update(transpose_forward=rng.choice([[], "abc", {"0": 1}, [9, 9, 9]])),
        lambda: plans.pop("foreground_intensity_properties_per_channel"),
    ])()


def hostile_dataset(rng: random.Random, dataset: dict) -> None:
    """Labels that are none, and records of other datasets than there are."""
    labels, record = dataset["labels"], dataset.setdefault("nnunet_transplant", {})
    odd = rng.choice([-1, 10**9, 2**63, 10**30, 1.5, math.nan, "1", "x", None, True, [], [1], [1, 1], [0, 1], [1, "x"],
                      [[1]], {}, {"1": 1}, list(range(1000))])
    rng.choice([
        lambda: labels.update({rng.choice(list(labels)): odd}),
        lambda: labels.update({rng.choice(STRINGS): odd}),
        lambda: labels.update(ignore=odd),
        lambda: labels.update(background=odd),
        lambda: labels.pop(rng.choice(list(labels))),
        lambda: dataset.update(labels={"background": 0} | {str(i): i for i in range(1, rng.choice([2, 3, 20_000]))}),
        lambda: dataset.update(labels={"background": 0} | {str(i): 1 for i in range(rng.choice([2, 3, 2000]))}),
        lambda: dataset.update(labels={str(value): name for name, value in labels.items()}),
        lambda: dataset.update(labels=odd),
        lambda: dataset.update(regions_class_order=rng.choice([odd, [1, 1], [9, 9], [2, 1], ["a", "b"], {}, "12"])),
        lambda: dataset.update(channel_names=rng.choice([odd, {}, {"0": odd}, ["MRI"], "MRI", {"0": "a", "1": "b"}])),
        lambda: dataset.pop("channel_names"),
        lambda: dataset.update(modality=odd),
        lambda: dataset.update(nnunet_transplant=odd),
        lambda: record.update(classes=rng.choice([odd, dict.fromkeys(labels, odd)])),
        lambda: record.update(parent_labels=rng.choice([odd, labels | {"core": odd}, {}, {"core": 1}])),
        lambda: record.update(parent_regions_class_order=rng.choice([odd, [1], [], [9] * 9])),
        lambda: record.update(parent=odd),
        lambda: record.pop("parent_labels", None),
    ])()


# ---------------------------------------------------------------------------------------------- checkpoints


class Call:
    """Pickled, the call of a function: what a hostile file asks for."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args

    def __deepcopy__(self, memo: dict) -> "Call":  # which else would make the call
        return self


class Shadowed(collections.OrderedDict):
    """Pickled, an OrderedDict with attributes of its own: they hide its methods."""

    def __reduce__(self) -> tuple:
        return collections.OrderedDict, (list(self.items()),), dict.fromkeys(("items", "get", "keys", "values"), 1)


def code(rng: random.Random) -> Any:
    """What creates RAN_CODE where a reader runs it."""
    return rng.choice([
        lambda: Call(os.system, COMMAND),
        lambda: Call(eval, f"open({RAN_CODE!r}, 'w')"),
        lambda: Call(exec, f"open({RAN_CODE!r}, 'w')"),
        lambda: Call(subprocess.Popen, COMMAND.split()),
        lambda: Call(builtins.open, RAN_CODE, "w"),
        lambda: Call(Path.touch, Path(RAN_CODE)),
        lambda: [{"deep": (Call(os.system, COMMAND),)}],
        lambda: Call(collections.OrderedDict, [("x", Call(os.system, COMMAND))]),
        lambda: Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (COMMAND,), {}),
        lambda: Call(getattr, Call(__import__, "os"), "system"),
    ])()


def tensor(rng: random.Random) -> Any:
    """Tensors that are no weights of a network, or not in the form nnU-Net stores them."""
    shape = rng.choice([(2, 1, 3, 3, 3), (2,), (), (0,), (4, 2, 3, 3, 3)])
    plain = torch.ones(shape)
    return rng.choice([
        lambda: plain.to(rng.choice([torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
                                     torch.complex64, torch.float8_e4m3fn, torch.uint16])),
        lambda: plain.to_sparse(), lambda: torch.ones(4, 4).to_sparse_csr(),
        lambda: torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (10**12,)),
        lambda: torch.zeros(1).expand(10**12), lambda: torch.zeros(1).expand(10**5, 10**5),
        lambda: torch.zeros(()).expand(shape), lambda: torch.empty(0, 10**9),
        lambda: torch.empty(shape, device="meta"), lambda: torch.empty(10**15, device="meta"),
        lambda: torch.quantize_per_tensor(plain, 0.1, 10, torch.quint8),
        lambda: torch.nn.Parameter(plain), lambda: plain.clone().requires_grad_(),
        lambda: torch.complex(plain, plain).conj(), lambda: torch.complex(plain, plain).conj().imag,
        lambda: torch.ones(8, 8).t()[::2], lambda: torch.full(shape, math.nan), lambda: torch.full(shape, math.inf),
        lambda: torch.ones(7), lambda: torch.ones([1] * 60),
    ])()


def numpy_value(rng: random.Random) -> Any:
    """What the pickles of NumPy's scalars, which nnU-Net's log holds, can be bent to."""
    scalar = np.float64(0).__reduce__()[0]
    return rng.choice([
        lambda: np.float32(1), lambda: np.int64(2**62), lambda: np.bool_(True), lambda: np.ones(3),
        lambda: np.str_("abc"), lambda: np.datetime64("2020-01-01"), lambda: np.void(b"abc"), lambda: np.longdouble(1),
        lambda: Call(scalar, Call(np.dtype, "V4000000000")), lambda: Call(scalar, Call(np.dtype, "S4000000000")),
        lambda: Call(scalar, Call(np.dtype, "f8"), b"abc"), lambda: Call(scalar, Call(np.dtype, "O"), b"abcdefgh"),
        lambda: Call(scalar, 5, b"abc"), lambda: Call(np.dtype, "(100000,100000)f8"), lambda: Call(np.dtype, nested(5)),
    ])()


def checkpoint_value(rng: random.Random) -> Any:
    return rng.choice([
        garbage, garbage, tensor, tensor, numpy_value, code,
        lambda _: Call(bytearray, 10**10), lambda _: Call(torch.Tensor, 10**12), lambda _: b"\xff" * 5, lambda _: 1j,
        lambda _: {1: 2, None: 3, (): 4}, lambda _: {1, 2}, lambda _: bytearray(b"abc"), lambda _: torch.device("cuda"),
        lambda _: torch.float32, lambda _: torch.Size([1]), lambda _: Shadowed({"a": 1}),
        lambda _: Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.zeros(1).expand(10**10),
                       torch.float64, "cpu", False),
    ])(rng)


def hostile_checkpoint(rng: random.Random, content: dict) -> Any:
    """The fields that a reader uses, with what it should not find there; returns what to save."""
    weights, init = content["network_weights"], content["init_args"]
    name = rng.choice(list(weights))
    laughs: Any = "ha"
    for _ in range(40):
        laughs = [laughs] * 10
    rng.choice([
        lambda: content.update(inference_allowed_mirroring_axes=rng.choice([
            5, "abc", "012", [0, 1], [-1], (9,), (0, 0, 0), {0: 1}, [[0]], [None], (0.5,), [10**30], torch.arange(3),
            (), [], "", 0, True, (math.nan,), laughs])),
        lambda: content.update(trainer_name=rng.choice([
            *STRINGS, "nnUNetTrainer ", "torch", "np", "__doc__", "nnUNetTrainerNoMirroring", 7, None, ["x"],
            "x" * 10**6])),
        lambda: init.update(configuration=rng.choice([*STRINGS, "2d", [1], None, 7, {}, laughs])),
        lambda: content.update(nnunet_transplant=rng.choice([
            5, "x", [], {"theta_0": 5}, {"theta_0": ["a"]}, {"theta_0": "../../../etc/x"}, {"theta_0": None},
            {"theta_0": "a\x00b"}, {"theta_0": "a" * 64}, {"theta_0": b"a"}, {"theta_0": "ü" * 300}, laughs])),
        lambda: content.update(network_weights=rng.choice([
            {}, [], None, Shadowed(weights), list(weights.items()), {1: weights[name]}, {**weights, "x": weights[name]},
            collections.Counter(), dict.fromkeys(weights)])),
        lambda: content.update(init_args=rng.choice([Shadowed(init), [], {}, None])),
        lambda: weights.update({key: tensor(rng) for key in list(weights)}),
        lambda: weights.update({key: value.to(rng.choice([torch.float64, torch.float16, torch.int32, torch.complex64]))
                                for key, value in weights.items()}),
        lambda: weights.update({key: torch.zeros(()).expand(value.shape) for key, value in weights.items()}),
        lambda: weights.update({name: tensor(rng)}),
        lambda: weights.update({name: Call(torch._utils._rebuild_tensor_v2, torch.ones(2).storage(), *rng.choice([
            (0, (10**9,), (1,)), (0, (-1,), (1,)), (10**9, (2,), (1,)), (0, (2,), (-1,)), (0, (2**62, 4), (4, 1)),
            (0, (2,), (10**12,)), (-5, (2,), (1,)), (0, (1,) * 100, (1,) * 100), (0, (10**12,), (0,))]),
            False, collections.OrderedDict())}),
        lambda: weights.update({name: Call(torch._tensor._rebuild_from_type_v2, torch.clone, torch.Tensor,
                                           (weights[name],), {"float": 1, "shape": 2, "sum": 3})}),
        lambda: weights.update({f"{name}{i}": weights[name] for i in range(20_000)}),
        lambda: content.update(more=laughs),
    ])()
    return content if rng.random() < 0.9 else rng.choice([Shadowed(content), list(content), tuple(content.items())])


class AnyPickler(pickle._Pickler):
    """Pickles functions by their name even where Python finds them under another."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        self.write(pickle.GLOBAL + f"{obj.__module__}\n{name or obj.__qualname__}\n".encode())


def checkpoint_tree(rng: random.Random, data: bytes) -> bytes:
    """Another content in a sound file, in one of the formats that torch has written."""
    content = torch.load(io.BytesIO(data), weights_only=False)
    if rng.random() < 0.6:
        content = hostile_checkpoint(rng, content)
    else:
        damage_tree(rng, content, checkpoint_value)
    file = io.BytesIO()
    try:
        torch.save(content, file, _use_new_zipfile_serialization=rng.random() > 0.08)
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, pickle.PicklingError):
        return pickle.dumps({})  # torch cannot write it: another file then
    return file.getvalue()


def code_in_pickle(rng: random.Random, data: bytes) -> bytes:
    """A pickle that runs code, in every format that was ever a checkpoint."""
    content = torch.load(io.BytesIO(data), weights_only=False)
    container, key = rng.choice(places(content))
    container[key] = code(rng)
    kind = rng.randrange(4)
    if kind == 0:
        return pickle.dumps(content if rng.random() < 0.5 else container[key], protocol=rng.randrange(6))
    if kind == 1:  # the archive with another pickle: protocols and opcodes that torch does not write
        pickled = rng.choice([
            pickle.dumps(code(rng), protocol=rng.choice([0, 1, 3, 4, 5])),
            b"cos\nsystem\n(U" + bytes([len(COMMAND)]) + COMMAND.encode() + b"tR.",
            b"(ios\nsystem\n.", b"(cos\nsystem\nX" + struct.pack("<I", len(COMMAND)) + COMMAND.encode() + b"o.",
            b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", 14) + b"open('ran','w')"[:14] + b"\x85R."])
        return rewrite(data, lambda entries: [Entry(e.name, pickled) if e.name.endswith("data.pkl") else e
                                              for e in entries])
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=kind == 2)
    return file.getvalue()


class Entry:
    """A file in a zip archive, and what the archive says about it."""

    def __init__(self, name: str, data: bytes, method: int = 0, raw: bytes | None = None, size: int | None = None,
                 crc: int | None = None) -> None:
        self.name, self.data, self.method = name, data, method
        self.raw = data if raw is None else raw
        self.size = len(data) if size is None else size
        self.crc = zlib.crc32(data) if crc is None else crc


def read_entries(data: bytes) -> list[Entry]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [Entry(info.filename, archive.read(info)) for info in archive.infolist()]


def zip_bytes(entries: Sequence[Entry]) -> bytes:
    """A zip archive that says what it is told to: `zipfile` would not lie about sizes."""
    out, directory = bytearray(), bytearray()
    for entry in entries:
        name = entry.name.encode()
        extra = struct.pack("<HHQQ", 1, 16, entry.size % 2**64, len(entry.raw))
        fields = struct.pack("<HHHHHIIIHH", 45, 0, entry.method, 0, 0, entry.crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name),
                             len(extra))
        directory += b"PK\x01\x02\x2d\x00" + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(out)) + name + extra
        out += b"PK\x03\x04" + fields + name + extra + entry.raw
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(out), 0)
    return bytes(out + directory + b"PK\x05\x06" + end)


def rewrite(data: bytes, change: Callable[[list[Entry]], list[Entry]]) -> bytes:
    return zip_bytes(change(read_entries(data)))


def bomb(rng: random.Random) -> tuple[bytes, int]:
    """A deflated stream of some MB, and the GBs of zeros that it inflates to."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(1 << 24)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    repeats = rng.choice([200, 400])
    return block * repeats + squeeze.flush(), repeats << 24


def damage_archive(rng: random.Random, data: bytes) -> bytes:
    """The archive's files swapped, lost, doubled, renamed, compressed, or of another size than they have."""
    def change(entries: list[Entry]) -> list[Entry]:
        i, j = rng.randrange(len(entries)), rng.randrange(len(entries))
        if rng.random() < 0.3:
            i = next(k for k, entry in enumerate(entries) if entry.name.endswith("data.pkl"))
        one, kind = entries[i], rng.randrange(12)
        if kind == 0:
            entries[i], entries[j] = Entry(one.name, entries[j].data), Entry(entries[j].name, one.data)
        elif kind == 1:
            del entries[i]
        elif kind == 2:
            entries.insert(j, Entry(one.name, damage_bytes(rng, one.data)))
        elif kind == 3:
            one.name = rng.choice([one.name.upper(), "../../x", "/etc/x", "", "other/data.pkl", one.name + "x",
                                   "a" * 999])
        elif kind == 4:
            squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
            one.method, one.raw = 8, squeeze.compress(one.data) + squeeze.flush()
        elif kind == 5:
            one.method, (one.raw, one.size) = 8, bomb(rng)
        elif kind == 6:
            one.size = rng.choice([0, 1, 2**31, 2**32, 2**40, 2**63, -1])
        elif kind == 7:
            one.crc ^= 1
        elif kind == 8:
            one.method = rng.choice([1, 8, 9, 12, 14, 99])
        elif kind == 9:
            one.raw = one.data = damage_bytes(rng, one.data)
            one.size, one.crc = len(one.data), zlib.crc32(one.data)
        elif kind == 10:
            entries.append(Entry(entries[0].name.split("/")[0] + "/" + rng.choice(["constants.pkl", "version"]), b"x"))
        else:
            byteorder = next((entry for entry in entries if entry.name.endswith("byteorder")), one)
            byteorder.__init__(byteorder.name, rng.choice([b"big", b"little", b"", b"x", b"\xff" * 100]))
        return entries
    return rewrite(data, change)


def damage_pickle(rng: random.Random, data: bytes) -> bytes:
    """Other numbers and names in the pickle: sizes, strides, offsets, lengths of storages, functions to call."""
    names = ["os system", "builtins bytearray", "builtins eval", "torch Tensor", "collections Counter", "numpy dtype",
             "torch FloatStorage", "torch LongStorage", "torch.storage UntypedStorage",
             "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor",
             "torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass",
             "torch._tensor _rebuild_from_type_v2", "torch device", "torch HalfStorage", "torch QInt8Storage",
             "torch ComplexFloatStorage", "torch float8_e5m2"]

    def change(entries: list[Entry]) -> list[Entry]:
        entry = next(entry for entry in entries if entry.name.endswith("data.pkl"))
        ops = list(pickletools.genops(entry.data))
        ends = [*(position for _, _, position in ops[1:]), len(entry.data)]
        pieces = [entry.data[position:end] for (_, _, position), end in zip(ops, ends, strict=True)]
        numbers = [i for i, (op, _, _) in enumerate(ops) if op.name in ("BININT", "BININT1", "BININT2", "LONG1")]
        functions = [i for i, (op, _, _) in enumerate(ops) if op.name == "GLOBAL"]
        for _ in range(rng.choice([1, 1, 3])):
            kind = rng.randrange(6)
            if kind <= 2:
                number = rng.choice([value for value in NUMBERS if isinstance(value, int)] + [4, 64, 1000, -64])
                pieces[rng.choice(numbers)] = pickle.LONG1 + bytes([20]) + number.to_bytes(20, "little", signed=True)
            elif kind == 3:
                pieces[rng.choice(functions)] = b"c" + rng.choice(names).replace(" ", "\n").encode() + b"\n"
            elif kind == 4:
                i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
                pieces[i], pieces[j] = pieces[j], pieces[i]
            else:
                i = rng.randrange(len(pieces))
                pieces[i] *= rng.choice([0, 2, 1000])
        changed = b"".join(pieces)
        return [Entry(e.name, changed) if e is entry else e for e in entries]
    return rewrite(data, change)


# ---------------------------------------------------------------------------------------------- safetensors


def safetensors_header(rng: random.Random, data: bytes) -> bytes:
    """Another header: names, types, shapes and offsets that the data does not have, or a length out of this world."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), data[8 + size:]
    if rng.random() < 0.3:
        lengths = [0, 1, size - 1, size + 1, size * 2, len(data), 10**8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1]
        return struct.pack("<Q", rng.choice(lengths)) + data[8:]
    names = [name for name in header if name != "__metadata__"]
    one = header[rng.choice(names)]
    if rng.random() < 0.5:
        rng.choice([
            lambda: one.update(dtype=rng.choice(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X",
                                                 "", 7])),
            lambda: one.update(shape=rng.choice([[], [0], [10**12], [2**32, 2**32], [-1], [1] * 1000, "x", [1.5]])),
            lambda: one.update(data_offsets=rng.choice([[0, 0], [0, 2**63], [8, 0], [0], [-1, 4], [0, 10**12], "x"])),
            lambda: header.update(__metadata__=rng.choice([{}, None, [], {"sha256": 5}, {"sha256": "x" * 10**6}])),
            lambda: header.pop(rng.choice(names)),
            lambda: header.update({rng.choice(STRINGS): dict(one)}),
        ])()
    else:
        damage_tree(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def other_tensors(rng: random.Random, data: bytes, metadata: dict[str, str] | None = None) -> bytes:
    """A file that is sound in itself, its SHA-256 included, but not of such a network."""
    tensors = load(data)
    name = rng.choice(list(tensors))
    rng.choice([
        lambda: tensors.pop(name), tensors.clear,
        lambda: tensors.update({name: torch.ones(7)}), lambda: tensors.update({"x": torch.ones(7)}),
        lambda: tensors.update({name: torch.full(tensors[name].shape, math.nan)}),
        lambda: tensors.update({key: value.to(rng.choice([torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn,
                                                          torch.complex64])) for key, value in tensors.items()}),
        lambda: tensors.update({name: torch.zeros(0)}), lambda: tensors.update({name: tensors[name] + 1}),
    ])()
    return save(tensors, {"sha256": tensors_sha256(tensors)} if metadata is None else metadata)


def task_vector_header(rng: random.Random, data: bytes) -> bytes:
    """A task vector that says something else about its model."""
    metadata = safetensors_metadata(data)
    header = json.loads(metadata[RECORD])
    rng.choice([
        lambda: damage_tree(rng, header), lambda: hostile_plans(rng, header["plans"]),
        lambda: hostile_dataset(rng, header["dataset_json"]),
        lambda: header.update({rng.choice(list(header)): garbage(rng)}),
        lambda: header.update(fold=rng.choice(["0/../../x", "0/../../../x", "/x", "..", "", "a\x00b", "\ud800", 7])),
        lambda: header.update(mirroring_axes=rng.choice([5, "abc", [9], [-1], [[0]], [10**30], {}])),
        lambda: header.update(theta_0=rng.choice(["../../x", "a\x00b", "0" * 64, "", 7])),
    ])()
    metadata[RECORD] = json.dumps(header)
    return save(load(data), metadata)


def task_vector_tensors(rng: random.Random, data: bytes) -> bytes:
    return other_tensors(rng, data, safetensors_metadata(data))


def safetensors_metadata(data: bytes) -> dict[str, str]:
    return json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


MUTATIONS: dict[str, Mutation] = {
    "checkpoint_final.pth": any_mutation((4, damage_bytes), (5, checkpoint_tree), (2, code_in_pickle),
                                         (3, damage_archive), (4, damage_pickle)),
    "theta_0.safetensors": any_mutation((3, damage_bytes), (4, safetensors_header), (2, other_tensors)),
    "task_vector.safetensors": any_mutation((2, damage_bytes), (2, safetensors_header), (2, task_vector_tensors),
                                            (5, task_vector_header)),
    "plans.json": any_mutation((2, damage_bytes), (1, json_text), (7, json_tree(hostile_plans))),
    "dataset.json": any_mutation((2, damage_bytes), (1, json_text), (7, json_tree(hostile_dataset))),
    "merge.json": any_mutation((2, damage_bytes), (1, json_text), (5, json_tree())),
}
