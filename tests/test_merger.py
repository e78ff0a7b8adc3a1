"""Merging models: what nnU-Net makes of it, what is refused, and many merges of the same models."""
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory import base_network, random_network, small_plans, write_model, write_volumes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_transplant import cost, volumes
from nnunet_transplant import merger as merger_module
from nnunet_transplant.alignment import aligners
from nnunet_transplant.errors import TransplantError, TransplantNote
from nnunet_transplant.fitting import head
from nnunet_transplant.merged_model import Merged, MergedModel
from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.methods import fisher, regmean
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.task_vector import theta_0_path
from nnunet_transplant.volumes import Volumes

LABELS = {"softmax": ({"background": 0, "one": 1, "two": 2}, None),
          "regions": ({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])}


@pytest.fixture
def base() -> torch.nn.Module:
    return base_network()


@pytest.fixture
def tasks(tmp_path: Path, base: torch.nn.Module) -> list[Path]:
    return [write_model(tmp_path / "a", {"background": 0, "A": 1}, base=base, seed=1, axes=(0, 1, 2)),
            write_model(tmp_path / "b", {"background": 0, "B": 1, "C": 2}, base=base, seed=2, axes=(0, 2))]


def stock_logits(folder: Path, image: torch.Tensor, fold: str) -> torch.Tensor:
    """What nnU-Net's own predictor makes of a model folder: logits of a preprocessed image (C, x, y, z)."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (fold,))
    return predictor.predict_logits_from_preprocessed_data(image).float()


def network_logits(folder: Path, image: torch.Tensor) -> torch.Tensor:
    """The plain forward pass of a model folder's network, in float32: (C, x, y, z)."""
    plans, dataset = (json.loads((folder / f"{name}.json").read_text()) for name in ("plans", "dataset"))
    path = next(folder.glob("fold_*/checkpoint_final.pth"))
    network = random_network(plans, dataset, 0)
    network.load_state_dict(torch.load(path, weights_only=False)["network_weights"])
    network.decoder.deep_supervision = False
    with torch.no_grad():
        return network.eval()(image[None])[0]


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("residual", [False, True])
def test_one_model_alone_predicts_the_same_voxels(tmp_path: Path, kind: str, dim: int, residual: bool) -> None:
    labels, order = LABELS[kind]
    model = write_model(tmp_path / "model", labels, order, plans=small_plans(dim, residual),
                        axes=tuple(range(dim)))
    merge_folders([model], recipe=Recipe(weights=[1.0])).save(tmp_path / "merged")
    image = torch.randn(1, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stock_logits(model, image, "0"), stock_logits(tmp_path / "merged", image, "all"))


def test_joined_softmax_heads_follow_the_rule_of_the_tasks_own_logits(tmp_path: Path, tasks: list[Path]) -> None:
    """The same body in both tasks, so that the merged body is that body: then every structure's logit must be its
    task's z_c - z_bg, and the argmax the best-scoring structure, background where no score is positive."""
    body = open_models(tasks[0])[0]
    bodies = {name: tensor for name, tensor in body.state_dict().items() if ".seg_layers." not in name}
    second = write_model(tmp_path / "same_body", {"background": 0, "B": 1, "C": 2}, seed=5, change=bodies)
    merge_folders([tasks[0], second]).save(tmp_path / "merged")
    image = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    a, bc, merged = (network_logits(folder, image) for folder in (tasks[0], second, tmp_path / "merged"))
    scores = np.stack([(a[1] - a[0]).numpy(), (bc[1] - bc[0]).numpy(), (bc[2] - bc[0]).numpy()])
    np.testing.assert_allclose(merged[0].numpy(), 0, atol=0)
    np.testing.assert_allclose(merged[1:].numpy(), scores, rtol=1e-4, atol=1e-4)
    best = scores.argmax(0) + 1
    best[scores.max(0) <= 0] = 0
    decided = np.sort(np.concatenate([np.zeros_like(scores[:1]), scores]), 0)
    clear = decided[-1] - decided[-2] > 1e-3  # rounding may decide the others
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(merged.argmax(0).numpy()[clear], best[clear])


def test_joined_region_heads_keep_each_regions_logit(tmp_path: Path) -> None:
    parent = {"parent": "Dataset001_P", "parent_labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "in": 3},
              "parent_regions_class_order": [1, 2, 3]}

    def task(name: str, seed: int, labels: dict, order: list[int], classes: dict, change: dict) -> Path:
        return write_model(tmp_path / name, labels, order, seed=seed, change=change,
                           nnunet_transplant=parent | {"classes": classes})
    core = task("core", 1, {"background": 0, "core": [1, 2]}, [1], {"core": ["core"]}, {})
    body = {name: tensor for name, tensor in open_models(core)[0].state_dict().items() if "seg_layers" not in name}
    other = task("other", 2, {"background": 0, "whole": [1, 2], "in": 2}, [1, 2], {"whole": ["whole"], "in": ["in"]},
                 body)
    merge_folders([core, other]).save(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "dataset.json").read_text())
    # nested as in the parent, outermost first, so that nnU-Net writes the inner ones over the outer ones
    assert written["labels"] == {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "in": [3]}
    assert written["regions_class_order"] == [1, 2, 3]
    image = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    one, two, merged = (network_logits(folder, image) for folder in (core, other, tmp_path / "merged"))
    torch.testing.assert_close(merged, torch.stack([two[0], one[0], two[1]]), rtol=1e-4, atol=1e-4)


def test_shared_structure_is_averaged_and_forgotten_ones_are_gone(tmp_path: Path, base: torch.nn.Module) -> None:
    a = write_model(tmp_path / "a", {"background": 0, "A": 1, "B": 2}, base=base, seed=1)
    b = write_model(tmp_path / "b", {"background": 0, "B": 1}, base=base, seed=2)
    merged = merge_folders([a, b], recipe=Recipe(weights=[0.25, 0.75]))["all"]
    head = "decoder.seg_layers.1.weight"
    of_a, of_b = (open_models(model)[0].state_dict()[head] for model in (a, b))
    torch.testing.assert_close(merged.state_dict[head][2], 0.25 * (of_a[2] - of_a[0]) + 0.75 * (of_b[1] - of_b[0]))
    forgot = merge_folders([a, b], recipe=Recipe("task_arithmetic", [1, -1]))["all"]
    assert list(forgot.dataset_json["labels"]) == ["background", "A", "B"]
    forgot = merge_folders([a, b], recipe=Recipe("task_arithmetic", [-1, 1]))["all"]
    assert forgot.dataset_json["labels"] == {"background": 0, "B": 1}


def test_folds_average_and_per_fold(tmp_path: Path, base: torch.nn.Module) -> None:
    folders = {"x": {"background": 0, "X": 1}, "y": {"background": 0, "Y": 1}}
    for i, (name, labels) in enumerate(folders.items()):
        for fold in ("0", "1"):
            write_model(tmp_path / name, labels, base=base, seed=10 * i + int(fold), fold=fold)
    paths = [tmp_path / name for name in folders]
    tensor = "encoder.stages.0.0.convs.0.conv.weight"
    thetas = [[model.state_dict()[tensor] for model in open_models(path)] for path in paths]
    whole = merge_folders(paths)["all"]
    torch.testing.assert_close(whole.state_dict[tensor], sum(sum(folds) for folds in thetas) / 4)
    per_fold = merge_folders(paths, per_fold=True)
    assert list(per_fold) == ["0", "1"]
    torch.testing.assert_close(per_fold["1"].state_dict[tensor], (thetas[0][1] + thetas[1][1]) / 2)
    per_fold.save(tmp_path / "merged")
    assert [model.fold for model in open_models(tmp_path / "merged")] == ["0", "1"]
    with pytest.raises(TransplantError, match="same folds"):
        merge_folders([*paths, write_model(tmp_path / "z", {"background": 0, "Z": 1}, base=base, fold="0")],
                      per_fold=True)


def test_mirroring_is_what_all_allow(tmp_path: Path) -> None:
    for one, two, expected in [((0, 1, 2), (1, 2), (1, 2)), ((0,), (1,), None), ((0, 1), None, None)]:
        models = [write_model(tmp_path / f"{one}{two}{i}", axes=axes) for i, axes in enumerate((one, two))]
        assert merge_folders(models)["all"].mirroring_axes == expected


def test_half_precision_weights_stay_half_precision_and_integers_are_copied(tmp_path: Path) -> None:
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm3d")
    models = [write_model(tmp_path / str(seed), plans=plans, seed=seed) for seed in (1, 2)]
    networks = []
    for shift, model in zip((7, 9), models, strict=True):
        path = model / "fold_0" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=False)
        content["network_weights"] = {name: tensor.half() if tensor.is_floating_point() else tensor + shift
                                      for name, tensor in content["network_weights"].items()}
        torch.save(content, path)
        networks.append(content["network_weights"])
    merged = merge_folders(models, recipe=Recipe(weights=[0.25, 0.75]))["all"].state_dict
    in_halves = 0
    for name, one in networks[0].items():
        other = networks[1][name]
        expected = (0.25 * one.float() + 0.75 * other.float()).half() if one.is_floating_point() else one
        assert merged[name].dtype == one.dtype
        assert torch.equal(merged[name], expected), name
        in_halves += int((0.25 * one + 0.75 * other != expected).sum())
    assert in_halves > 100  # halves would be computed otherwise


def test_stock_fine_tuning_needs_the_base_given(tmp_path: Path, base: torch.nn.Module) -> None:
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i, record_base=False)
              for i, name in enumerate("AB")]
    given = write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base.state_dict())
    with pytest.raises(TransplantError, match="needs theta_0"):
        merge_folders(models, recipe=Recipe("ties"))
    recorded = [write_model(tmp_path / f"r{name}", {"background": 0, name: 1}, base=base, seed=i)
                for i, name in enumerate("AB")]
    for method in ("ties", "task_arithmetic"):
        by_hand = merge_folders(models, recipe=Recipe(method), base=given)["all"]
        by_record = merge_folders(recorded, recipe=Recipe(method))["all"]
        assert all(torch.equal(by_hand.state_dict[name], tensor) for name, tensor in by_record.state_dict.items())
    assert not merge_folders(models)["all"].notes
    strangers = [write_model(tmp_path / f"s{seed}", seed=seed) for seed in (1, 2)]
    assert "do not seem to come from one base" in merge_folders(strangers)["all"].notes[0]
    assert merge_folders(strangers, recipe=Recipe(weights=[1.0, 0.0]))["all"].notes == []  # nothing of the other


def refuse_other_architecture(tmp: Path, base: torch.nn.Module) -> list[Path]:
    return [write_model(tmp / "a"), write_model(tmp / "b", plans=small_plans(residual=True))]


def refuse_other_spacing(tmp: Path, base: torch.nn.Module) -> list[Path]:
    return [write_model(tmp / "a"), write_model(tmp / "b", plans=small_plans(spacing=2.0))]


def refuse_other_base(tmp: Path, base: torch.nn.Module) -> list[Path]:
    return [write_model(tmp / "a", base=base), write_model(tmp / "b", base=base_network(seed=7))]


def refuse_nan(tmp: Path, base: torch.nn.Module) -> list[Path]:
    name = "encoder.stages.0.0.convs.0.conv.bias"
    return [write_model(tmp / "a"), write_model(tmp / "b", change={
        name: torch.tensor([1, float("nan"), 0, 0]), name.replace("conv.", "all_modules.0."): torch.tensor(
            [1, float("nan"), 0, 0]), **{f"decoder.{n}": torch.tensor([1, float("nan"), 0, 0]) for n in (
                name, name.replace("conv.", "all_modules.0."))}})]


def refuse_regions_beside_labels(tmp: Path, base: torch.nn.Module) -> list[Path]:
    return [write_model(tmp / "a"), write_model(tmp / "b", *LABELS["regions"])]


def refuse_label_clash(tmp: Path, base: torch.nn.Module) -> list[Path]:
    return [write_model(tmp / name, {"background": 0, "kidney": 1},
                        nnunet_transplant={"classes": {"kidney": parts}})
            for name, parts in (("a", ["left", "right"]), ("b", ["left"]))]


def refuse_truncated(tmp: Path, base: torch.nn.Module) -> list[Path]:
    model = write_model(tmp / "a")
    path = model / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:5000])
    return [model]


class RunsCode:
    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.system, ("touch pickle_ran_code",)


def refuse_code(tmp: Path, base: torch.nn.Module) -> list[Path]:
    model = write_model(tmp / "a")
    path = model / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(path, weights_only=False) | {"more": RunsCode()}, path)
    return [model]


def refuse_without_plans(tmp: Path, base: torch.nn.Module) -> list[Path]:
    model = write_model(tmp / "a")
    (model / "plans.json").unlink()
    return [model]


def refuse_broken_plans(tmp: Path, base: torch.nn.Module) -> list[Path]:
    model = write_model(tmp / "a")
    (model / "plans.json").write_text("{")
    return [model]


def refuse_missing(tmp: Path, base: torch.nn.Module) -> list[Path]:
    return [tmp / "nowhere"]


def refuse_other_trainer(tmp: Path, base: torch.nn.Module) -> list[Path]:
    model = write_model(tmp / "a")
    path = model / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=False) | {"trainer_name": "nnUNetTrainerOfMine"}
    content["network_weights"]["attention"] = torch.ones(2)  # not the stock network
    torch.save(content, path)
    return [model]


REFUSED = {
    refuse_other_architecture: "cannot merge; they differ in", refuse_other_spacing: "spacing: [1.0, 1.0, 1.0] | [2.0",
    refuse_other_base: "theta_0 (SHA-256)", refuse_nan: "holds NaN or Inf in",
    refuse_label_clash: "'kidney' is left+right",
    refuse_regions_beside_labels: "has regions, others have plain labels", refuse_truncated: "truncated or damaged",
    refuse_code: "posix.system", refuse_without_plans: "has no plans.json", refuse_broken_plans: "not valid JSON",
    refuse_missing: "there is no model folder", refuse_other_trainer: "does not find the trainer 'nnUNetTrainerOfMine'",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_refused(tmp_path: Path, base: torch.nn.Module, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TransplantError) as error:
        merge_folders(make(tmp_path, base))
    assert REFUSED[make] in str(error.value)
    assert not (tmp_path / "pickle_ran_code").exists()


def test_trusting_a_file_is_explicit(tmp_path: Path, base: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    merge_folders(refuse_code(tmp_path, base), trust=True)
    assert (tmp_path / "pickle_ran_code").exists()


def test_wrong_base_and_damaged_base_are_refused(tmp_path: Path, tasks: list[Path], base: torch.nn.Module) -> None:
    other = write_model(tmp_path / "other", {"background": 0, "all": 1}, seed=8)
    with pytest.raises(TransplantError, match="is not the one these models were fine-tuned from"):
        merge_folders(tasks, recipe=Recipe("ties"), base=other)
    wide = write_model(tmp_path / "wide", {"background": 0, "all": 1}, plans=small_plans(residual=True))
    with pytest.raises(TransplantError, match="another network"):
        merge_folders(tasks, recipe=Recipe("ties"), base=wide)
    kept = theta_0_path(tasks[0], open_models(tasks[0])[0].theta_0_sha256)
    content = bytearray(kept.read_bytes())
    content[-1] ^= 1
    kept.write_bytes(content)
    with pytest.raises(TransplantError, match="SHA-256 differs"):
        merge_folders(tasks, recipe=Recipe("ties"))


# ---------------------------------------------------------------------------------------------------------------------
# Many merges of the same models

@pytest.fixture(scope="module")
def raw(nnunet: Path) -> Path:
    return write_volumes(nnunet / "raw", "Dataset501_Boxes", {"background": 0, "A": 1, "B": 2, "C": 3}, cases=2,
                         shape=(16, 16, 16))


VOLUMES = Volumes([501], 2)
MANY: dict[str, tuple[Recipe, list[tuple[list[float] | None, dict[str, Any]]]]] = {
    "by ties": (Recipe("ties", parameters={"density": 0.4}), [
        (None, {}), ([1, 2], {}), ([1, 2], {"density": 0.7}), (None, {"lambda_": 0.5, "ties.trim": "tensor"}),
        (None, {})]),
    "held back": (Recipe("dare", keep_base_for=["*norm*"], stage_weights=[1, 0.5, 0, 1, 2]), [
        ([0.5, 0.5], {}), ([1, 2], {"seed": 3}), ([0.5, 0.5], {})]),
    "one is forgotten, and comes back": (Recipe("task_arithmetic", fit=["head"], volumes=VOLUMES), [
        ([1, 1], {}), ([1, -1], {}), ([-1, 1], {"positions": 60}), ([1, 1], {})]),
    "by volumes": (Recipe("fisher", volumes=VOLUMES, fit=["head", "polish"], parameters={"steps": 1}), [
        (None, {}), ([0.2, 0.8], {}), (None, {"fisher.seed": 2}), (None, {"head.seed": 2}), ([0.8, 0.2], {"lr": 0.01}),
        (None, {})]),
    "by Gram matrices": (Recipe("regmean", volumes=VOLUMES), [
        (None, {}), ([0.2, 0.8], {}), (None, {"off_diagonal": 0.5}), (None, {})]),
    "aligned": (Recipe(align="activation", volumes=VOLUMES, fit=["head"]), [
        (None, {}), ([0.3, 0.5, 0.2], {}), (None, {"to": "mean"}), (None, {"units": "zip", "decay": 0.9}),
        ([0.2, 0.2, 0.6], {"positions": 60}), (None, {})]),
    "aligned by what comes of it": (Recipe(align="mudsc", volumes=VOLUMES, parameters={"search_alpha": "agreement"}), [
        (None, {}), ([0.1, 0.3, 0.6], {}), (None, {"search_alpha": "no", "alpha": 0.0}), (None, {})]),
}


@pytest.mark.parametrize(("recipe", "labels"), [
    (Recipe("fisher", fit=["head"], volumes=VOLUMES), {"labels": "dataset"}),
    (Recipe(align="mudsc", volumes=VOLUMES), {"search_alpha": "dice"})], ids=["fisher", "mudsc"])
def test_label_maps_are_read_where_a_step_wants_them(tmp_path: Path, tasks: list[Path], raw: Path, recipe: Recipe,
                                                     labels: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: then it does not matter what they are. Later merges of the same merger may still want them."""
    groups = [open_models(path) for path in tasks[:2]]
    fresh = Merger(groups, recipe.given(labels)).merge()
    merger = Merger(groups, recipe)
    assert all(patch.values is None for patch in merger._experts.patches)
    merger.merge()
    assert written(merger.merge(**labels), tmp_path / "later") == written(fresh, tmp_path / "at once")
    assert all(patch.values is not None for patch in merger._experts.patches)
    (tmp_path / "raw").mkdir()
    broken = shutil.copytree(raw, tmp_path / "raw" / raw.name)
    for path in (broken / "labelsTr").iterdir():
        path.write_text("no label map")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    Merger(groups, recipe).merge()
    with pytest.raises(TransplantError, match="nnU-Net cannot read and preprocess case case_0"):
        Merger(groups, recipe).merge(**labels)


def written(merged: MergedModel, folder: Path) -> dict[str, bytes]:
    Merged({"all": merged}).save(folder, overwrite=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("recipe", "passes"), [
    (Recipe(fit=["head"]), 3 * 2), (Recipe("fisher", fit=["head"]), 3 * 2 * 2 + 3 * 2),
    (Recipe(fit=["polish"], parameters={"steps": 7}), 2 * 2 + 7 * 2 * 3), (Recipe(align="activation"), 1.3 * 2 * 2)])
def test_what_looking_costs_is_said_before(tasks: list[Path], raw: Path, recipe: Recipe, passes: float,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward passes of two models over two patches, in batches of two; and nothing of what takes no time."""
    groups = [open_models(path) for path in tasks[:2]]
    recipe = Recipe(recipe.method, align=recipe.align, fit=recipe.fit, parameters=recipe.parameters,
                    volumes=Volumes([501], 2, n_patches=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Merger(groups, recipe, progress=True)
    monkeypatch.setattr(cost, "WORTH_SAYING", 0.0)
    # a check: what models, merge and base say of all patches, and the head of the base, which learns from the models
    passes += 3 * 2 if recipe.align else (2 + 2) * 2 + 2 + 2 * 2 * (not recipe.fit)
    with pytest.warns(TransplantNote, match=rf"^2 patches of 16x16x16 voxels, about {passes:.0f} passes of a network: "
                                            r"about \d+ seconds on cpu\. Fewer patches \(-n_patches\) or a GPU"):
        Merger(groups, recipe, progress=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Merger(groups, recipe)


@pytest.mark.parametrize("name", MANY)
def test_many_merges_of_one_merger_are_as_fresh_ones(tmp_path: Path, tasks: list[Path], raw: Path, name: str) -> None:
    recipe, turns = MANY[name]
    if recipe.align is not None:  # with no common base: else all are in the same units already
        tasks = [write_model(tmp_path / f"stranger{seed}", {"background": 0, "A": 1, "B": 2}, seed=seed)
                 for seed in range(3)]
    groups = [open_models(task) for task in tasks]
    merger = Merger(groups, recipe)
    seen = []
    for weights, parameters in turns:
        found = written(merger.merge(weights, **parameters), tmp_path / "one")
        assert found == written(Merger(groups, recipe).merge(weights, **parameters), tmp_path / "other")
        recorded = json.loads(found["merge.json"])["folds"]["all"]["recipe"]
        assert recorded["weights"] == weights
        assert Recipe.from_json(recorded, "it").settings() == recipe.given(parameters).settings()
        seen.append(found)
        tensors = merger.tensors(weights, **parameters)
        state = merger.merge(weights, **parameters).state_dict
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert seen[0] == seen[-1] and len({each["fold_all/checkpoint_final.pth"] for each in seen}) == len(seen) - 1
    assert merger.recipe == recipe


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """Grows with every call."""
    calls: list[str] = []
    function = getattr(module, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*args, **options)
    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("align", ["rebasin", "activation", "mudsc"])
def test_what_depends_on_no_weights_is_done_once(tasks: list[Path], raw: Path, monkeypatch: pytest.MonkeyPatch,
                                                 align: str) -> None:
    calls = {name: count(monkeypatch, module, name) for module, name in (
        (volumes, "preprocess"), (merger_module, "file_sha256"), (aligners, "match"), (aligners, "derive"),
        (aligners, "activation_similarity"), (head, "ensemble_logits"))}
    merger = Merger([open_models(task) for task in tasks], Recipe(align=align, volumes=VOLUMES, fit=["head"]))
    for share in (0.1, 0.3, 0.5, 0.9):
        merger.merge([share, 1 - share])
        merger.tensors([1 - share, share])
    expected = {"preprocess": 1, "file_sha256": len(tasks), "match": 1, "derive": 1,
                "activation_similarity": int(align != "rebasin"), "ensemble_logits": 1}
    assert {name: len(made) for name, made in calls.items()} == expected
    merger.merge([0.1, 0.9], to="mean")
    merger.merge([0.9, 0.1], to="mean")
    assert len(calls["match"]) == 2
    merger.merge(None, to="mean", positions=50)  # the head looks at other voxels, the units are the same
    assert len(calls["match"]) == 2
    assert len(calls["ensemble_logits"]) == 2
    for name in ("preprocess", "file_sha256", "derive", "activation_similarity"):
        assert len(calls[name]) == expected[name]


def test_an_alignment_that_tried_what_comes_of_it_is_made_anew_for_other_weights(
        tasks: list[Path], raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch, aligners, "match")
    merger = Merger([open_models(task) for task in tasks], Recipe(
        align="mudsc", volumes=VOLUMES, parameters={"search_alpha": "agreement"}))
    for weights, expected in ((None, 1), (None, 1), ([0.2, 0.8], 2), ([0.2, 0.8], 2), ([0.8, 0.2], 3)):
        merger.merge(weights)
        assert len(calls) == expected * len(aligners.ALPHAS)


def test_statistics_that_depend_on_no_weights_are_made_once(tasks: list[Path], raw: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [open_models(task) for task in tasks]
    for method, (module, name) in {"fisher": (fisher, "diagonal"), "regmean": (regmean, "grams")}.items():
        calls = count(monkeypatch, module, name)
        merger = Merger(groups, Recipe(method, volumes=VOLUMES))
        for share in (0.5, 0.2, 0.9):
            merger.merge([share, 1 - share])
        assert len(calls) == len(tasks)


def test_other_options_of_one_merge_are_checked(tasks: list[Path]) -> None:
    merger = Merger([open_models(task) for task in tasks], Recipe("ties"))
    before = merger.tensors()
    for weights, parameters, message in (
            ([1], {}, "-weights has 1 numbers for 2 models"), ([-1, 1], {}, "must not be negative"),
            ([float("nan"), 1], {}, "finite"), (None, {"density": 2}, "-density must lie between 0 and 1"),
            (None, {"densty": 0.2}, "did you mean density"), (None, {"dare.density": 0.2}, "no -dare.density")):
        for do in (merger.merge, merger.tensors):
            with pytest.raises(TransplantError, match=message):
                do(weights, **parameters)
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.tensors().items())
    zipped = Merger([open_models(task) for task in tasks], Recipe(align="rebasin"))
    zipped.merge([0.3, 0.7])
    with pytest.raises(TransplantError, match="a zip merges all models equally: leave out -weights"):
        zipped.merge([0.3, 0.7], units="zip")
