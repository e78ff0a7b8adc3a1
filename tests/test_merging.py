"""`merge` as a user calls it: what it starts from, what is other, and what is refused."""
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factory import base_network, write_model, write_volumes

import nnunet_transplant as nt
from nnunet_transplant import merging
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extraction import extract
from nnunet_transplant.merged_model import Merged
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.merging import merge
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import read_merge
from nnunet_transplant.volumes import N_CASES, Volumes

LABELS = {"background": 0, "one": 1, "two": 2}


@pytest.fixture(scope="module", autouse=True)
def raw(nnunet: Path) -> Path:
    return write_volumes(nnunet / "raw", "Dataset501_Boxes", LABELS, cases=3, shape=(16, 16, 16))


@pytest.fixture(autouse=True)
def one_thread_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "torch_device", torch.device)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one base and one task, in nnU-Net's layout; A has two folds."""
    root, base = tmp_path_factory.mktemp("models"), base_network()
    folders = {name: root / f"Dataset90{i}_{name}" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
               for i, name in enumerate("ABC")}
    for i, (name, folder) in enumerate(folders.items()):
        for fold in ("0", "1") if name == "A" else ("0",):
            write_model(folder, LABELS, base=base, seed=10 * i + int(fold), fold=fold)
    return folders


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def recipe_of(merged: Merged) -> dict[str, Any]:
    return merged.provenance["recipe"]


def paths_of(merged: Merged) -> list[Path]:
    return [Path(row["path"]) for row in merged.provenance["inputs"]]


def assert_same(one: Merged, other: Merged) -> None:
    assert list(one) == list(other)
    for fold in one:
        assert one[fold].provenance == other[fold].provenance
        for name, tensor in other[fold].state_dict.items():
            assert torch.equal(one[fold].state_dict[name], tensor)


def on_cpu(*models: Any, **options: Any) -> Merged:
    return merge(*models, device="cpu", **options)


# ---------------------------------------------------------------------------------------------------------------------
# What is merged, and how

def test_one_thing_is_a_list_of_one(tmp_path: Path, models: dict[str, Path]) -> None:
    two = [models["A"], models["B"]]
    lists = on_cpu(two, keep_base_for=["*norm*"], folds=["0"], fit=["head"], images=[501], n_cases=1)
    single = on_cpu(two, keep_base_for="*norm*", folds="0", fit="head", images=501, n_cases=1)
    assert_same(single, lists)
    assert_same(on_cpu(two, keep_base_for="*norm*", folds=0, fit="head", images=501, n_cases=1), lists)
    lists.save(tmp_path / "merged")
    dropped = [on_cpu(earlier=tmp_path / "merged", drop=drop) for drop in ("Dataset900_A", ["Dataset900_A"])]
    assert_same(*dropped)
    shared = [on_cpu(two, folds="0", align="rebasin", share=share) for share in ("encoder.*", ["encoder.*"])]
    assert_same(*shared)


def test_what_is_said_is_the_recipe(models: dict[str, Path]) -> None:
    two = [models["B"], models["C"]]
    recipe = Recipe("ties", [1, 2], {"density": 0.4, "ties.trim": "tensor"}, keep_base_for=["*norm*"],
                    stage_weights=[1, 1, 1, 0.5, 1], same_channels=True)
    assert_same(merge(two, method="ties", weights=[1, 2], density=0.4, **{"ties.trim": "tensor"},
                      keep_base_for=["*norm*"], stage_weights=[1, 1, 1, 0.5, 1], same_channels=True),
                merge_folders(two, recipe=recipe))
    assert_same(merge(two, method="average"), merge_folders(two))
    assert recipe_of(merge(two, method="ties", lambda_=0.5))["parameters"]["ties.lambda"] == 0.5
    assert nt.merge is merge


def test_models_may_be_one_and_paths_may_be_text(tmp_path: Path, models: dict[str, Path]) -> None:
    both_folds = merge(models["A"])
    assert [path.parent.name for path in paths_of(both_folds)] == ["fold_0", "fold_1"]
    assert_same(merge(str(models["A"])), both_folds)
    assert_same(merge([str(models["B"]), models["C"] / "fold_0" / "checkpoint_final.pth"]),
                merge([models["B"], models["C"]]))
    assert [path.parent.name for path in paths_of(merge(models["A"], folds=[1]))] == ["fold_1"]
    assert_same(merge([models["A"]], folds=["0", "1"], per_fold=True), Merged({
        fold: merge(models["A"], folds=[fold])["all"] for fold in ("0", "1")}))
    saved = merge(models["A"]).save(tmp_path / "out")
    assert saved == tmp_path / "out" and paths_of(merge(saved))[0].parent.name == "fold_all"


def test_a_task_vector_file_needs_the_base(tmp_path: Path, models: dict[str, Path]) -> None:
    base = write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base_network().state_dict())
    extract(models["B"], tmp_path / "b.safetensors")
    found = merge([tmp_path / "b.safetensors", models["C"]], base=str(base))
    assert found.provenance["base"] == str(base)
    tensor = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(found["all"].state_dict[tensor],
                               merge([models["B"], models["C"]])["all"].state_dict[tensor])
    with pytest.raises(TransplantError, match="base"):
        merge([tmp_path / "b.safetensors", models["C"]])


def test_only_a_part_is_shared(models: dict[str, Path]) -> None:
    shared = merge([models["B"], models["C"]], align="rebasin", share=["encoder.*"])
    assert shared.side_by_side and list(shared) == ["Dataset901_B_fold_0", "Dataset902_C_fold_0"]
    with pytest.raises(TransplantError, match="save them, and predict with each"):
        nt.predict(shared, "images", "out", device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Images

def test_images(tmp_path: Path, models: dict[str, Path]) -> None:
    two = [models["B"], models["C"]]
    for images in (501, "501", "Dataset501_Boxes", [501], ("Dataset501_Boxes",)):
        found = on_cpu(two, fit="head", images=images)
        assert found.provenance["volumes"] == {"Dataset501_Boxes": ["case_0", "case_1", "case_2"]}
        assert recipe_of(found)["volumes"]["n_cases"] == N_CASES and found.provenance["device"] == "cpu"
        assert_same(found, merge_folders(two, recipe=Recipe(
            fit=["head"], volumes=Volumes([images] if isinstance(images, (int, str)) else images))))
    chosen = tmp_path / "cases.txt"
    chosen.write_text("case_2\ncase_1\n")
    found = on_cpu(two, fit=["head"], images=501, cases=str(chosen))
    assert set(found.provenance["volumes"]["Dataset501_Boxes"]) == {"case_1", "case_2"}
    found = on_cpu(two, fit=["head", "polish"], steps=1, images=501, n_cases=1)
    assert found.provenance["volumes"] == {"Dataset501_Boxes": ["case_0"]} and recipe_of(found)["fit"] == [
        "head", "polish"]


def test_a_device_is_asked_for_only_where_images_are_looked_at(models: dict[str, Path],
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert merge([models["B"], models["C"]], method="ties").provenance["device"] is None
    with pytest.raises(TransplantError, match="this machine has no cuda device: leave out -device"):
        merge([models["B"], models["C"]], fit="head", images=501, device="cuda")
    with pytest.raises(TransplantError, match="-device must be auto, cuda, mps, cpu, not tpu"):
        merge([models["B"], models["C"]], fit="head", images=501, device="tpu")


# ---------------------------------------------------------------------------------------------------------------------
# Something to start from

@pytest.fixture
def earlier(tmp_path: Path, models: dict[str, Path]) -> Path:
    """By ties, with weights."""
    return merge([models["B"], models["C"]], method="ties", weights=[1, 2], density=0.4).save(tmp_path / "earlier")


@pytest.fixture
def fitted(tmp_path: Path, models: dict[str, Path]) -> Path:
    """Aligned, and with a head fitted."""
    return on_cpu([models["B"], models["C"]], align="rebasin", fit="head", images=501, n_cases=1, positions=50,
                  seed=3).save(tmp_path / "fitted")


def test_an_earlier_merge_repeats(tmp_path: Path, earlier: Path, fitted: Path) -> None:
    assert content(merge(earlier=earlier).save(tmp_path / "again")) == content(earlier)
    assert content(on_cpu(earlier=str(fitted)).save(tmp_path / "fitted_again")) == content(fitted)


def test_models_are_added_and_dropped(tmp_path: Path, models: dict[str, Path]) -> None:
    ab = merge([models["A"], models["B"]], method="ties", density=0.4).save(tmp_path / "ab")
    bc = merge([models["B"], models["C"]], method="ties", density=0.4)
    for name in ("Dataset900_A", str(models["A"])):
        assert_same(merge(models["C"], earlier=ab, drop=[name]), bc)
    assert_same(merge([models["C"]], earlier=ab),
                merge([models["A"], models["B"], models["C"]], method="ties", density=0.4))
    folds = merge(models["A"], per_fold=True).save(tmp_path / "folds")
    assert list(merge(earlier=folds)) == ["0", "1"]


def test_what_is_given_goes_before_what_it_starts_from(models: dict[str, Path], earlier: Path) -> None:
    found = recipe_of(merge(earlier=earlier, density=0.7, weights=[3, 1], keep_base_for=["*norm*"]))
    assert found["parameters"]["ties.density"] == 0.7 and found["weights"] == [3, 1]
    assert found["keep_base_for"] == ["*norm*"] and found["method"] == "ties"
    two = [models["B"], models["C"]]
    recipe = Recipe("ties", [1, 2], {"density": 0.4, "ties.lambda": 0.5}, keep_base_for=["*norm*"])
    assert recipe_of(merge(two, recipe=recipe)) == recipe.in_full().to_json()
    found = recipe_of(merge(two, recipe=recipe, lambda_=0.25, weights=[1, 1], keep_base_for=[]))
    assert found["parameters"] == {"ties.density": 0.4, "ties.lambda": 0.25, "ties.trim": "vector"}
    assert found["weights"] == [1, 1] and found["keep_base_for"] == []
    assert recipe.parameters == {"density": 0.4, "ties.lambda": 0.5}


def test_a_recipe_may_be_a_file(tmp_path: Path, models: dict[str, Path], earlier: Path) -> None:
    expected = read_merge(earlier).recipe.to_json()
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"method": "ties", "parameters": {"density": 0.4}, "weights": [1.0, 2.0],
                                "models": [str(models["B"]), str(models["C"])]}))
    for recipe in (path, str(path)):
        found = merge(recipe=recipe)
        assert recipe_of(found) == expected and paths_of(found) == paths_of(merge([models["B"], models["C"]]))
    found = merge([models["C"], models["A"]], recipe=path, weights=[1, 2])
    assert paths_of(found) == paths_of(merge([models["C"], models["A"]])) and recipe_of(found) == expected
    found = merge([models["C"], models["A"]], recipe=earlier / "merge.json")
    assert paths_of(found) == paths_of(merge([models["C"], models["A"]])) and recipe_of(found) == expected


@pytest.mark.parametrize("flat", [True, False])
def test_another_method_drops_the_options_and_the_weights_of_the_old_one(models: dict[str, Path], flat: bool) -> None:
    two = [models["B"], models["C"]]
    recipe = Recipe("ties", [1, 2], {"density": 0.4, "trim": "tensor"})
    recipe = recipe if flat else recipe.in_full()
    for method in ("average", "dare", "slerp"):
        found = recipe_of(merge(two, recipe=recipe, method=method))
        assert found["weights"] is None
        defaults = Recipe(method).in_full().to_json()
        if flat and method == "dare":  # `density` is an option of whichever step has one
            defaults["parameters"]["dare.density"] = 0.4
        assert found == defaults
    same = recipe_of(merge(two, recipe=recipe, method="ties"))
    assert same["weights"] == [1, 2] and same == recipe.in_full().to_json()
    found = recipe_of(merge(two, recipe=recipe, method="dare", density=0.6, weights=[1, 0.5]))
    assert found["weights"] == [1, 0.5] and found["parameters"]["dare.density"] == 0.6
    with pytest.raises(TransplantError, match="average has no -density"):  # given anew
        merge(two, recipe=recipe, method="average", density=0.4)


def test_none_takes_the_fit_away_and_the_volumes_with_it(tmp_path: Path, models: dict[str, Path]) -> None:
    two = [models["B"], models["C"]]
    fitted = on_cpu(two, fit=["head", "polish"], steps=1, images=501, n_cases=1).save(tmp_path / "fitted")
    for none in ("none", ["none"], []):
        found = merge(earlier=fitted, fit=none)
        assert recipe_of(found)["fit"] == [] and recipe_of(found)["volumes"] is None
        assert_same(found, merge(two, method="average"))
    head = on_cpu(earlier=fitted, fit="head")  # one of both, and what it looks at
    assert_same(head, on_cpu(two, fit="head", images=501, n_cases=1))
    fisher = on_cpu(two, method="fisher", fit="head", images=501, n_cases=1).save(tmp_path / "fisher")
    assert_same(on_cpu(earlier=fisher, fit="none"), on_cpu(two, method="fisher", images=501, n_cases=1))
    assert_same(merge(earlier=fisher, fit="none", method="average"), merge(two, method="average"))


def test_other_cases_of_the_volumes_it_starts_from(tmp_path: Path, models: dict[str, Path], fitted: Path) -> None:
    assert read_merge(fitted).recipe.volumes == Volumes([501], 1, n_patches=32)
    found = on_cpu(earlier=fitted, n_cases=2)
    assert recipe_of(found)["volumes"] == {"datasets": [501], "cases": None, "n_cases": 2, "n_patches": 32}
    assert len(found.provenance["volumes"]["Dataset501_Boxes"]) == 2
    chosen = tmp_path / "cases.txt"
    chosen.write_text("case_2\n")
    assert on_cpu(earlier=fitted, cases=str(chosen)).provenance["volumes"] == {"Dataset501_Boxes": ["case_2"]}
    recipe = Recipe(fit=["head"], volumes=Volumes([501], 1))
    assert_same(on_cpu([models["B"], models["C"]], recipe=recipe, n_cases=3),
                on_cpu([models["B"], models["C"]], fit="head", images=501, n_cases=3))
    assert recipe.volumes == Volumes([501], 1)


def test_none_takes_the_alignment_away(models: dict[str, Path], fitted: Path) -> None:
    two = [models["B"], models["C"]]
    found = on_cpu(earlier=fitted, align="none")
    assert_same(found, on_cpu(two, fit="head", images=501, n_cases=1, positions=50, seed=3))
    assert recipe_of(merge(earlier=fitted, align="none", fit="none")) == Recipe().in_full().to_json()
    # what is aligned may have running statistics of its own of the volumes: they stay
    assert recipe_of(on_cpu(earlier=fitted, fit="none"))["volumes"] is not None
    # a flat option is of the steps that stay
    recipe = Recipe(align="rebasin", fit=["head"], volumes=Volumes([501], 1), parameters={"seed": 3, "to": "mean"})
    assert recipe_of(on_cpu(two, recipe=recipe, align="none"))["parameters"] == {"head.positions": 4096, "head.seed": 3}


MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "no models to merge: give them with -m, or an earlier merge with -from"),
    "two starts": ({"recipe": Recipe(), "earlier": "EARLIER"}, "give either -from or -recipe"),
    "drop without an earlier merge": ({"models": "TWO", "drop": ["B"]}, "-drop leaves out models of an earlier merge"),
    "drop beside a recipe": ({"models": "TWO", "recipe": Recipe(), "drop": ["B"]}, "-drop leaves out models of an"),
    "drop of a stranger": ({"earlier": "EARLIER", "drop": ["Liver"], "weights": [1]},
                           "-drop Liver: the merge has no such model"),
    "all dropped": ({"earlier": "EARLIER", "drop": ["Dataset901_B", "Dataset902_C"], "weights": []},
                    "-drop left no models to merge"),
    "old weights, one dropped": ({"earlier": "EARLIER", "drop": ["Dataset901_B"]},
                                 "the earlier merge had -weights of its own: give new ones for the models of this one, "
                                 "1 kept and 0 new"),
    "old weights, one added": ({"models": "TWO", "earlier": "EARLIER"}, "2 kept and 2 new"),
    "no such recipe": ({"models": "TWO", "recipe": "nowhere.json"}, "there is no file nowhere.json"),
    "no such merge": ({"earlier": "nowhere"}, "nowhere is no merged model: it has no merge.json"),
    "no such model": ({"models": "nowhere"}, "there is no model folder"),
    "no such fold": ({"models": "TWO", "folds": [7]}, "has no fold_7"),
    "no such method": ({"models": "TWO", "method": "tise"},
                       "there is no merging method 'tise' (did you mean ties?)"),
    "no such aligner": ({"models": "TWO", "align": "rebasn"}, "there is no aligner 'rebasn' (did you mean rebasin?)"),
    "no such fit": ({"models": "TWO", "fit": "heat"}, "there is no fit 'heat' (did you mean head?)"),
    "no such option": ({"models": "TWO", "method": "ties", "densty": 1}, "ties has no -densty (did you mean density?)"),
    "twice the same": ({"models": "TWO", "fit": ["head", "head"]}, "each step comes once"),
    "out of range": ({"models": "TWO", "method": "ties", "density": 2}, "-density must lie between 0 and 1, not 2"),
    "too few weights": ({"models": "TWO", "weights": [1]}, "-weights has 1 numbers for 2 models"),
    "no images": ({"models": "TWO", "fit": "head"}, "head needs volumes to look at"),
    "images for nobody": ({"models": "TWO", "method": "ties", "images": 501}, "ties looks at no volumes"),
    "no such images": ({"models": "TWO", "fit": "head", "images": 777}, "777"),
    "no case": ({"models": "TWO", "fit": "head", "images": 501, "n_cases": 0}, "-n_cases must be at least 1, not 0"),
    "cases of nothing": ({"models": "TWO", "n_cases": 2}, "-n_cases is about the volumes of a dataset: give it with"),
    "patches of nothing": ({"models": "TWO", "n_patches": 2}, "-n_patches is about the volumes of a dataset"),
    "no patch": ({"models": "TWO", "fit": "head", "images": 501, "n_patches": 0}, "-n_patches must be at least 1"),
    "cases of nothing any more": ({"earlier": "EARLIER", "cases": "val:0"}, "give it with -d"),
    "shares of each fold": ({"models": "TWO", "align": "rebasin", "share": ["encoder.*"], "per_fold": True},
                            "-share writes a model for each input"),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_a_user_can_mend_is_said(models: dict[str, Path], earlier: Path, name: str,
                                      monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    stands_for = {"TWO": [models["B"], models["C"]], "EARLIER": earlier}
    options, message = MESSAGES[name]
    given = {key: stands_for.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(TransplantError) as error:
        on_cpu(**given)
    assert message in str(error.value)


def test_nothing_is_read_before_the_recipe_is_right(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("volumes were read")
    monkeypatch.setattr("nnunet_transplant.merger.open_patches", never)
    for options in ({"positions": -1}, {"weights": [1]}, {"alpha": 0.5}, {"keep_base_for": ["nowhere"]}):
        with pytest.raises(TransplantError):
            on_cpu([models["B"], models["C"]], fit="head", images=501, **options)


def test_progress_is_said_only_where_it_is_asked_for(models: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    on_cpu([models["B"], models["C"]], fit="head", images=501, n_cases=1)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
