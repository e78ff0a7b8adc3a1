"""Task vectors as files: lossless, or as lossy as asked for, and merged like the models they came from."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import base_network, small_plans, write_model

from nnunet_transplant import checkpoint
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extraction import extract
from nnunet_transplant.files import file_sha256
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.model_folder import open_models, open_theta_0
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.task_vector import read_header


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """theta_0 as a trained model folder."""
    return write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base_network().state_dict())


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    network = base_network()
    return [write_model(tmp_path / name, {"background": 0, name: 1}, base=network, seed=i, axes=(0, 2))
            for i, name in enumerate("AB")]


def restored(path: Path, base: Path) -> dict[str, torch.Tensor]:
    return open_models(path, theta_0=open_theta_0(base))[0].tensors()


def test_a_vector_and_its_base_give_the_model_bit_for_bit(tmp_path: Path, base: Path) -> None:
    """Also where theta_0 + (theta - theta_0) is not theta in floating point: numbers of all sizes."""
    generator = torch.Generator().manual_seed(0)
    network = base_network()
    state = network.state_dict()
    sizes = {name: 10 ** torch.empty(tensor.shape).uniform_(-12, 3, generator=generator)
             for name, tensor in state.items() if "seg_layers" not in name and "convs" in name}
    change = {name: size * torch.randn(size.shape, generator=generator) for name, size in sizes.items()}
    plain = write_model(tmp_path / "plain", {"background": 0, "A": 1}, base=network)
    layout = open_models(plain)[0].layout
    change = {name: change[layout.canonical[name]] for name in layout.shapes if layout.canonical[name] in change}
    model = write_model(tmp_path / "model", {"background": 0, "A": 1}, base=network, change=change)
    for source in (plain, model):
        header = extract(source, tmp_path / f"{source.name}.safetensors")
        theta = open_models(source)[0].tensors()
        again = restored(tmp_path / f"{source.name}.safetensors", base)
        assert list(again) == list(theta)
        for name, tensor in theta.items():
            assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
        assert header.theta_0 == open_models(source)[0].theta_0_sha256
    assert (tmp_path / "plain.safetensors").stat().st_size < 1.3 * sum(
        4 * tensor.numel() for tensor in open_models(plain)[0].tensors().values()) + 20000  # few exceptions, a header


def test_integers_and_half_precision_survive(tmp_path: Path) -> None:
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm3d")
    base = write_model(tmp_path / "base", plans=plans, seed=1)
    model = write_model(tmp_path / "model", plans=plans, seed=2)
    for folder, shift in ((base, 3), (model, 7)):
        path = folder / "fold_0" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        content["network_weights"] = {name: tensor.half() if tensor.is_floating_point() else tensor + shift
                                      for name, tensor in content["network_weights"].items()}
        torch.save(content, path)
    extract(model, tmp_path / "vector.safetensors", base=base)
    again = restored(tmp_path / "vector.safetensors", base)
    for name, tensor in open_models(model)[0].tensors().items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name


@pytest.mark.parametrize(("dtype", "density"), [("float32", 0.25), ("float16", 1.0), ("bfloat16", 0.1)])
def test_lossy_files_hold_what_was_asked_for(tmp_path: Path, base: Path, tasks: list[Path], dtype: str,
                                             density: float) -> None:
    path = tmp_path / "vector.safetensors"
    extract(tasks[0], path, dtype=dtype, density=density)
    theta, theta_0, again = open_models(tasks[0])[0].tensors(), open_theta_0(base), restored(path, base)
    tau = torch.cat([(theta[name] - theta_0[name]).reshape(-1) for name in theta_0])
    got = torch.cat([(again[name] - theta_0[name]).reshape(-1) for name in theta_0])
    kept = max(1, round(density * tau.numel()))
    limit = np.sort(tau.abs().numpy())[-kept]
    expected = torch.where(tau.abs() >= limit, tau.to(getattr(torch, dtype)).float(), 0.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # theta_0 + tau rounds
    assert abs(int((got != 0).sum()) - kept) <= 0.01 * kept + 1
    for name in theta.keys() - theta_0.keys():
        assert torch.equal(again[name], theta[name])
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    bits = tau.numel() / 8 if density < 1 else 0
    stored = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.read_safetensors(path)[0].values())
    heads = sum(4 * theta[name].numel() for name in theta.keys() - theta_0.keys())
    assert stored - heads <= kept * sizes[dtype] + bits + 100


@pytest.mark.parametrize("method", ["average", "ties", "task_arithmetic"])
def test_files_merge_like_their_models(tmp_path: Path, base: Path, tasks: list[Path], method: str) -> None:
    files = [tmp_path / f"{task.name}.safetensors" for task in tasks]
    for task, file in zip(tasks, files, strict=True):
        extract(task, file)
    from_models = merge_folders(tasks, recipe=Recipe(method))["all"]
    for given in (files, [tasks[0], files[1]]):
        from_files = merge_folders(given, base=base, recipe=Recipe(method))["all"]
        assert all(torch.equal(tensor, from_files.state_dict[name]) for name, tensor in from_models.state_dict.items())
        assert from_files.dataset_json == from_models.dataset_json
        assert from_files.mirroring_axes == (0, 2)
    write_merge({"all": from_files}, tmp_path / "merged")
    inputs = json.loads((tmp_path / "merged" / "merge.json").read_text())["folds"]["all"]["inputs"]
    assert inputs[1]["path"] == str(files[1]) and inputs[1]["sha256"] == file_sha256(files[1])


@pytest.mark.parametrize(("labels", "order"), [
    ([{"background": 0, "spleen": 1, "liver": 2}, {"background": 0, "kidney": 1, "aorta": 2}], None),
    ([{"background": 0, "spleen": 1, "liver": 2}] * 2, None),
    ([{"background": 0, "whole": [1, 2, 3], "core": [2, 3], "edge": 3}] * 2, [1, 2, 3]),
    ([{"background": 0, "whole": [1, 2], "core": [2]}, {"background": 0, "vessels": [1, 2], "aorta": [2]}], [1, 2])])
def test_labels_keep_their_order(tmp_path: Path, base: Path, labels: list[dict], order: list | None) -> None:
    """It says which row of a head is which region, and which value a structure gets."""
    network = base_network()
    models = [write_model(tmp_path / f"model_{i}", each, order, base=network, seed=i) for i, each in enumerate(labels)]
    files = [tmp_path / f"{i}.safetensors" for i in range(len(models))]
    for model, file in zip(models, files, strict=True):
        extract(model, file)
    expected = merge_folders(models, recipe=Recipe("ties"))["all"]
    for given in (files, [files[0], models[1]]):
        found = merge_folders(given, base=base, recipe=Recipe("ties"))["all"]
        assert json.dumps(found.dataset_json) == json.dumps(expected.dataset_json)
        assert all(torch.equal(tensor, found.state_dict[name]) for name, tensor in expected.state_dict.items())


def test_the_file_says_where_it_came_from_and_nothing_of_patients(tmp_path: Path, tasks: list[Path]) -> None:
    dataset = json.loads((tasks[0] / "dataset.json").read_text())
    dataset["dataset"] = {"patient": {"images": ["/secret/patient.nii.gz"]}}
    (tasks[0] / "dataset.json").write_text(json.dumps(dataset))
    for name in ("one", "two"):
        extract(tasks[0], tmp_path / f"{name}.safetensors")
    content = (tmp_path / "one.safetensors").read_bytes()
    assert b"secret" not in content and content == (tmp_path / "two.safetensors").read_bytes()
    header = read_header(tmp_path / "one.safetensors")
    path = tasks[0] / "fold_0" / "checkpoint_final.pth"
    assert header.source == {"path": str(path), "sha256": file_sha256(path)}
    assert header.dataset_json["labels"] == {"background": 0, "A": 1} and header.configuration == "3d_fullres"


def test_wrong_bases_and_requests_are_refused(tmp_path: Path, base: Path, tasks: list[Path]) -> None:
    path = tmp_path / "vector.safetensors"
    other = write_model(tmp_path / "other", {"background": 0, "all": 1}, seed=5)
    stock = write_model(tmp_path / "stock", {"background": 0, "A": 1}, base=base_network(), record_base=False)
    folds = write_model(tmp_path / "folds", {"background": 0, "A": 1}, base=base_network())
    write_model(folds, {"background": 0, "A": 1}, base=base_network(), fold="1")
    for arguments, message in (
            ({"model": stock}, "give it with -base"), ({"model": tasks[0], "base": other}, "is not the one"),
            ({"model": folds}, "choose one with -f"), ({"model": tasks[0], "density": 0.0}, "-density must be above 0"),
            ({"model": tasks[0], "density": float("nan")}, "-density"),
            ({"model": tasks[0], "dtype": "int8"}, "-dtype"),
            ({"model": base, "base": write_model(tmp_path / "residual", plans=small_plans(residual=True))},
             "another network")):
        with pytest.raises(TransplantError, match=message):
            extract(output=path, **arguments)
    with pytest.raises(TransplantError, match="must end in .safetensors"):
        extract(tasks[0], tmp_path / "vector.bin")
    assert not path.exists()
    extract(stock, path, base=base)
    with pytest.raises(TransplantError, match="give the base"):
        merge_folders([path])
    with pytest.raises(TransplantError, match="of another base"):
        merge_folders([path], base=other)


def test_an_existing_file_is_replaced_only_if_asked(tmp_path: Path, tasks: list[Path]) -> None:
    path = tmp_path / "vector.safetensors"
    path.write_text("mine")
    with pytest.raises(TransplantError, match="exists already; give another -o, or --overwrite"):
        extract(tasks[0], path)
    assert path.read_text() == "mine"
    extract(tasks[0], path, overwrite=True)
    assert read_header(path).dataset_json["labels"] == {"background": 0, "A": 1}


def test_damaged_files_are_refused(tmp_path: Path, base: Path, tasks: list[Path]) -> None:
    path = tmp_path / "vector.safetensors"
    extract(tasks[0], path, density=0.5)
    tensors, metadata = checkpoint.read_safetensors(path)
    for change in (lambda t: t.pop(next(iter(t))), lambda t: t.update({k: v[:-1] for k, v in t.items()}),
                   lambda t: t.update({k: v.long() * 10 ** 9 for k, v in t.items() if v.dtype == torch.uint8})):
        broken = dict(tensors)
        change(broken)
        checkpoint.write_safetensors(broken, path, metadata)
        with pytest.raises(TransplantError, match="does not fit the network"):
            merge_folders([path], base=base)
    for bad in ({}, {"nnunet_transplant": "[]"}, {"nnunet_transplant": "{"}, {"nnunet_transplant": '{"theta_0": 1}'}):
        checkpoint.write_safetensors(tensors, path, bad)
        with pytest.raises(TransplantError, match="is not a task vector file"):
            merge_folders([path], base=base)
