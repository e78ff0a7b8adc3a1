"""Merging models with no common base: their units are put together first, then they are merged."""
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from factory import small_plans, write_model, write_volumes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from permuted import (
    LABELS,
    assert_close,
    canonical,
    image_of,
    logits,
    network_of,
    noisy,
    permuted,
    plans_of,
    spec_of,
    tensors_of,
    write,
)

from nnunet_transplant import merging
from nnunet_transplant import volumes as reading
from nnunet_transplant.alignment import ALIGNERS, aligners
from nnunet_transplant.data.cases import Cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import MergedModel
from nnunet_transplant.merger import Merger, merge_folders
from nnunet_transplant.model_folder import TrainedModel, open_models, open_theta_0
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import read_merge
from nnunet_transplant.volumes import Volumes

MATCHES, ZIPS = list(ALIGNERS), [f"{name} zip" for name in ALIGNERS]
WAYS = MATCHES + ZIPS
TASKS = {"background": 0, "three": 1}
HEADS = ("decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias", "decoder.seg_layers.1.weight",
         "decoder.seg_layers.1.bias")
VOLUMES = Volumes([501], 2)


@pytest.fixture(scope="module", autouse=True)
def raw(nnunet: Path) -> Path:
    """Volumes of one patch in 3d, 16 in 2d."""
    return write_volumes(nnunet / "raw", "Dataset501_Boxes", LABELS, cases=2, shape=(16, 16, 16))


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Networks of the same layers share one spec, and volumes are read once: that takes most of the time of a small
    merge."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("derive", "exported"):
            patch.setattr(aligners, name, once(getattr(aligners, name)))
        patch.setattr(reading, "preprocess", read_once(reading.preprocess))
        yield


def once(function: Callable) -> Callable:
    known: dict[str, object] = {}

    def remember(network: torch.nn.Module, shape: Sequence[int]) -> object:
        key = f"{network} {shape}"
        if key not in known:
            known[key] = function(network, shape)
        return known[key]
    return remember


def read_once(function: Callable) -> Callable:
    known: dict[str, list] = {}

    def remember(datasets: Sequence[Cases], model: TrainedModel, labels: bool, readers: int) -> list:
        key = f"{datasets} {model.plans} {labels}"
        if key not in known:
            known[key] = list(function(datasets, model, labels, readers))
        return known[key]
    return remember


@cache
def original(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return tensors_of(network_of(plans_of(kind), seed=seed), canonical(plans_of(kind)))


def copied(kind: str, seed: int, noise: float = 0.0) -> dict[str, torch.Tensor]:
    return noisy(permuted(original(kind), spec_of(plans_of(kind)), seed), noise, seed)


def folders(tmp_path: Path, kind: str, *tensors: dict[str, torch.Tensor], labels: dict = LABELS) -> list[Path]:
    return [write(tmp_path / f"{kind}_{i}", plans_of(kind), each, labels) for i, each in enumerate(tensors)]


def recipe_of(way: str, weights: Sequence[float] | None = None, **parameters: object) -> Recipe:
    """way: an aligner that matches, or with "zip" behind its name one that zips."""
    align, _, units = way.partition(" ")
    return Recipe(weights=weights, align=align, parameters=parameters | ({"units": units} if units else {}),
                  volumes=VOLUMES if ALIGNERS[align].looks else None)


def model_of(models: Sequence[Path], recipe: Recipe, base: Path | None = None) -> MergedModel:
    return merge_folders(models, recipe=recipe, base=base)["all"]


def merged(models: Sequence[Path], way: str, weights: Sequence[float] | None = None,
           **parameters: object) -> dict[str, torch.Tensor]:
    return model_of(models, recipe_of(way, weights, **parameters)).state_dict


def says(kind: str, state: dict[str, torch.Tensor], labels: dict = LABELS) -> torch.Tensor:
    return logits(plans_of(kind), labels, state, image_of(plans_of(kind)))


@cache
def patches(cases: int = 2) -> torch.Tensor:
    """The volumes (2, 1, 16, 16, 16) as the small plans preprocess them: nothing but z-scored."""
    folder = Path(os.environ["nnUNet_raw"]) / "Dataset501_Boxes" / "imagesTr"
    arrays = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"case_{i}_0000.nii.gz")))
              for i in range(cases)]
    return torch.from_numpy(np.stack([(a - a.mean()) / a.std() for a in arrays])[:, None].astype(np.float32))


@cache
def label_maps(cases: int = 2) -> np.ndarray:
    folder = Path(os.environ["nnUNet_raw"]) / "Dataset501_Boxes" / "labelsTr"
    return np.stack([SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / f"case_{i}.nii.gz")))
                     for i in range(cases)])


# ---------------------------------------------------------------------------------------------------------------------
# Copies in another order

@pytest.mark.parametrize("kind", ["plain3d", "plain2d", "residual2d"])
@pytest.mark.parametrize("way", WAYS)
def test_merged_with_its_permuted_copy_a_model_does_what_it_did(tmp_path: Path, way: str, kind: str) -> None:
    result = merged(folders(tmp_path, kind, copied(kind, 1), original(kind)), way)
    assert_close(says(kind, result), says(kind, original(kind)))
    # in the units of the first model
    for name, tensor in copied(kind, 1).items():
        if "zip" not in way:
            torch.testing.assert_close(result[name], tensor)


def test_only_git_re_basin_compares_by_inner_products(tmp_path: Path) -> None:
    """Those of a unit with its copy are its squared length: 1 of its kernel and what reads it besides; correlations are
    at most 1."""
    models = folders(tmp_path, "plain2d", original("plain2d"), copied("plain2d", 1))
    for way in WAYS:
        found = model_of(models, recipe_of(way)).provenance["found"]
        assert found["similarity"] > 1.5 if way == "rebasin" else 0.9999 < found["similarity"] <= 1
        assert found["alpha"] == {"rebasin": 1, "activation": 0, "mudsc": 0.5}[way.split()[0]]


def test_without_alignment_it_would_not(tmp_path: Path) -> None:
    models = folders(tmp_path, "plain2d", copied("plain2d", 1), original("plain2d"))
    with pytest.raises(AssertionError):
        assert_close(says("plain2d", model_of(models, Recipe()).state_dict), says("plain2d", original("plain2d")), 0.1)


@pytest.mark.parametrize("way", WAYS)
def test_either_order_of_two_models_gives_one_function(tmp_path: Path, way: str) -> None:
    models = folders(tmp_path, "plain2d", original("plain2d"), copied("plain2d", 1, 0.05))
    one, other = (says("plain2d", merged(each, way)) for each in (models, models[::-1]))
    assert_close(one, other)
    assert_close(one, says("plain2d", original("plain2d")), 0.5)  # near to where both come from


@pytest.mark.parametrize("way", ["mudsc", "mudsc zip"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_at_its_ends_is_one_space_alone(tmp_path: Path, way: str, alpha: float) -> None:
    """0: the activations' match; 1: a match by weights alone finds a copy, too."""
    kind = "plain2d"
    models = folders(tmp_path, kind, original(kind), original(kind, 1))
    if alpha == 0:
        same = merged(models, way.replace("mudsc", "activation"))
        found = merged(models, way, alpha=alpha)
        assert all(torch.equal(found[name], same[name]) for name in same)
    models = folders(tmp_path / "copies", kind, original(kind), copied(kind, 2))
    assert_close(says(kind, merged(models, way, alpha=alpha)), says(kind, original(kind)))


@pytest.mark.parametrize("way", MATCHES)
@pytest.mark.parametrize("to", ["first", "mean"])
def test_copies_are_put_into_the_first_ones_units(tmp_path: Path, way: str, to: str) -> None:
    kind = "plain2d"
    models = [copied(kind, seed) for seed in (1, 2, 3)]
    result = merged(folders(tmp_path, kind, *models), way, to=to)
    for name, tensor in models[0].items():
        torch.testing.assert_close(result[name], tensor)


def test_models_of_half_precision_stay_halves(tmp_path: Path) -> None:
    kind = "plain2d"
    models = [{name: tensor.half() for name, tensor in each.items()} for each in (original(kind), copied(kind, 1))]
    for way in WAYS:
        result = merged(folders(tmp_path / way, kind, *models), way)
        assert all(tensor.dtype == torch.float16 for tensor in result.values())
        assert_close(says(kind, result), says(kind, models[0]), 1e-3)


def test_weights_and_what_comes_then(tmp_path: Path) -> None:
    """After the match the models are merged by any method, of permuted models as of those they were."""
    kind = "plain2d"
    plans, spec = plans_of(kind), spec_of(plans_of(kind))
    theta_0 = original(kind)
    other = noisy(theta_0, 0.05, 7)
    base = write(tmp_path / "base", plans, theta_0)
    straight = folders(tmp_path / "straight", kind, noisy(theta_0, 0.05, 8), other)
    twisted = folders(tmp_path / "twisted", kind, noisy(theta_0, 0.05, 8), permuted(other, spec, 3))
    for method, parameters in (("average", {}), ("ties", {"density": 0.4}), ("slerp", {})):
        weights = [0.3, 0.7] if method != "ties" else [1.0, 0.5]
        expected = model_of(straight, Recipe(method, weights, parameters), base).state_dict
        found = model_of(twisted, replace(recipe_of("rebasin", weights, **parameters), method=method), base)
        for name, tensor in expected.items():
            torch.testing.assert_close(found.state_dict[name], tensor, rtol=1e-4, atol=1e-6)
        assert found.provenance["recipe"]["method"] == method


def test_what_is_held_back_is_the_first_models_base(tmp_path: Path) -> None:
    kind = "plain2d"
    models = folders(tmp_path, kind, original(kind), copied(kind, 1, 0.05))
    base = write(tmp_path / "base", plans_of(kind), noisy(original(kind), 0.1, 3))
    recipe = Recipe(align="rebasin", keep_base_for=["encoder.stages.0.*"])
    found = model_of(models, recipe, base).state_dict
    kept = "decoder.encoder.stages.0.0.convs.0.all_modules.0.weight"
    assert torch.equal(found[kept], open_theta_0(base)[kept])
    with pytest.raises(TransplantError, match="after an alignment -keep_base_for and -stage_weights need the base of "
                                              "the first model: give it with -base"):
        model_of(models, recipe)


def test_tasks_keep_their_own_rows_of_the_head(tmp_path: Path) -> None:
    """Bodies that are one but for the order of their units: every structure scores as it does in its own model."""
    kind = "plain2d"
    plans = plans_of(kind)
    second = original(kind) | {name: tensor for name, tensor in tensors_of(
        network_of(plans, TASKS, seed=5), canonical(plans, TASKS)).items() if name in HEADS}
    twisted = permuted(second, spec_of(plans, TASKS), 3)
    models = [write(tmp_path / "a", plans, original(kind)), write(tmp_path / "b", plans, twisted, TASKS)]
    labels = {"background": 0, "one": 1, "two": 2, "three": 3}
    a, b = says(kind, original(kind)), says(kind, second, TASKS)
    expected = torch.stack([torch.zeros_like(a[:, 0]), a[:, 1] - a[:, 0], a[:, 2] - a[:, 0], b[:, 1] - b[:, 0]], 1)
    for way in WAYS:
        model = model_of(models, recipe_of(way))
        assert model.dataset_json["labels"] == labels
        assert_close(says(kind, model.state_dict, labels), expected)


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    kind = "plain2d"
    models = folders(tmp_path, kind, original(kind), original(kind, 1))
    for way in ("rebasin", "mudsc", "mudsc zip"):
        written = []
        for again in ("one", "two"):
            output = merge_folders(models, recipe=recipe_of(way)).save(tmp_path / f"{way}_{again}")
            written.append(content(output))
        assert written[0] == written[1]
        found = json.loads(written[0]["merge.json"])["folds"]["all"]["found"]
        assert set(found) == {"alpha", "similarity", "sweeps"}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folds_are_models_too(tmp_path: Path) -> None:
    """Two folds of one model and one of another, equal copies all: every aligner merges them, a zip equally. With a
    decay, units that are alike would come before the third of three that are the same."""
    kind = "plain2d"
    both = write(tmp_path / "both", plans_of(kind), original(kind))
    write(both, plans_of(kind), copied(kind, 1), fold="1")
    one = write(tmp_path / "one", plans_of(kind), copied(kind, 2))
    for way in WAYS:
        decay = {"decay": 1.0} if "zip" in way else {}
        assert_close(says(kind, merged([both, one], way, **decay)), says(kind, original(kind)))


PRIMUS = """
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerTinyPrimus(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        return Primus(num_input_channels, 24, (8, 8, 8), num_output_channels, 2, 2, configuration_manager.patch_size,
                      init_values=0.1, scale_attn_inner=True)
"""


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Primus comes from its trainer and takes inputs of the patch size only. Of other labels it is refused."""
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "nnUNetTrainerTinyPrimus.py").write_text(PRIMUS)
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path / 'trainers'}{os.pathsep}{os.environ['nnUNet_extTrainer']}")
    from nnunet_transplant.alignment.tracer import derive
    from nnunet_transplant.architecture import build_network, canonical_names, find_trainer
    trainer = find_trainer("nnUNetTrainerTinyPrimus")
    plans = small_plans(3)

    def network(rows: int, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_network(plans, "3d_fullres", {"channel_names": {"0": "MRI"}, "labels": LABELS}, trainer, rows)

    def folder(name: str, state: dict[str, torch.Tensor], labels: dict = LABELS) -> Path:
        model = write_model(tmp_path / name, labels, plans=plans)
        path = model / "fold_0" / "checkpoint_final.pth"
        torch.save(torch.load(path, weights_only=False) | {
            "trainer_name": "nnUNetTrainerTinyPrimus", "network_weights": state}, path)
        return model
    one = network(3, 0)
    names = canonical_names(one)
    state = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in one.state_dict().items()
             if names[name] == name}
    spec = derive(network(3, 0), (1, 1, 16, 16, 16))
    assert any(group.blocks > 1 for group in spec.groups.values())
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))

    def out(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        one.load_state_dict({name: tensors[to] for name, to in names.items()})
        with torch.no_grad():
            return one.eval()(image)
    twisted = permuted(state, spec, 1)
    expected = out(state)
    assert_close(out(twisted), expected)
    models = [folder(name, {alias: tensors[to] for alias, to in names.items()})
              for name, tensors in (("a", state), ("b", twisted))]
    for way in WAYS:
        assert_close(out(merged(models, way)), expected)
    with pytest.raises(TransplantError, match="-fit head needs a network that ends in"):
        model_of(models, replace(recipe_of("rebasin"), volumes=VOLUMES, fit=["head"]))
    other = folder("c", network(2, 1).state_dict(), TASKS)
    with pytest.raises(TransplantError, match="cannot merge; they differ in|depends on the number of classes"):
        merged([models[0], other], "rebasin")


# ---------------------------------------------------------------------------------------------------------------------
# Searching alpha, and polishing

def plain_dice(said: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([2 * ((said == row) & (truth == row)).sum() / ((said == row).sum() + (truth == row).sum())
                          for row in (1, 2)]))


@pytest.mark.parametrize(("way", "search"), [("mudsc", "agreement"), ("mudsc zip", "dice")])
def test_the_search_takes_the_best_alpha(tmp_path: Path, way: str, search: str) -> None:
    kind = "plain3d"
    tensors = [original(kind, seed) for seed in (0, 3)]
    models = folders(tmp_path, kind, *tensors)

    def mean_said(*states: dict[str, torch.Tensor]) -> np.ndarray:
        return sum(logits(plans_of(kind), LABELS, state, patches()) for state in states).argmax(1).numpy()
    truth = label_maps() if search == "dice" else mean_said(*tensors)
    found = model_of(models, recipe_of(way, search_alpha=search))
    searched = found.provenance["found"]["searched"]
    assert list(searched) == ["0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1"]
    best = max(searched, key=searched.get)
    scores, states = {}, {}
    for alpha in {"0", "0.4", "1", best}:
        states[alpha] = merged(models, way, alpha=float(alpha))
        scores[alpha] = plain_dice(mean_said(states[alpha]), truth)
        # the ensemble is kept in half precision: a voxel may fall to the other side
        assert searched[alpha] == pytest.approx(scores[alpha], abs=1e-6 if search == "dice" else 2e-3)
    assert len(set(scores.values())) > 1
    assert float(best) == found.provenance["found"]["alpha"]
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in states[best].items())


def test_a_search_scores_batch_norms_with_their_own_statistics(tmp_path: Path) -> None:
    """What is scored is what is written, and that is the merge by the alpha found."""
    kind = "batch3d"
    models = folders(tmp_path, kind, original(kind), original(kind, 3))
    found = model_of(models, recipe_of("mudsc", search_alpha="dice"))
    searched = found.provenance["found"]["searched"]
    said = logits(plans_of(kind), LABELS, found.state_dict, patches()).argmax(1).numpy()
    chosen = f"{found.provenance['found']['alpha']:g}"
    assert searched[chosen] == pytest.approx(plain_dice(said, label_maps()), abs=1e-6)
    same = merged(models, "mudsc", alpha=found.provenance["found"]["alpha"])
    assert all(torch.equal(found.state_dict[name], tensor) for name, tensor in same.items())


@pytest.fixture
def merge(tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """nnunet_transplant_merge in this process, on one thread: what it says on stderr."""
    monkeypatch.setattr(merging, "torch_device", torch.device)

    def merge(output: str, *arguments: object) -> str:
        status, merge.out, said = run("merge", "-o", tmp_path / output, "-device", "cpu", *arguments)
        assert status in (0, 1)
        return re.sub(r"(\r[^\r\n]*)+\n", "", said)  # without progress bars
    return merge


def test_a_merge_that_searched_and_polished_repeats_byte_for_byte(tmp_path: Path, merge: Callable) -> None:
    kind = "plain3d"
    models = folders(tmp_path, kind, original(kind), original(kind, 3))
    options = ["-d", "501", "-n_cases", "2"]
    for name, more in (("searched", ["-align", "mudsc", "-search_alpha", "agreement", "-to", "mean", *options]),
                       ("zipped", ["-align", "activation", "-units", "zip", "-decay", "0.9", "-budget", "0", "-fit",
                                   "polish", "-steps", "3", *options]),
                       ("polished", ["-align", "rebasin", "-weights", "0.4", "0.6", "-seed", "5", "-fit", "head",
                                     "polish", "-steps", "2", "-lr", "0.0003", *options])):
        assert merge(name, "-m", *models, *more) == ""
        recipe = read_merge(tmp_path / name).recipe
        assert recipe.align == more[1]
        assert recipe.fit == {"searched": [], "zipped": ["polish"], "polished": ["head", "polish"]}[name]
        settings = recipe.settings()
        if name != "searched":
            polish = settings["polish"]
            assert (polish["steps"], polish["lr"]) == {"zipped": (3, 1e-3), "polished": (2, 3e-4)}[name]
        if name == "polished":  # a seed is every step's
            assert settings["rebasin"]["seed"] == settings["head"]["seed"] == settings["polish"]["seed"] == 5
        assert merge(f"{name}_again", "-from", tmp_path / name) == ""
        assert content(tmp_path / f"{name}_again") == content(tmp_path / name)
    record = json.loads((tmp_path / "searched" / "merge.json").read_text())["folds"]["all"]
    assert record["recipe"]["parameters"]["mudsc.search_alpha"] == "agreement"
    assert len(record["found"]["searched"]) == 11
    # without the alignment, with the volumes and the polishing of before
    assert merge("other", "-from", tmp_path / "zipped", "-align", "none") == ""
    other = read_merge(tmp_path / "other").recipe
    assert other.align is None and other.fit == ["polish"] and other.settings()["polish"]["steps"] == 3
    assert other.volumes == read_merge(tmp_path / "zipped").recipe.volumes


def test_polishing_any_merge(tmp_path: Path) -> None:
    kind = "plain2d"
    models = folders(tmp_path, kind, original(kind), noisy(original(kind), 0.05, 1))
    plain = model_of(models, Recipe()).state_dict
    polished = model_of(models, Recipe(volumes=VOLUMES, fit=["polish"], parameters={"steps": 2}))
    recipe = polished.provenance["recipe"]
    assert recipe["parameters"]["polish.steps"] == 2 and recipe["volumes"]["n_cases"] == 2
    assert polished.provenance["volumes"] == {"Dataset501_Boxes": ["case_0", "case_1"]}
    assert 0 < float((polished.state_dict[HEADS[2]] - plain[HEADS[2]]).abs().max()) <= 2.1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Sharing a part

def two_tasks(tmp_path: Path, kind: str) -> tuple[list[Path], list[dict[str, torch.Tensor]]]:
    """Models of two tasks with their own decoders, whose encoders are one but for the order of their units."""
    plans = plans_of(kind)
    own = tensors_of(network_of(plans, TASKS, seed=5), canonical(plans, TASKS))
    own |= {name: tensor for name, tensor in original(kind).items() if name.startswith("decoder.encoder.")}
    states = [original(kind), permuted(own, spec_of(plans, TASKS), 3)]
    return [write(tmp_path / "Dataset901_A" / "m", plans, states[0], axes=(0, 1)),
            write(tmp_path / "Dataset902_B" / "m", plans, states[1], TASKS, axes=(1,))], states


@pytest.mark.parametrize("kind", ["plain2d", "residual3d"])
@pytest.mark.parametrize("way", WAYS)
def test_one_encoder_for_two_tasks(tmp_path: Path, way: str, kind: str) -> None:
    """Where the encoders do the same, each model does what it did."""
    models, states = two_tasks(tmp_path, kind)
    shared = merge_folders(models, recipe=replace(recipe_of(way), share=["encoder.*"]))
    assert shared.side_by_side
    assert list(shared) == ["Dataset901_A_fold_0", "Dataset902_B_fold_0"]
    one, other = shared.values()
    assert one.dataset_json["labels"] == LABELS and other.dataset_json["labels"] == TASKS
    assert one.mirroring_axes == (0, 1) and other.mirroring_axes == (1,)
    assert_close(says(kind, one.state_dict), says(kind, states[0]))
    assert_close(says(kind, other.state_dict, TASKS), says(kind, states[1], TASKS))
    names = canonical(plans_of(kind))
    for name in names:
        if ".encoder." in name or name.startswith("encoder."):
            assert torch.equal(one.state_dict[name], other.state_dict[name])
    for model, state in ((one, states[0]), (other, states[1])):
        for name in set(names.values()):
            # of its own: what reads the encoder has its inputs in another order, the rest is untouched
            if not name.startswith("decoder.encoder."):
                reads = "transpconvs.0.weight" in name or ("stages" in name and "all_modules.0.weight" in name)
                mine, before = model.state_dict[name], state[name]
                assert torch.equal(*(tensor.flatten().sort().values for tensor in (mine, before))) if reads \
                    else torch.equal(mine, before)


def test_what_models_keep_reads_the_units_as_they_are_merged(tmp_path: Path) -> None:
    """ZipIt!'s partial zip, of encoders that differ: shared tensors are the paper's merged ones, the models' own have
    the inputs of joined units added up."""
    kind = "plain2d"
    plans = plans_of(kind)
    networks = [original(kind), original(kind, 1)]
    models = folders(tmp_path, kind, *networks)
    recipe = replace(recipe_of("activation zip", budget=1.0), share=["encoder.*"])
    shared = list(Merger([open_models(model) for model in models], recipe).merge_shared().values())
    whole = spec_of(plans)
    encoder = {name: group for name, group in whole.groups.items() if "encoder" in name}
    # the assignments, found out again from what each model's decoder reads
    last = "decoder.transpconvs.0.weight"
    group, = (group for name, group in encoder.items() if any(s.tensor == last for s in group.segments))
    for n, model in enumerate(shared):
        before, after = networks[n][last].flatten(1), model.state_dict[last].flatten(1)
        solved = torch.linalg.lstsq(before.T, after.T).solution.T  # after = U^T before
        assignment = solved.T.round()
        torch.testing.assert_close(solved.T, assignment, rtol=0, atol=1e-3)
        assert bool((assignment.sum(1) == 1).all()) and set(assignment.unique().tolist()) <= {0.0, 1.0}
        if n == 0:
            counts = assignment.sum(0)
        else:
            counts += assignment.sum(0)
    assert float(counts.sum()) == 2 * group.size and bool((counts >= 1).all())
    assert float(counts.max()) > 2 or float(counts.min()) < 2  # some units were joined with units of their own model
    for name in shared[0].state_dict:
        if "encoder." in name:
            assert torch.equal(shared[0].state_dict[name], shared[1].state_dict[name])


def test_shared_models_are_ordinary_model_folders(tmp_path: Path, merge: Callable) -> None:
    kind = "plain2d"
    models, _ = two_tasks(tmp_path, kind)
    assert merge("out", "-m", *models, "-align", "rebasin", "-share", "encoder.*", "*transpconvs.0*") == ""
    output = tmp_path / "out"
    names = ["Dataset901_A_fold_0", "Dataset902_B_fold_0"]
    assert sorted(path.name for path in output.iterdir()) == [*names, "merge.json"]
    assert all(str(output / name) in merge.out for name in names)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    for name, model in zip(names, models, strict=True):
        predicted = []
        for folder, fold in ((output / name, "all"), (model, "0")):
            predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, use_mirroring=False)
            predictor.initialize_from_trained_model_folder(str(folder), (fold,))
            predicted.append(predictor.predict_logits_from_preprocessed_data(image).float())
        if model is models[0]:  # B's transposed convolution is merged with A's, which is another one
            assert predicted[0].shape == predicted[1].shape
        assert predicted[0].shape[0] == len((LABELS, TASKS)[models.index(model)])
    # each repeats the whole of it
    assert merge("again", "-from", output / names[1]) == ""
    assert content(tmp_path / "again") == content(output)
    assert "exists already" in merge("out", "-m", *models, "-align", "rebasin", "-share", "encoder.*")
    assert merge("out", "-m", *models, "-align", "rebasin", "-share", "encoder.*", "--overwrite") == ""
    assert sorted(path.name for path in output.iterdir()) == [*names, "merge.json"]


def test_two_models_of_one_name_are_written_both(tmp_path: Path) -> None:
    kind = "plain2d"
    models = [write(tmp_path / part / "Dataset901_A" / "m", plans_of(kind), original(kind)) for part in "ab"]
    shared = merge_folders(models, recipe=Recipe(align="rebasin", share=["encoder.*"]))
    shared.save(tmp_path / "out")
    assert len(shared) == 2 and all((tmp_path / "out" / name / "plans.json").is_file() for name in shared)


# ---------------------------------------------------------------------------------------------------------------------
# The commands

def test_the_spec_lists_every_group(tmp_path: Path, run: Callable) -> None:
    kind = "residual3d"
    model, = folders(tmp_path, kind, original(kind))
    status, said, error = run("spec", "-m", model)
    assert status == 0 and error == ""
    *lines, hint = said.splitlines()
    assert "-align" in hint and lines == aligners.spec(model).text().splitlines()
    spec = spec_of(plans_of(kind))
    for name, group in spec.groups.items():
        at = lines.index(f"{name}: {group.size} units")
        below = lines[at + 1:at + 1 + len(group.segments)]
        for segment in group.segments:
            place = f"{segment.tensor} axis {segment.axis}, {segment.start} to {segment.start + group.size - 1}"
            assert any(line.endswith(place) for line in below)
    assert len(lines) == len(spec.groups) + sum(len(group.segments) for group in spec.groups.values())
    status, _, error = run("spec")
    assert status == 2 and "-m" in error and error.count("\n") == 1


def test_what_cannot_be_aligned_is_refused_in_one_line(tmp_path: Path, merge: Callable, raw: Path) -> None:
    kind = "plain2d"
    a, b = folders(tmp_path, kind, original(kind), copied(kind, 1))
    wide = plans_of(kind)
    wide["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 12]
    other = write_model(tmp_path / "wide", LABELS, plans=wide)
    volumes = ["-d", "501"]
    zipping = ["-align", "rebasin", "-units", "zip"]
    sharing = ["-align", "rebasin", "-share", "encoder.*"]
    for arguments, message in (
            (["-m", a, "-f", "0", "-align", "rebasin"], "needs at least two"),
            (["-m", a, b, "-align", "mudsc"], "needs volumes to look at: give -d"),
            (["-m", a, b, "-align", "activation", "-units", "zip"], "needs volumes to look at: give -d"),
            (["-m", a, b, "-align", "mudsc", "-units", "zip", "-search_alpha", "dice"],
             "needs volumes to look at: give -d"),
            (["-m", a, b, "-align", "mudsc", *volumes, "-alpha", "1.5"], "-alpha must lie between 0 and 1"),
            (["-m", a, b, "-align", "mudsc", *volumes, "-alpha", "nan"], "-alpha must lie between 0 and 1"),
            (["-m", a, b, *zipping, "-budget", "-1"], "-budget must lie between 0 and 1"),
            (["-m", a, b, "-align", "rebasin", "-method", "ties"],
             "after an alignment method ties needs the base of the first model: give it with -base"),
            (["-m", a, b, "-align", "rebasin", "-method", "regmean"], "regmean needs volumes"),
            (["-m", a, b, "-align", "rebasin", "-alpha", "0.5"], "have no -alpha"),
            (["-m", a, b, *zipping, "-weights", "0.3", "0.7"], "leave out -weights"),
            (["-m", a, b, *zipping, "-method", "ties"], "after a zip only the plain mean is a network"),
            (["-m", a, b, "-method", "average", *volumes], "looks at no volumes"),
            (["-m", a, b, "-align", "rebasin", "-share", "nowhere.*"], "-share nowhere.* matches no tensor"),
            (["-m", a, b, "-share", "encoder.*"], "-share needs -align"),
            (["-m", a, b, *sharing, "-fit", "polish", *volumes], "-share needs -align, and no -fit"),
            (["-m", a, b, *sharing, "-fit", "head", *volumes], "-share needs -align, and no -fit"),
            (["-m", a, b, "-align", "mudsc", "-search_alpha", "agreement", "-share", "encoder.*", *volumes],
             "-share makes several models"),
            (["-m", a, b, "-fit", "polish"], "polish needs volumes"),
            (["-m", a, b, "-fit", "head"], "head needs volumes"),
            (["-m", a, b, *volumes, "-fit", "polish", "-steps", "-3"], "-steps must lie between 1 and"),
            (["-m", a, b, *volumes, "-fit", "polish", "-lr", "-1"], "-lr must lie between"),
            (["-m", a, b, *volumes, "-fit", "polish", "-lr", "nan"], "-lr must lie between"),
            (["-m", a, b, *volumes, "-fit", "polish", "-lr", "1e39"], "-lr must lie between"),
            (["-m", a, b, "-align", "mudsc", "-d", "502"], "502")):
        error = merge("out", *arguments)
        assert message in error and error.count("\n") == 1, (arguments, error)
        assert not (tmp_path / "out").exists()
    error = merge("out", "-m", a, other, "-align", "rebasin")  # a table of what differs
    assert "cannot merge; they differ in" in error and "16" in error and "12" in error and "Traceback" not in error
    for method in ("rebasin", "magic"):
        with pytest.raises(TransplantError, match=f"there is no merging method '{method}'"):
            model_of([a, b], Recipe(method, align="rebasin"))
    with pytest.raises(TransplantError, match="not one of all"):
        Merger([open_models(model) for model in (a, b)], Recipe(align="rebasin", share=["encoder.*"])).merge()
    with pytest.raises(TransplantError, match="search_alpha"):
        model_of([a, b], recipe_of("rebasin", search_alpha="dice"))


def test_labels_are_needed_for_dice_only(tmp_path: Path, raw: Path) -> None:
    kind = "plain2d"
    models = folders(tmp_path, kind, original(kind), original(kind, 1))
    write_volumes(raw.parent, "Dataset503_Unlabelled", LABELS, cases=1, shape=(8, 16, 16))
    next((raw.parent / "Dataset503_Unlabelled" / "labelsTr").iterdir()).unlink()
    recipe = {search: replace(recipe_of("mudsc", search_alpha=search), volumes=Volumes([503]))
              for search in ("dice", "agreement")}
    with pytest.raises(TransplantError, match="without labels"):
        model_of(models, recipe["dice"])
    assert model_of(models, recipe["agreement"]).provenance["found"]["searched"]


def test_nan_is_named(tmp_path: Path) -> None:
    kind = "plain2d"
    broken = copied(kind, 1)
    name = "decoder.stages.0.convs.0.all_modules.0.weight"
    broken[name][0, 0, 0, 0] = float("nan")
    models = folders(tmp_path, kind, original(kind), broken)
    for way in WAYS:
        with pytest.raises(TransplantError, match=f"NaN or Inf in {name}"):
            merged(models, way)
