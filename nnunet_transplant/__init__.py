"""Merge nnU-Nets as easily as you train them: `merge(["A", "B"], fit="head", images=5).save("OUT")`.

What a command does is one call here, with the same names. Importing the package changes nothing and takes no time: what
is used is imported when it is used.
"""
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_transplant.alignment import ALIGNERS, aligner
    from nnunet_transplant.alignment.aligners import spec
    from nnunet_transplant.analysis.flatness import flatness
    from nnunet_transplant.analysis.interference import interference
    from nnunet_transplant.analysis.landscape import landscape
    from nnunet_transplant.analysis.sweep import Plan, sweep
    from nnunet_transplant.data.task_dataset import split_tasks
    from nnunet_transplant.errors import TransplantError
    from nnunet_transplant.evaluation import evaluate
    from nnunet_transplant.experts import Experts
    from nnunet_transplant.extraction import extract
    from nnunet_transplant.fitting import FITS, fit
    from nnunet_transplant.merged_model import Merged
    from nnunet_transplant.merging import merge, predict
    from nnunet_transplant.methods import METHODS, method
    from nnunet_transplant.methods.registry import CONVEX, FREE_MEAN, FREE_SUM, RATIOS, SUM_TO_ONE
    from nnunet_transplant.recipe import Recipe
    from nnunet_transplant.report_page import report
    from nnunet_transplant.steps import Found, Range, Seed
    from nnunet_transplant.vectors import TaskVectors, Tensors
    from nnunet_transplant.volumes import Volumes

    __version__: str

_HOMES = {
    # what commands do
    "merge": "merging", "predict": "merging", "evaluate": "evaluation", "split_tasks": "data.task_dataset",
    "extract": "extraction", "interference": "analysis.interference", "flatness": "analysis.flatness",
    "sweep": "analysis.sweep", "landscape": "analysis.landscape", "report": "report_page",
    "spec": "alignment.aligners",
    # what they take, give and raise
    "Merged": "merged_model", "Plan": "analysis.sweep", "Recipe": "recipe", "TransplantError": "errors",
    "Volumes": "volumes",
    # the steps there are, and what makes a function one
    "ALIGNERS": "alignment", "aligner": "alignment", "METHODS": "methods", "method": "methods", "FITS": "fitting",
    "fit": "fitting", "Experts": "experts", "Found": "steps", "Range": "steps", "Seed": "steps",
    "TaskVectors": "vectors", "Tensors": "vectors", "CONVEX": "methods.registry", "FREE_MEAN": "methods.registry",
    "FREE_SUM": "methods.registry", "RATIOS": "methods.registry", "SUM_TO_ONE": "methods.registry",
}

__all__ = [
    "ALIGNERS", "CONVEX", "FITS", "FREE_MEAN", "FREE_SUM", "METHODS", "RATIOS", "SUM_TO_ONE", "Experts", "Found",
    "Merged", "Plan", "Range", "Recipe", "Seed", "TaskVectors", "Tensors", "TransplantError", "Volumes", "__version__",
    "aligner", "evaluate", "extract", "fit", "flatness", "interference", "landscape", "merge", "method", "predict",
    "report", "spec", "split_tasks", "sweep",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("nnunet_transplant")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
