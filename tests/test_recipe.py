"""Recipes as data: written and read, refused where they are none, and which option goes to which step."""
import json
from dataclasses import replace
from typing import Any

import pytest

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.methods import METHODS
from nnunet_transplant.recipe import FORMAT, Recipe
from nnunet_transplant.steps import MANY_PATCHES, N_PATCHES
from nnunet_transplant.volumes import N_CASES, Volumes

SOURCE = "some/recipe.json"
FULL = Recipe(
    "ties", [1.0, 2.5], {"density": 0.3, "ties.trim": "tensor", "polish.lr": "1e-4", "seed": 7}, align="mudsc",
    fit=["head", "polish"], volumes=Volumes(["Dataset501_Boxes", 7], 3, "val:0"), keep_base_for=["*norm*"],
    stage_weights=[1.0, 0, 0.5], share=["encoder.*"], same_channels=True)


# ---------------------------------------------------------------------------------------------------------------------
# JSON

def test_what_is_written_is_read_again() -> None:
    read = Recipe.from_json(json.loads(json.dumps(FULL.to_json())), SOURCE)
    assert read == FULL
    whole = FULL.in_full()
    assert Recipe.from_json(json.loads(json.dumps(whole.to_json())), SOURCE) == whole
    for name in METHODS:
        recipe = Recipe(name, fit=[], keep_base_for=[], share=[]).in_full()
        assert Recipe.from_json(json.loads(json.dumps(recipe.to_json())), SOURCE) == recipe


def test_what_is_not_said_is_as_by_default() -> None:
    assert Recipe.from_json({}, SOURCE) == Recipe.from_json({"format": FORMAT}, SOURCE) == Recipe()
    assert Recipe.from_json(Recipe().to_json(), SOURCE).to_json() == Recipe().to_json()
    assert Recipe.from_json({"fit": ["head"], "volumes": {"datasets": [5]}}, SOURCE) == Recipe(
        fit=["head"], volumes=Volumes([5], N_CASES))
    for key, value in FULL.to_json().items():  # each alone, where its options are not another step's
        if key != "parameters":
            assert Recipe.from_json({key: value}, SOURCE).to_json()[key] == value


def test_numbers_may_be_text() -> None:
    recipe = Recipe.from_json({"method": "dare", "parameters": {"density": "0.25", "dare.seed": "12"}}, SOURCE)
    assert recipe.to_json()["parameters"] == {"density": "0.25", "dare.seed": "12"}  # as it was said
    settings = recipe.settings()["dare"]
    assert (settings["density"], settings["seed"]) == (0.25, 12) and type(settings["seed"]) is int


WRONG_TYPES: list[tuple[str, Any]] = [
    ("method", None), ("method", 3), ("method", ["ties"]), ("align", 1), ("align", ["rebasin"]), ("fit", "head"),
    ("fit", None), ("fit", [1]), ("parameters", []), ("parameters", None), ("parameters", {"density": [0.3]}),
    ("parameters", {"density": True}), ("parameters", {"density": None}), ("parameters", {"density": {}}),
    ("weights", "1"), ("weights", 1), ("weights", ["1"]), ("weights", [True]), ("weights", [None]),
    ("weights", [10 ** 400]), ("weights", {"a": 1}), ("volumes", 3), ("volumes", []), ("volumes", {}),
    ("volumes", {"datasets": []}), ("volumes", {"datasets": "501"}), ("volumes", {"datasets": [1.5]}),
    ("volumes", {"datasets": [True]}), ("volumes", {"datasets": [501], "n_cases": "3"}),
    ("volumes", {"datasets": [501], "n_cases": 2.5}), ("volumes", {"datasets": [501], "n_cases": None}),
    ("volumes", {"datasets": [501], "cases": 3}), ("volumes", {"datasets": [501], "device": "cpu"}),
    ("keep_base_for", "*norm*"), ("keep_base_for", [3]), ("keep_base_for", None), ("stage_weights", 1),
    ("stage_weights", ["1"]), ("stage_weights", [10 ** 400]), ("share", "encoder.*"), ("share", None),
    ("same_channels", 1), ("same_channels", "yes"), ("same_channels", None)]


@pytest.mark.parametrize(("key", "value"), WRONG_TYPES)
def test_wrong_types_are_refused(key: str, value: Any) -> None:
    with pytest.raises(TransplantError) as error:
        Recipe.from_json({"method": "ties", key: value}, SOURCE)
    assert str(error.value).startswith(f"{SOURCE} is no recipe: '{key}' cannot be ")
    assert len(str(error.value)) < 200


NO_RECIPES: list[tuple[Any, str]] = [
    ([], "it is not a JSON object"), ("ties", "it is not a JSON object"), (None, "it is not a JSON object"),
    ({"format": 2}, "it has format 2, this version reads format 1"), ({"format": "1"}, "it has format 1, this"),
    ({"format": None}, "it has format None"),
    ({"metod": "ties"}, "nobody knows 'metod' (did you mean method?)"),
    ({"weigths": [1]}, "nobody knows 'weigths' (did you mean weights?)"), ({"colour": 1}, "nobody knows 'colour'"),
    ({"method": "tise"}, "there is no merging method 'tise' (did you mean ties?); choose from average, "),
    ({"align": "rebasn"}, "there is no aligner 'rebasn' (did you mean rebasin?); choose from "),
    ({"fit": ["head", "polsh"]}, "there is no fit 'polsh' (did you mean polish?); choose from "),
    ({"method": "head"}, "there is no merging method 'head'"), ({"fit": ["ties"]}, "there is no fit 'ties'"),
    ({"fit": ["head", "head"]}, "each step comes once, not average, head, head"),
    ({"method": "ties", "parameters": {"densty": 0.3}}, "ties has no -densty (did you mean density?): options are "
                                                        "-density, -lambda, -trim"),
    ({"parameters": {"density": 0.3}}, "average has no -density: there are no options; ties, "),
    ({"method": "ties", "parameters": {"dare.density": 0.3}}, "ties has no -dare.density"),
    ({"method": "ties", "parameters": {"ties.steps": 3}}, "ties has no -ties.steps"),
    ({"method": "ties", "parameters": {".density": 0.3}}, "ties has no -.density"),
    ({"method": "ties", "parameters": {"ties.": 0.3}}, "ties has no -ties."),
    ({"method": "ties", "parameters": {"": 0.3}}, "ties has no -"),
    ({"method": "ties", "fit": ["head"], "parameters": {"alpha": 0.3}}, "ties and head have no -alpha"),
    ({"method": "ties", "align": "rebasin", "fit": ["head"], "parameters": {"x": 0}}, "rebasin, ties and head have "
                                                                                      "no -x"),
    ({"method": "ties", "parameters": {"density": 1.5}}, "-density must lie between 0 and 1, not 1.5"),
    ({"method": "ties", "parameters": {"ties.density": -1}}, "-density must lie between 0 and 1, not -1"),
    ({"method": "ties", "parameters": {"density": float("nan")}}, "-density must lie between 0 and 1, not nan"),
    ({"method": "ties", "parameters": {"density": "much"}}, "-density must be a number, not much"),
    ({"method": "ties", "parameters": {"trim": "vectr"}}, "-trim must be one of vector, tensor, not vectr (did you "
                                                          "mean vector?)"),
    ({"method": "ties", "parameters": {"trim": 3}}, "-trim must be one of vector, tensor, not 3"),
    ({"method": "dare", "parameters": {"seed": -1}}, "-seed must lie between 0 and 2147483647, not -1"),
    ({"method": "dare", "parameters": {"density": 10 ** 400}}, ""),
]


@pytest.mark.parametrize(("content", "message"), NO_RECIPES)
def test_what_is_no_recipe_is_refused_with_its_source(content: Any, message: str) -> None:
    with pytest.raises(TransplantError) as error:
        Recipe.from_json(content, SOURCE)
    assert str(error.value).startswith(f"{SOURCE} is no recipe: {message}")


# ---------------------------------------------------------------------------------------------------------------------
# Options

def test_steps_come_in_their_order() -> None:
    recipe = replace(FULL, fit=["polish", "head"])
    assert [step.name for step in recipe.steps] == ["mudsc", "ties", "polish", "head"]
    assert [step.name for step in recipe.looking] == ["mudsc", "polish", "head"]
    assert list(recipe.settings()) == ["mudsc", "ties", "polish", "head"]


@pytest.mark.parametrize("recipe", [FULL, Recipe(), *map(Recipe, METHODS)])
def test_in_full_has_every_option(recipe: Recipe) -> None:
    whole = recipe.in_full()
    assert set(whole.parameters) == {f"{step.name}.{parameter.name}" for step in recipe.steps
                                     for parameter in step.parameters}
    assert whole.settings() == recipe.settings() and whole.in_full() == whole
    for step in recipe.steps:
        for parameter in step.parameters:
            value = whole.parameters[f"{step.name}.{parameter.name}"]
            assert type(value) is type(parameter.default)
            if not recipe.parameters:
                assert value == parameter.default
    assert replace(whole, parameters=recipe.parameters, volumes=recipe.volumes) == recipe  # nothing else is other
    assert whole.volumes == recipe.looked_at


def test_an_option_goes_to_every_step_that_has_it_unless_one_is_named() -> None:
    recipe = Recipe("dare", align="rebasin", fit=["head", "polish"])

    def seeds(parameters: dict[str, Any]) -> list[int]:
        settings = replace(recipe, parameters=parameters).settings()
        return [settings[name]["seed"] for name in ("rebasin", "dare", "head", "polish")]
    assert seeds({}) == [0, 0, 0, 0]
    assert seeds({"seed": 4}) == [4, 4, 4, 4]
    assert seeds({"polish.seed": 9}) == [0, 0, 0, 9]
    assert seeds({"seed": 4, "polish.seed": 9}) == seeds({"polish.seed": 9, "seed": 4}) == [4, 4, 4, 9]
    whole = replace(recipe, parameters={"seed": 4, "dare.density": 0.5}).settings()
    assert whole["dare"]["density"] == 0.5 and "density" not in whole["polish"]


def test_what_is_given_goes_before() -> None:
    recipe = Recipe("dare", align="rebasin", fit=["polish"],
                    parameters={"seed": 4, "polish.seed": 9, "dare.density": 0.5})
    before = dict(recipe.parameters)
    settings = recipe.given({"seed": 1}).settings()
    assert [settings[name]["seed"] for name in ("rebasin", "dare", "polish")] == [1, 1, 1]
    assert settings["dare"]["density"] == 0.5
    settings = recipe.given({"polish.seed": 2}).settings()
    assert [settings[name]["seed"] for name in ("rebasin", "dare", "polish")] == [4, 4, 2]
    assert recipe.in_full().given({"density": 0.7}).settings()["dare"]["density"] == 0.7
    # both at once: the one that names its step
    settings = recipe.given({"seed": 1, "rebasin.seed": 3}).settings()
    assert [settings[name]["seed"] for name in ("rebasin", "dare", "polish")] == [3, 1, 1]
    assert recipe.given({}) == recipe and recipe.parameters == before
    with pytest.raises(TransplantError, match="have no -alpha.*; mudsc has it"):
        recipe.given({"alpha": 0.5}).settings()


def test_python_writes_lambda_with_a_trailing_underscore() -> None:
    recipe = Recipe("ties", parameters={"ties.lambda": 0.5})
    assert recipe.given({"lambda_": 0.25}).settings()["ties"]["lambda"] == 0.25
    assert recipe.given({"ties.lambda_": 0.25}).to_json()["parameters"] == {"ties.lambda": 0.25}
    for name in ("density_", "lambda__", "ties.density_"):  # not behind a word of Python
        with pytest.raises(TransplantError, match=f"ties has no -{name}"):
            recipe.given({name: 0.25}).settings()


def test_a_step_comes_once() -> None:
    for wrong in (Recipe(fit=["polish", "head", "polish"]), Recipe(fit=("head", "head"))):
        with pytest.raises(TransplantError, match="each step comes once"):
            wrong.settings()


@pytest.mark.parametrize(("recipe", "said", "expected"), [
    (Recipe(fit=["head"]), None, N_PATCHES), (Recipe(fit=["head", "entries"]), None, MANY_PATCHES),
    (Recipe("fisher", fit=["polish"]), None, MANY_PATCHES), (Recipe(fit=["entries"]), 5, 5)])
def test_as_many_patches_as_the_steps_want(recipe: Recipe, said: int | None, expected: int) -> None:
    recipe = replace(recipe, volumes=Volumes([4], n_patches=said))
    assert recipe.looked_at == recipe.in_full().volumes == Volumes([4], n_patches=expected)
    assert Recipe().looked_at is None
