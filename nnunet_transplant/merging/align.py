"""The merging methods for models with no common base: their units are matched first, then a method merges them."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nnunet_transplant.alignment.activations import activation_similarity
from nnunet_transplant.alignment.dual import Solver, aligned, match, zipped
from nnunet_transplant.alignment.graph import exported, input_shape, lowest_head, meta_network
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.alignment.weights import Network, moved, restricted
from nnunet_transplant.architecture import changes_network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging.calibration import Calibration
from nnunet_transplant.merging.registry import METHODS, SEED, Method, Parameter, WeightsRule, any_weights, register
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.nnunet import nnUNetTrainer


@dataclass(frozen=True)
class Unaligned:
    """Models to put into common units.

    same_labels: whether their heads mean the same, so that these say something of the units they read.
    shared: names of the tensors that will be merged; the units that others make stay each model's own.
    """
    models: Sequence[TrainedModel]
    tensors: Sequence[Network]
    trainer: type[nnUNetTrainer]
    same_labels: bool
    shared: frozenset[str] | None = None
    progress: bool = False
    kept: dict[str, Any] = field(default_factory=dict)  # what does not depend on the method's parameters


@dataclass(frozen=True)
class Aligned:
    """The same models in common units: unit i of one belongs to unit i of the others."""
    tensors: list[dict[str, torch.Tensor]]
    found: dict[str, Any] = field(default_factory=dict)  # for merge.json


def network_spec(model: TrainedModel, trainer: type[nnUNetTrainer]) -> Spec:
    """The permutation spec of a model's network, heads of deep supervision included."""
    # a trainer's own network, such as Primus, may take inputs of the patch size only
    return derive(meta_network(model, trainer), input_shape(model, smallest=not changes_network(trainer)))


def put_together(given: Unaligned, calibration: Calibration | None, solver: Solver, alpha: float, seed: int,
                 pearson: bool = True, patience: int | None = None) -> Aligned:
    """Match the units of all models and move them. alpha: how much the weights say, 1 needs no volumes."""
    first = given.models[0]
    spec = given.kept.get("spec")
    if spec is None:
        spec = network_spec(first, given.trainer)
        spec = given.kept["spec"] = spec if given.shared is None else restricted(spec, given.shared)
    skip = lowest_head(spec.program) if given.same_labels else frozenset(first.layout.heads)
    if given.shared is not None:  # what models keep to themselves need not fit together
        skip |= frozenset(first.layout.names) - given.shared
    activations = None
    if alpha < 1:
        activations = given.kept.get("activations")
        if activations is None:
            activations = given.kept["activations"] = _activations(given, calibration, spec)
    options = {} if patience is None else {"patience": patience}
    matching = match(spec, given.tensors, solver, alpha, activations, seed, skip, pearson, progress=given.progress,
                     **options)
    tensors = [moved(network, spec, matching.assignments, i) for i, network in enumerate(given.tensors)]
    return Aligned(tensors, {"alpha": alpha, "similarity": round(matching.similarity, 6), "sweeps": matching.sweeps})


def _activations(given: Unaligned, calibration: Calibration, spec: Spec) -> dict[str, np.ndarray]:
    first = given.models[0]
    program = exported(meta_network(first, given.trainer), input_shape(first))
    networks = [{name: tensor.float().to(calibration.device) for name, tensor in tensors.items()}
                for tensors in given.tensors]
    patches = calibration.bar(calibration.patches, "activations")
    return activation_similarity(spec, program, networks, (calibration.images([patch]) for patch in patches))


def align_weights(given: Unaligned, calibration: Calibration | None, to: str, seed: int, **_: Any) -> Aligned:
    """Git Re-Basin: inner products of the weights, from the identity, until a sweep gains nothing."""
    return put_together(given, calibration, aligned(to == "mean"), 1.0, seed, pearson=False, patience=1)


def align_activations(given: Unaligned, calibration: Calibration, to: str, **_: Any) -> Aligned:
    return put_together(given, calibration, aligned(to == "mean"), 0.0, 0)


def align_both(given: Unaligned, calibration: Calibration, to: str, alpha: float, seed: int, **_: Any) -> Aligned:
    return put_together(given, calibration, aligned(to == "mean"), alpha, seed)


def zip_weights(given: Unaligned, calibration: Calibration | None, decay: float, budget: float, seed: int,
                **_: Any) -> Aligned:
    return put_together(given, calibration, zipped(decay, budget), 1.0, seed)


def zip_activations(given: Unaligned, calibration: Calibration, decay: float, budget: float, **_: Any) -> Aligned:
    return put_together(given, calibration, zipped(decay, budget), 0.0, 0)


def zip_both(given: Unaligned, calibration: Calibration, decay: float, budget: float, alpha: float, seed: int,
             **_: Any) -> Aligned:
    return put_together(given, calibration, zipped(decay, budget), alpha, seed)


def never(*_: Any) -> torch.Tensor:
    raise AssertionError("the method that comes then merges")


def _equal_only(weights: Sequence[float]) -> None:
    if any(abs(weight - 1 / len(weights)) > 1e-6 for weight in weights):
        raise TransplantError("a zip merges all models equally: leave out -weights")


AS_THEN = WeightsRule("as the method given to -then", any_weights, lambda models: 1 / models)
EQUAL = WeightsRule("none", _equal_only, lambda models: 1 / models)
THEN = Parameter("then", "average", "the method that merges the aligned models", choices=tuple(METHODS))
TO = Parameter("to", "first", "what units are aligned to: the first model, or in turn to the mean of the others",
               choices=("first", "mean"))
ALPHA = Parameter("alpha", 0.5, "how much the weights count beside the activations: 0 not at all, 1 alone", 0.0, 1.0)
SEARCH = Parameter("search", "no", "try alpha from 0 to 1: for the best Dice on labelled cases, or for the best "
                                   "agreement with the ensemble of the models", choices=("no", "dice", "agreement"))
ZIP = (Parameter("decay", 0.5, "factor of the similarities of units that are merged already, the paper's a", 0.0, 1.0),
       Parameter("budget", 1.0, "share of the joins that may be inside a model, the paper's b; 0: none", 0.0, 1.0))
REBASIN = "Git Re-Basin: Merging Models modulo Permutation Symmetries, Ainsworth et al., ICLR 2023"
ZIPIT = "ZipIt! Merging Models from Different Tasks without Training, Stoica et al., ICLR 2024"
MUDSC = "Training-Free Pretrained Model Merging, Xu et al., CVPR 2024"

_ALIGN: Mapping[str, Any] = {"merge": never, "weights_rule": AS_THEN, "needs_base": False}
_ZIP: Mapping[str, Any] = {"merge": never, "weights_rule": EQUAL, "needs_base": False}

register(Method(name="rebasin", summary="permute units so that the weights of the models match", reference=REBASIN,
                align=align_weights, parameters=(THEN, TO, SEED), **_ALIGN))
register(Method(name="activation_align", summary="permute units so that their activations match", reference=MUDSC,
                align=align_activations, needs_data="volumes", parameters=(THEN, TO), **_ALIGN))
register(Method(name="mudsc_align", summary="permute units so that their weights and activations match",
                reference=MUDSC, align=align_both, needs_data="volumes", parameters=(ALPHA, SEARCH, THEN, TO, SEED),
                **_ALIGN))
register(Method(name="zipit", summary="merge the units of all models with the most similar activations",
                reference=ZIPIT, align=zip_activations, needs_data="volumes", parameters=ZIP, **_ZIP))
register(Method(name="weight_zip", summary="merge the units of all models with the most similar weights",
                reference=MUDSC, align=zip_weights, parameters=(*ZIP, SEED), **_ZIP))
register(Method(name="mudsc_zip", summary="merge the units of all models most similar in weights and activations",
                reference=MUDSC, align=zip_both, needs_data="volumes", parameters=(ALPHA, SEARCH, *ZIP, SEED), **_ZIP))
