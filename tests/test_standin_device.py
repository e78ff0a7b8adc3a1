"""Everything that computes on a device, on a GPU that the CPU plays: it ends, what is kept of it is on the CPU, and it
is what the CPU makes of it."""
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pandas
import pytest
import torch
from evaluated import edit_json, read
from expert_models import experts_with
from factory import base_network, small_plans, write_model, write_volumes
from standin import OnDevice, standin

from nnunet_transplant import device
from nnunet_transplant.alignment import ALIGNERS, aligners
from nnunet_transplant.analysis import curvature
from nnunet_transplant.analysis.flatness import flatness
from nnunet_transplant.analysis.landscape import landscape
from nnunet_transplant.analysis.scoring import MergedNetwork, open_labelled_cases
from nnunet_transplant.data.cases import Cases, open_cases
from nnunet_transplant.evaluation import evaluate
from nnunet_transplant.experts import running_statistics
from nnunet_transplant.fitting import FITS
from nnunet_transplant.merged_model import Merged
from nnunet_transplant.merger import Merger
from nnunet_transplant.merging import merge, predict
from nnunet_transplant.methods import METHODS
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.steps import Step
from nnunet_transplant.targets import name_targets
from nnunet_transplant.volumes import Patch

LABELS = {"background": 0, "A": 1, "B": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": 2}
FEW = {"iterations": 2, "steps": 2}
DEVICES = ["cuda", "mps"]
LOOK = {"images": 501, "n_cases": 2, "n_patches": 5}


# ---------------------------------------------------------------------------------------------------------------------
# The stand-in

@pytest.fixture(params=DEVICES)
def played(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with standin(request.param) as there:
        yield there


def test_what_is_made_there_or_moved_there_is_there(played: torch.device) -> None:
    for tensor in (torch.zeros(3, device=played), torch.arange(3).to(played), torch.ones(2, 2).to(device=played.type),
                   torch.nn.Linear(2, 2).to(played).weight, torch.zeros(1, device=played).new_zeros(3)):
        assert isinstance(tensor, OnDevice) and tensor.device.type == played.type and not tensor.is_cpu
        assert tensor.to(played) is tensor
        for back in (tensor.cpu(), tensor.to("cpu")):
            assert back.device.type == "cpu" and not isinstance(back, OnDevice)
    assert torch.zeros(3).device.type == "cpu" and torch.zeros(3, device="meta").is_meta
    assert (torch.cuda.is_available(), torch.backends.mps.is_available()) == (played.type == "cuda",
                                                                              played.type == "mps")


def test_devices_do_not_mix(played: torch.device) -> None:
    here, there = torch.arange(1.0, 4), torch.arange(1.0, 4).to(played)
    for mixed in (lambda: here + there, lambda: there.mul_(here), lambda: torch.cat([here, there]),
                  lambda: torch.dot(there, here), lambda: here[there.long() - 1],
                  lambda: torch.nn.functional.linear(here, torch.ones(3, 3).to(played)),
                  lambda: torch.where(there > 1, here, there)):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    assert (there + torch.tensor(1.0)).tolist() == [2, 3, 4]  # a number may be anywhere, and indices of what is there
    assert there[torch.tensor([2, 0])].tolist() == there[[2, 0]].tolist() == [3, 1]
    assert torch.where(there > 1, 0.0, there).tolist() == [1, 0, 0]
    assert here.copy_(there) is here and type(here) is torch.Tensor
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        there.numpy()
    with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
        np.asarray(there)
    with pytest.raises(RuntimeError, match="generator"):
        there.exponential_(generator=torch.Generator())
    assert there.exponential_(generator=torch.Generator(played)).tolist() == \
        here.exponential_(generator=torch.Generator()).tolist()


def test_only_mps_has_no_float64() -> None:
    with standin("cuda") as cuda:
        assert torch.ones(2).to(cuda).double().sum().item() == 2
    with standin("mps") as mps:
        there = torch.ones(2).to(mps)
        for wrong in (there.double, lambda: there.sum(dtype=torch.float64), lambda: torch.ones(2).double().to(mps)):
            with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
                wrong()


def test_it_computes_what_the_cpu_does(played: torch.device, tmp_path: Path) -> None:
    """A network and its gradients, in any thread, and what is saved of it."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.InstanceNorm2d(3),
                                  torch.nn.LeakyReLU(inplace=True), torch.nn.ConvTranspose2d(3, 2, 2, 2))
    image = torch.randn(2, 1, 8, 8)
    (said := network(image))[:, 1].square().mean().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    found = []

    def work() -> None:
        network.to(played)
        found.append(network(image.to(played)))
        found[0][:, 1].square().mean().backward()
    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert all(isinstance(parameter.grad, OnDevice) for parameter in network.parameters())
    torch.testing.assert_close(found[0].cpu(), said)
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient)
    torch.save(network.state_dict(), tmp_path / "saved.pt")
    for name, tensor in torch.load(tmp_path / "saved.pt", map_location="cpu", weights_only=True).items():
        assert torch.equal(tensor, network.state_dict()[name].cpu())


# ---------------------------------------------------------------------------------------------------------------------
# Steps of a merge

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's folders with a small dataset, and models of it: tasks; and folds with regions and batch norms."""
    root = tmp_path_factory.mktemp("device")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligners, "ALPHAS", [0.0, 1.0])
        patch.setattr(torch, "set_num_threads", lambda count: None)  # threads of a CPU cost small networks time
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(root / name))
        write_volumes(root / "raw", "Dataset501_Boxes", LABELS, 2, (16, 16, 16))
        regions = write_volumes(root / "raw", "Dataset502_Regions", REGIONS, 2, (16, 16, 16))
        edit_json(regions / "dataset.json", regions_class_order=[1, 2])
        plans = small_plans(2)
        plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
        base = base_network(plans=plans)
        for seed, name in enumerate("AB"):
            write_model(root / "tasks" / name, {"background": 0, name: 1}, plans=plans, base=base, seed=seed)
        plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["norm_op"] = \
            "torch.nn.modules.batchnorm.BatchNorm2d"
        base = base_network(plans=plans)
        for seed in range(2):
            write_model(root / "regions" / str(seed), REGIONS, [1, 2], plans=plans, base=base, seed=seed)
        yield root


def models_of(folder: Path, kind: str) -> list[Path]:
    return sorted((folder / kind).iterdir())


def looking() -> list[tuple[str, Step]]:
    return [(flag, step) for flag, registry in (("align", ALIGNERS), ("method", METHODS), ("fit", FITS))
            for step in registry.values() if step.looks]


def defaults() -> Iterator[tuple[str, dict]]:
    """Every step that looks at volumes, on both kinds of models."""
    for flag, step in looking():
        few = {parameter.name: FEW[parameter.name] for parameter in step.parameters if parameter.name in FEW}
        for kind in ("tasks", "regions"):
            yield kind, {flag: step.name, **few}


def choices() -> Iterator[tuple[str, dict]]:
    """And with every choice that it offers."""
    given = {options[flag]: options for _, options in defaults() for flag in ("align", "method", "fit")
             if flag in options}
    for _, step in looking():
        for parameter in step.parameters:
            for choice in parameter.choices:
                if choice != parameter.default:
                    yield "tasks", {**given[step.name], parameter.name: choice}


def merged_on(name: str, folder: Path, kind: str, options: dict, **more: object) -> Merged:
    return merge(models_of(folder, kind), device=name,
                 **{**LOOK, "images": 501 if kind == "tasks" else 502, **options, **more})


def said(kind: str, options: dict) -> str:
    return " ".join([kind, *map(str, options.values())])


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> Callable[[str, dict], Merged]:
    known: dict[str, Merged] = {}

    def on_cpu(kind: str, options: dict) -> Merged:
        key = said(kind, options)
        if key not in known:
            known[key] = merged_on("cpu", folder, kind, options)
        return known[key]
    return on_cpu


EVERY = [(name, *case) for case in defaults() for name in DEVICES] + [("mps", *case) for case in choices()]


@pytest.mark.parametrize(("name", "kind", "options"), [
    pytest.param(name, *case, id=f"{name} {said(*case)}") for name, *case in EVERY])
def test_a_step_does_on_a_device_what_it_does_on_a_cpu(folder: Path, tmp_path: Path, name: str, kind: str,
                                                       options: dict, on_cpu: Callable) -> None:
    expected = on_cpu(kind, options)
    with standin(name):
        runs = [merged_on(name, folder, kind, options, cache=tmp_path)]
        if name == "cuda" and any(tmp_path.iterdir()):  # what was kept is on the CPU when it is read again
            runs.append(merged_on(name, folder, kind, options, cache=tmp_path))
    for merged in runs:
        assert merged.provenance["device"] == name
        assert json.loads(json.dumps(merged.provenance["found"])).keys() == expected.provenance["found"].keys()
        for tensor_name, tensor in merged["all"].state_dict.items():
            assert type(tensor) is torch.Tensor and tensor.is_cpu
            torch.testing.assert_close(tensor, expected["all"].state_dict[tensor_name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [pytest.param(*case, id=said(*case)) for case in defaults()])
def test_a_step_ends_in_the_precision_of_a_gpu(folder: Path, kind: str, options: dict, on_cpu: Callable,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU's autocast: the stand-in has none."""
    monkeypatch.setattr(device, "FORWARD", {"cpu": torch.float16})
    monkeypatch.setattr(device, "GRADIENTS", {"cpu": torch.bfloat16})
    merged = merged_on("cpu", folder, kind, options)["all"].state_dict
    for name, tensor in on_cpu(kind, options)["all"].state_dict.items():
        assert merged[name].dtype == tensor.dtype and torch.isfinite(merged[name]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Networks, predictions, analyses

@pytest.mark.parametrize("dim", [2, 3])
def test_a_look_at_a_volume(tmp_path: Path, played: torch.device, dim: int) -> None:
    experts = experts_with([write_model(tmp_path / "m", LABELS, plans=small_plans(dim), seed=3)], [])
    volume = np.random.default_rng(0).normal(size=(1, 20, 18, 16)).astype(np.float32)
    expected = experts.see(0, volume)
    there = replace(experts, device=played)
    assert isinstance(next(there.network(0).parameters()), OnDevice)
    np.testing.assert_array_equal(there.see(0, volume), expected)
    assert expected.any() and not expected.all()


def test_running_statistics_come_back(folder: Path, played: torch.device) -> None:
    patches = [Patch(torch.randn(1, 16, 16), None, Cases("Dataset502_Regions", {}, {})) for _ in range(3)]
    experts = experts_with(models_of(folder, "regions"), patches)
    expected = running_statistics(experts, experts.network(1))
    there = replace(experts, device=played)
    found = running_statistics(there, there.network(1))
    assert all(type(tensor) is torch.Tensor for tensor in found.values()) and len(found) > 4
    torch.testing.assert_close(found, expected)


def test_predictions_with_a_fitted_head(folder: Path, tmp_path: Path, played: torch.device) -> None:
    images = folder / "raw/Dataset501_Boxes/imagesTr"
    for name in ("cpu", played.type):
        predict(models_of(folder, "tasks"), images, tmp_path / name, device=name, on_device=name != "mps", fit="head",
                npp=0, nps=0, num_parts=2, save_probabilities=True, step_size=1.0, **LOOK)
    found, expected = (np.load(tmp_path / name / "case_0.npz")["probabilities"] for name in (played.type, "cpu"))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert (read(tmp_path / played.type / "case_0.nii.gz") == read(tmp_path / "cpu/case_0.nii.gz")).all()


@pytest.mark.parametrize("kind", ["tasks", "regions"])
def test_scores_of_a_sweep(folder: Path, played: torch.device, kind: str) -> None:
    groups = [open_models(path) for path in models_of(folder, kind)]
    cases = open_cases(501 if kind == "tasks" else 502)
    labelled = open_labelled_cases(cases, groups[0][0])
    (targets,), _ = name_targets(["m"], groups[1:], cases)
    scores = []
    for where in (torch.device("cpu"), played):
        network = MergedNetwork(Merger(groups, device=where), where)
        network.set([0.3, 0.7])
        scores.append(network.dice(labelled, targets))
    assert scores[0] == scores[1] and scores[0]


def test_an_evaluation(folder: Path, tmp_path: Path, played: torch.device) -> None:
    frames = [evaluate(models_of(folder, "tasks"), 501, "all", output=tmp_path / name, device=name, step_size=1.0,
                       n_cases=1)
              for name in ("cpu", played.type)]
    pandas.testing.assert_frame_equal(*frames)


def numbers(measured: dict) -> list:
    """Of a flatness.json, without paths and hashes."""
    return [value for each in (*measured["models"].values(), *measured["tasks"].values()) for value in each.values()
            if isinstance(value, (int, float, list))]


def test_analyses_of_the_loss(folder: Path, tmp_path: Path, played: torch.device,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "eigsh", lambda operator, count, v0, **_: operator.matvec(v0)[:count])  # not many
    models = models_of(folder, "regions")
    sharp = [flatness(models[:1], 502, "all", output=tmp_path / f"flat_{name}", n_patches=1, n_eigenvalues=1,
                      n_probes=2, device=name) for name in ("cpu", played.type)]
    for one, other in zip(*map(numbers, sharp), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)
    barriers = [landscape(models, 502, "all", output=tmp_path / f"land_{name}", n_patches=1, line_points=3,
                          device=name)["barriers"] for name in ("cpu", played.type)]
    assert barriers[0].keys() == barriers[1].keys()
    for pair, loss in barriers[0].items():
        np.testing.assert_allclose(barriers[1][pair]["loss"], loss["loss"], atol=1e-5)
