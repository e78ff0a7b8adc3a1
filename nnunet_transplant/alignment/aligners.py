"""Our aligners, for models with no common base: in the space of weights, of activations, or of both."""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from nnunet_transplant.alignment.activation_space import activation_similarity
from nnunet_transplant.alignment.dual import PATIENCE, Solver, match, matcher, zipper
from nnunet_transplant.alignment.graph import exported, input_shape, lowest_head, meta_network
from nnunet_transplant.alignment.registry import aligner
from nnunet_transplant.alignment.spec import Spec
from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.alignment.weight_space import moved, restricted
from nnunet_transplant.architecture import Network, changes_network
from nnunet_transplant.ensemble import agreement, ensemble_targets, reference_targets
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.experts import Experts
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, open_models, open_theta_0
from nnunet_transplant.nnunet import nnUNetTrainer
from nnunet_transplant.steps import Found, Range, Seed

ALPHAS = [step / 10 for step in range(11)]  # that -search_alpha tries

Units = Annotated[Literal["match", "zip"], "match: each unit with one of every other model; zip: the most similar "
                  "units are joined, also of one model (the plain mean only)"]
To = Annotated[Literal["first", "mean"], "what units are matched to: the first model, or in turn the mean of the "
               "others"]
Decay = Annotated[float, "zip: factor of the similarities of units that are joined already, the paper's a",
                  Range(0.0, 1.0)]
Budget = Annotated[float, "zip: share of the joins that may be inside a model, the paper's b; 0: none", Range(0.0, 1.0)]


def each_once(experts: Experts, settings: Mapping[str, Any]) -> float:
    return 1.3 * len(experts.models) * len(experts.patches)  # correlations beside the network


def with_search(experts: Experts, settings: Mapping[str, Any]) -> float:
    tries = len(ALPHAS) if settings["search_alpha"] != "no" else 0
    return each_once(experts, settings) + (tries + len(experts.models)) * len(experts.patches) * (tries > 0)


def zips(settings: Mapping[str, Any]) -> bool:
    return settings["units"] == "zip"


@aligner("rebasin", "by the weights", mean_only=zips,
         reference="Git Re-Basin: Merging Models modulo Permutation Symmetries, Ainsworth et al., ICLR 2023",
         url="https://arxiv.org/abs/2209.04836")
def rebasin(experts: Experts, units: Units = "match", to: To = "first", decay: Decay = 0.5, budget: Budget = 1.0,
            seed: Seed = 0) -> Found:
    """Matched as in Git Re-Basin: by inner products of the weights, from the identity, until a sweep gains nothing.
    Zipped by their correlation, since a zip compares units with joins of several."""
    if units == "match":
        return put_together(experts, matcher(to == "mean"), 1.0, seed, pearson=False, patience=1)
    return put_together(experts, zipper(decay, budget), 1.0, seed)


@aligner("activation", "by the activations on the same patches", needs=("volumes",), mean_only=zips, passes=each_once,
         reference="ZipIt! Merging Models from Different Tasks without Training, Stoica et al., ICLR 2024",
         url="https://arxiv.org/abs/2305.03053")
def activation(experts: Experts, units: Units = "match", to: To = "first", decay: Decay = 0.5,
               budget: Budget = 1.0) -> Found:
    """By Pearson correlation over all voxels."""
    return put_together(experts, _solver(units, to, decay, budget), 0.0, 0)


@aligner("mudsc", "by the weights and the activations", needs=("volumes",), mean_only=zips, passes=with_search,
         labels_when=("search_alpha", "dice"),
         reference="Training-Free Pretrained Model Merging, Xu et al., CVPR 2024",
         url="https://arxiv.org/abs/2403.01753")
def mudsc(experts: Experts, merge: Callable[[Sequence[Network]], Network],
          alpha: Annotated[float, "how much the weights count beside the activations: 0 not at all, 1 alone",
                           Range(0.0, 1.0)] = 0.5,
          search_alpha: Annotated[Literal["no", "dice", "agreement"], "try alpha from 0 to 1: for the best Dice on "
                                  "labelled cases, or for the best agreement with the ensemble of the models"] = "no",
          units: Units = "match", to: To = "first", decay: Decay = 0.5, budget: Budget = 1.0, seed: Seed = 0) -> Found:
    """By alpha times the correlation of the weights plus (1 - alpha) times that of the activations (MuDSC, Eq. 8)."""
    solver = _solver(units, to, decay, budget)
    if search_alpha == "no":
        return put_together(experts, solver, alpha, seed)
    targets = experts.once("ensemble targets", lambda: ensemble_targets(experts)) if search_alpha == "agreement" \
        else reference_targets(experts)
    scores: dict[float, float] = {}
    best = None
    for candidate in experts.bar(ALPHAS, "alpha"):
        found = put_together(experts, solver, candidate, seed)
        score = agreement(experts, experts.merged_network(merge(found.result)), targets)
        if best is None or score > max(scores.values()):
            best = found
        scores[candidate] = score
    assert best is not None
    return Found(best.result, best.found | {"searched": {f"{each:g}": round(score, 6)
                                                         for each, score in scores.items()}})


def _solver(units: str, to: str, decay: float, budget: float) -> Solver:
    return matcher(to == "mean") if units == "match" else zipper(decay, budget)


def network_spec(model: TrainedModel, trainer: type[nnUNetTrainer]) -> Spec:
    """The permutation spec of a model's network, heads of deep supervision included."""
    # a trainer's own network, such as Primus, may take inputs of the patch size only
    return derive(meta_network(model, trainer), input_shape(model, smallest=not changes_network(trainer)))


def spec(model: Path | str, *, base: Path | str | None = None, checkpoint_name: str = CHECKPOINT,
         trust: bool = False) -> Spec:
    """Which units of a trained model's network may change places. `base`: theta_0 of a task vector file. Raises
    TransplantError for what is no model, and networks that cannot be followed."""
    use_our_trainers()
    theta_0 = None if base is None else open_theta_0(base, checkpoint_name, trust)
    opened = open_models(model, None, checkpoint_name, trust, theta_0)[0]
    return network_spec(opened, opened.trainer)


def put_together(experts: Experts, solver: Solver, alpha: float, seed: int, pearson: bool = True,
                 patience: int = PATIENCE) -> Found:
    """Match the units of all models and move them. alpha: how much the weights say; 1 needs no volumes."""
    spec = experts.once("spec", lambda: _spec(experts))
    first = experts.models[0]
    skip = lowest_head(spec.program) if experts.same_labels else frozenset(first.layout.heads)
    if experts.shared:  # what models keep to themselves need not fit together
        skip |= frozenset(first.layout.names) - experts.shared
    activations = None
    if alpha < 1:
        every, shared = range(len(experts.models)), sorted(experts.shared)
        found = experts.kept("activations", every, [shared], lambda: _activations(experts, spec))
        activations = {name: of_group.numpy() for name, of_group in found.items()}
    matching = match(spec, experts.tensors, solver, alpha, activations, seed, skip, pearson, patience,
                     experts.progress)
    tensors: list[dict[str, torch.Tensor]] = [moved(network, spec, matching.assignments, model)
                                              for model, network in enumerate(experts.tensors)]
    return Found(tensors, {"alpha": alpha, "similarity": round(matching.similarity, 6), "sweeps": matching.sweeps})


def _spec(experts: Experts) -> Spec:
    spec = network_spec(experts.models[0], experts.trainer)
    return restricted(spec, experts.shared) if experts.shared else spec


def _activations(experts: Experts, spec: Spec) -> dict[str, torch.Tensor]:
    first = experts.models[0]
    program = exported(meta_network(first, experts.trainer), input_shape(first))
    networks = [{name: tensor.float().to(experts.device) for name, tensor in tensors.items()}
                for tensors in experts.tensors]
    images = (experts.images([patch]) for patch in experts.bar(experts.patches, "activations"))
    found = activation_similarity(spec, program, networks, images)
    return {name: torch.from_numpy(of_group) for name, of_group in found.items()}
