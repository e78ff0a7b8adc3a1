"""How models merge where nobody says it: by what they are, and by whether there are images to look at."""
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from nnunet_transplant.heads import structures
from nnunet_transplant.mergeable import have_one_base, model_of_unknown_base
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.recipe import Recipe

FITS = "head", "entries"


class Choice(NamedTuple):
    recipe: Recipe
    why: str
    advice: Sequence[str] = ()  # what would do better


def choose(models: Sequence[TrainedModel], recipe: Recipe, base: bool = False) -> Choice:
    """The recipe with steps for these models, and the reason in words.

    base: whether the user gave one, so that the models have it in common. The figures behind this table:
    documentation/reference/merging.md, "What is done by default".
    """
    if len(models) == 1:
        return Choice(recipe, "one model")
    related = base or have_one_base(models)
    folds = all(structures(model) == structures(models[0]) for model in models)
    images = recipe.volumes is not None
    what = ("models of the same structures" if folds else "tasks") + (" and one base" if related else
                                                                      " without a common base")
    if images:
        steps = replace(recipe, fit=[name for name in FITS if name != "head" or ends_in_single_voxels(models[0])])
        if not related and folds:
            steps = replace(steps, method="best")
        elif not related:
            steps = replace(steps, align="mudsc", parameters={"units": "zip", **recipe.parameters})
        return Choice(steps, f"{what} with images")
    advice = ["without images a merge is a guess: some eight unlabelled ones, with -d DATASET, let it learn from its "
              "models, and mostly help much"]
    if not related:
        return Choice(replace(recipe, align="rebasin", parameters={"units": "zip", **recipe.parameters}),
                      f"{what} without images", advice)
    known = base or model_of_unknown_base(models) is None
    method = "average" if folds or not known else "iso_c"
    return Choice(replace(recipe, method=method), f"{what} without images", advice)


def ends_in_single_voxels(model: TrainedModel) -> bool:
    """Whether its heads are convolutions of single voxels, which can be fitted by themselves."""
    return all(set(model.layout.shapes[name][2:]) <= {1} for name in model.layout.shapes
               if model.layout.canonical[name] in model.layout.heads)
