"""What is done where no step is named: by what the models are, and whether there are images."""
from pathlib import Path
from typing import Any

import pytest
from factory import base_network, small_plans, write_model, write_volumes

from nnunet_transplant.cli.merge import main
from nnunet_transplant.defaults import choose
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging import merge
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Volumes

A, B = ({"background": 0, name: 1} for name in "AB")
IMAGES = Volumes(["501"], n_cases=1, n_patches=2)
FITTED = ["head", "entries"]


@pytest.fixture(scope="module")
def boxes(nnunet: Path) -> None:
    write_volumes(nnunet / "raw", "Dataset501_Boxes", {"background": 0, "one": 1}, cases=1, shape=(16, 16, 16))


def models_of(folder: Path, *labels: dict[str, int], **options: Any) -> list[TrainedModel]:
    return [open_models(write_model(folder / str(i), each, seed=i, **options))[0] for i, each in enumerate(labels)]


def steps(recipe: Recipe) -> tuple[str | None, str, list[str]]:
    return recipe.align, recipe.method, list(recipe.fit)


@pytest.mark.parametrize(("images", "expected"), [(IMAGES, (None, "average", FITTED)), (None, (None, "iso_c", []))])
def test_tasks_of_one_base(tmp_path: Path, images: Volumes | None, expected: Any) -> None:
    choice = choose(models_of(tmp_path, A, B, base=base_network()), Recipe(volumes=images))
    assert steps(choice.recipe) == expected
    assert choice.why == f"tasks and one base {'with' if images else 'without'} images"
    assert bool(choice.advice) is (images is None)


@pytest.mark.parametrize(("images", "expected"), [(IMAGES, (None, "average", FITTED)), (None, (None, "average", []))])
def test_folds_of_one_base(tmp_path: Path, images: Volumes | None, expected: Any) -> None:
    choice = choose(models_of(tmp_path, A, A, base=base_network()), Recipe(volumes=images))
    assert steps(choice.recipe) == expected and choice.why.startswith("models of the same structures and one base")


@pytest.mark.parametrize(("labels", "images", "expected"), [
    ((A, B), IMAGES, ("mudsc", "average", FITTED)), ((A, A), IMAGES, (None, "best", FITTED)),
    ((A, B), None, ("rebasin", "average", [])), ((A, A), None, ("rebasin", "average", []))])
def test_models_without_a_common_base(tmp_path: Path, images: Volumes | None, expected: Any, labels: Any) -> None:
    """Are zipped; with images one of several folds learns from all."""
    choice = choose(models_of(tmp_path, *labels), Recipe(volumes=images))
    assert steps(choice.recipe) == expected
    aligner = choice.recipe.align
    assert aligner is None or choice.recipe.settings()[aligner]["units"] == "zip"
    assert choice.why.split(" without a common base")[0] in ("tasks", "models of the same structures")


def test_two_recorded_bases_are_two(tmp_path: Path) -> None:
    one, other = base_network(), base_network()
    next(other.parameters()).data.add_(1e-3)
    models = [*models_of(tmp_path / "one", A, base=one), *models_of(tmp_path / "other", B, base=other)]
    assert choose(models, Recipe()).recipe.align == "rebasin"


def test_a_base_that_nobody_records(tmp_path: Path) -> None:
    """Is seen in the weights; without theta_0 tasks can only be averaged."""
    models = models_of(tmp_path, A, B, base=base_network(), record_base=False)
    assert steps(choose(models, Recipe()).recipe) == (None, "average", [])
    assert steps(choose(models, Recipe(), base=True).recipe) == (None, "iso_c", [])


def test_the_base_itself_may_be_one_of_the_models(tmp_path: Path) -> None:
    base = base_network()
    model, = models_of(tmp_path, B, base=base)
    write_model(tmp_path / "base", A, change={name: base.state_dict()[name] for name in model.layout.body})
    models = [*open_models(tmp_path / "base"), model]
    assert steps(choose(models, Recipe()).recipe) == (None, "iso_c", [])
    merge([model.folder, tmp_path / "base"])


def test_a_model_alone_stays_as_it_is(tmp_path: Path) -> None:
    models = models_of(tmp_path, A)
    choice = choose(models, Recipe())
    assert choice.recipe == Recipe() and not choice.advice
    with pytest.raises(TransplantError, match="looks at no volumes"):
        merge(models[0].folder, images="501")


def test_networks_of_two_kinds_are_refused_in_words(tmp_path: Path) -> None:
    wide = small_plans()
    kwargs = wide["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [2 * features for features in kwargs["features_per_stage"]]
    models = [write_model(tmp_path / "small", A), write_model(tmp_path / "wide", B, plans=wide)]
    with pytest.raises(TransplantError, match="cannot merge; they differ in"):
        merge(models)


def test_unrelated_models_merge_by_default(tmp_path: Path, boxes: None) -> None:
    folders = [model.folder for model in models_of(tmp_path, A, B)]
    merged = merge(folders, images="501", n_patches=2, steps=2, device="cpu")
    assert [step["name"] for step in merged.provenance["steps"]] == ["mudsc", "average", *FITTED]
    assert merged.provenance["default"] == "tasks without a common base with images"
    assert set(merged.provenance["check"]["agreement"]["merged"]) == {"A", "B"}


def test_unrelated_folds_are_checked_beside_the_best_of_them(tmp_path: Path, boxes: None) -> None:
    folders = [model.folder for model in models_of(tmp_path, A, A)]
    merged = merge(folders, images="501", n_patches=2, steps=2, device="cpu")
    assert [step["name"] for step in merged.provenance["steps"]] == ["best", *FITTED]
    assert set(merged.provenance["check"]["agreement"]) == {"merged", "best, head fitted"}


def test_what_is_named_is_all_that_is_done(tmp_path: Path) -> None:
    folders = [model.folder for model in models_of(tmp_path, A, B, base=base_network())]
    assert "default" in merge(folders).provenance
    for named in ({"method": "average"}, {"fit": []}, {"weights": [0.5, 0.5]}, {"recipe": Recipe()}):
        found = merge(folders, **named)
        assert found.provenance["recipe"]["method"] == "average" and "default" not in found.provenance


def test_a_user_sees_what_was_chosen(tmp_path: Path, boxes: None, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(model.folder) for model in models_of(tmp_path, A, B, base=base_network())]

    def run(*options: str) -> str:
        monkeypatch.setattr("sys.argv", ["merge", "-m", *folders, "-o", str(tmp_path / "merged"), *options])
        main()
        return capsys.readouterr().out
    out = run()
    assert "merged 2 models by iso_c (the default for tasks and one base without images); structures: A, B" in out
    assert "note: without images a merge is a guess" in out
    out = run("-d", "501", "-n_patches", "2", "-steps", "3", "-device", "cpu", "--overwrite")
    assert "merged 2 models by average + head + entries (the default for tasks and one base with images)" in out
