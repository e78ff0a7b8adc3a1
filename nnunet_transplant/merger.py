"""Merge trained nnU-Net models into one: align, merge, fit, as a recipe says."""
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import Network, changes_network
from nnunet_transplant.cache import Cache
from nnunet_transplant.check import BASE, BEST, Check, check
from nnunet_transplant.cost import say_cost
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts, has_running_statistics, running_statistics
from nnunet_transplant.files import file_sha256
from nnunet_transplant.heads import JoinedHeads, check_head_rows, join, structures
from nnunet_transplant.mergeable import (
    check_base,
    check_finite,
    check_mergeable,
    common_theta_0,
    common_theta_0_sha256,
    have_one_base,
    unrelated,
)
from nnunet_transplant.merged_model import Merged, MergedModel
from nnunet_transplant.methods.apply import merge_tensors
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, open_models, open_theta_0
from nnunet_transplant.nnunet import nnUNetTrainer
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.stages import matching, scales
from nnunet_transplant.vectors import TaskVectors, Tensors, in_parallel, weighted_sum
from nnunet_transplant.volumes import N_HELD_BACK, READERS, Patch, Volumes, open_patches

AVERAGE = Recipe()


def merge_folders(model_paths: Sequence[Path | str], folds: Sequence[str] | None = None,
                  checkpoint_name: str = CHECKPOINT, base: Path | str | None = None, recipe: Recipe = AVERAGE,
                  per_fold: bool = False, device: torch.device | str = "cpu", trust: bool = False,
                  progress: bool = False, cache: Path | str | None = None) -> Merged:
    """Merge everything selected into one model, or with per_fold fold k of every model with fold k of the others.

    model_paths: trained model folders, checkpoints inside them or task vector files; folds as in `open_models`.
    base: theta_0 for models that record none and for task vector files (see `open_theta_0`).
    Raises TransplantError for what cannot merge.
    """
    theta_0 = None if base is None else open_theta_0(base, checkpoint_name, trust)
    groups = [open_models(path, folds, checkpoint_name, trust, theta_0) for path in model_paths]
    return merge_groups(groups, recipe, theta_0, base, per_fold, device, progress, cache)


def merge_groups(groups: Sequence[Sequence[TrainedModel]], recipe: Recipe = AVERAGE,
                 theta_0: Network | None = None, base: Path | str | None = None, per_fold: bool = False,
                 device: torch.device | str = "cpu", progress: bool = False,
                 cache: Path | str | None = None) -> Merged:
    """As `merge_folders`, of models that are open already; `base` only says where theta_0 was read."""
    def merger(chosen: Sequence[Sequence[TrainedModel]]) -> Merger:
        return Merger(chosen, recipe, theta_0, base, device, progress, cache)

    if recipe.share:
        if per_fold:
            raise TransplantError("-share writes a model for each input: leave out --per_fold and -out_fold")
        return Merged(merger(groups).merge_shared(), side_by_side=True)
    if not per_fold:
        return Merged({"all": merger(groups).checked()})
    folds_of = [[model.fold for model in group] for group in groups]
    if any(found != folds_of[0] for found in folds_of):
        raise TransplantError("--per_fold needs the same folds in every model; found " + "; ".join(
            f"{group[0].folder}: {' '.join(found)}" for group, found in zip(groups, folds_of, strict=True)))
    return Merged({model.fold: merger([[group[i]] for group in groups]).checked() for i, model in enumerate(groups[0])})


class _Aligned(NamedTuple):
    """Models in common units, and what these depend on."""
    key: list[Any]           # options of the aligner, labels
    tried: list[Any] | None  # weights and all options, where the aligner tried what comes of it
    models: Experts
    found: dict[str, Any]


class Merger:
    """Trained models and a recipe: checked once, merged any number of times, with other weights and options. What does
    not depend on these is done once: reading volumes, matching units, statistics, what the experts say, hashes.

    groups: one for each weight, each with one or more folds that share its weight equally.
    theta_0: the base by canonical names, for models that record none. Where they record one, it must be that. `base`
        only says where it was read.
    device: where networks run, for steps that look at volumes. cache: a folder that keeps what they found out.
    Raises TransplantError for models that cannot merge, a missing or other base, wrong options, volumes that are
    missing, or that no step looks at.
    """

    def __init__(self, groups: Sequence[Sequence[TrainedModel]], recipe: Recipe = AVERAGE,
                 theta_0: Network | None = None, base: Path | str | None = None, device: torch.device | str = "cpu",
                 progress: bool = False, cache: Path | str | None = None) -> None:
        self.recipe, self.base, self.progress = recipe, base, progress
        self.aligner, self.method, self.fits = recipe.aligner, recipe.merging, recipe.fits
        self.sizes = [len(group) for group in groups]
        self.models = [model for group in groups for model in group]
        weights = self.weights_of(recipe)
        self._check_steps()
        of_one_base = self.aligner is None and not self.method.strangers
        check_mergeable(self.models, same_base=of_one_base, channels=not recipe.same_channels)
        self.related = of_one_base or (self.aligner is None and have_one_base(self.models))
        trainer = _common_trainer(self.models)
        joined = join(self.models, weights)
        if joined.rows is not None:
            for model in self.models:
                check_head_rows(model)
        layout = self.models[0].layout
        shared = frozenset().union(*(matching(layout, pattern, "-share") for pattern in recipe.share))
        self.held_back = scales(layout, recipe.keep_base_for, recipe.stage_weights)
        self.theta_0 = self._open_base(theta_0)
        self._experts = Experts(self.models, [model.tensors() for model in self.models], joined, trainer,
                                device=torch.device(device), shared=shared, progress=progress,
                                cache=None if cache is None else Cache(cache))
        self._labelled = False
        self._held_back: list[Patch] = []
        if recipe.looked_at is not None:
            self._read(recipe.looked_at, recipe.reads_labels)
            if progress:
                say_cost(recipe, self._experts, len(self._held_back),
                         self.method.strangers or self._known_base() is not None)
        self._aligned: _Aligned | None = None  # the last

    def _read(self, volumes: Volumes, labels: bool) -> None:
        if self._experts.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # as nnU-Net: all patches have one size
        on_cpu = self._experts.device.type == "cpu"  # where networks, which take longer, want the cores
        patches = open_patches(volumes, self.models[0], self._experts.see, self.progress, labels,
                               1 if on_cpu else READERS, N_HELD_BACK)
        self._held_back = [patch for patch in patches if patch.held_back]
        self._experts = replace(self._experts, patches=[patch for patch in patches if not patch.held_back])
        self._labelled = labels

    # -- checks ------------------------------------------------------------------------------------------------------

    def weights_of(self, recipe: Recipe) -> list[float]:
        """One for each model. Raises TransplantError for weights that break the method's rule, or that of a zip."""
        of_group = self.method.weights(recipe.weights, len(self.sizes))
        weights = [weight / size for weight, size in zip(of_group, self.sizes, strict=True) for _ in range(size)]
        if self.aligner is not None and self.aligner.mean_only(recipe.settings()[self.aligner.name]):
            if self.method.name != "average":
                raise TransplantError(f"after a zip only the plain mean is a network: leave out -method "
                                      f"{self.method.name}")
            equal = [1 / len(weights)] * len(weights)
            if recipe.weights is not None and any(abs(weight - equal[0]) > 1e-6 for weight in weights):
                raise TransplantError("a zip merges all models equally: leave out -weights")
            return equal if recipe.weights is None else weights
        recipe.settings()
        return weights

    def _check_steps(self) -> None:
        count = len(self.models)
        if self.method.max_models is not None and count > self.method.max_models:
            raise TransplantError(f"method {self.method.name} merges at most {self.method.max_models} models, not "
                                  f"{count}")
        if self.aligner is not None and count < 2:
            raise TransplantError("models are aligned with each other: it needs at least two")
        if self.recipe.share and (self.aligner is None or self.fits):
            raise TransplantError("-share needs -align, and no -fit")
        if self.method.strangers and (self.recipe.keep_base_for or self.recipe.stage_weights):
            raise TransplantError(f"-keep_base_for and -stage_weights say how much is merged: {self.method.name} "
                                  "merges nothing")
        looking = self.recipe.looking
        if looking and self.recipe.volumes is None:
            raise TransplantError(f"{looking[0].name} needs volumes to look at: give -d DATASET")
        if self.recipe.volumes is not None and not looking and self.aligner is None:
            raise TransplantError(f"{self.method.name} looks at no volumes: leave out -d")

    def _open_base(self, given: Network | None) -> Network | None:
        """theta_0, where it is given or the merge needs it: the given one, else the one a model folder keeps. For
        models that are aligned it is in the units of the first, and must be given."""
        needed = self.method.needs_base or bool(self.held_back)
        asking = f"method {self.method.name} needs" if self.method.needs_base else \
            "-keep_base_for and -stage_weights need"
        if self.aligner is None:
            return None if given is None and not needed else common_theta_0(self.models, given, asking)
        if given is not None:
            check_base(given, self.models[0])
        elif needed:
            raise TransplantError(f"after an alignment {asking} the base of the first model: give it with -base")
        return given

    # -- merging -----------------------------------------------------------------------------------------------------

    def merge(self, weights: Sequence[float] | None = None, **parameters: Any) -> MergedModel:
        """The merged model, with these weights and options beside those of the recipe. Raises TransplantError for wrong
        ones, NaN or Inf in an input, and what the steps refuse."""
        if self.recipe.share:
            raise TransplantError("-share makes a model of each input, not one of all")
        recipe, tensors, found = self._merged(weights, parameters)
        joined = join(self.models, self.weights_of(recipe))
        axes = set.intersection(*(set(model.mirroring_axes or ()) for model in self.models))
        return self._model(self.models[0], tensors, self._with_labels(joined).dataset_json,
                           tuple(sorted(axes)) or None,  # nnU-Net crashes on an empty tuple
                           recipe, found)

    def tensors(self, weights: Sequence[float] | None = None, **parameters: Any) -> dict[str, torch.Tensor]:
        """As `merge`, only the merged tensors, by canonical name."""
        return self._merged(weights, parameters)[1]

    def merge_shared(self) -> dict[str, MergedModel]:
        """Models that share the tensors of `recipe.share`, merged, and keep the others, with their own heads and
        labels: such as one encoder for several tasks, each with its own decoder. What a model keeps reads the units of
        what they share as these are merged (ZipIt!'s partial zip). By names made of datasets and folds.

        Raises TransplantError as `merge` does, and for a pattern that matches nothing.
        """
        weights = self.weights_of(self.recipe)
        aligned, found = self._align(self.recipe, weights)
        merged, more = self._mean(self.recipe, aligned, weights)
        wholes = [dict(own) | {name: merged[name] for name in aligned.shared} for own in aligned.tensors]
        if aligned.patches and has_running_statistics(merged):
            seen = replace(aligned, tensors=wholes)
            wholes = [whole | running_statistics(seen, seen.network(i)) for i, whole in enumerate(wholes)]
        models: dict[str, MergedModel] = {}
        for model, whole in zip(self.models, wholes, strict=True):
            name = model.folder.parent.name if model.folder.parent.name.startswith("Dataset") else model.folder.name
            name = f"{name}_fold_{model.fold}"
            own_labels = Experts([model], [whole], join([model], [1.0]), aligned.trainer).dataset_json
            models[name if name not in models else f"{name}_{len(models)}"] = self._model(
                model, whole, own_labels, model.mirroring_axes, self.recipe, found | more)
        return models

    def _merged(self, weights: Sequence[float] | None,
                parameters: Mapping[str, Any]) -> tuple[Recipe, dict[str, torch.Tensor], dict[str, Any]]:
        """The recipe with what is other this time, the merged tensors by canonical name, and what was found out."""
        recipe = self.recipe.given(parameters)
        if weights is not None:
            recipe = replace(recipe, weights=weights)
        each, settings = self.weights_of(recipe), recipe.settings()
        if self.recipe.looked_at is not None and recipe.reads_labels and not self._labelled:
            self._read(self.recipe.looked_at, labels=True)
            self.__dict__.pop("_unaligned", None)
        aligned, found = self._align(recipe, each)
        merged, more = self._mean(recipe, aligned, each)
        found = found | more
        for step in self.fits:
            inputs = {"merged": merged, "experts": self._with_labels(join(self.models, each))}
            if "vectors" in step.inputs:
                inputs["vectors"] = self._vectors(aligned, each)
            merged, more = step.call(settings[step.name], **inputs)
            found = found | more
        return recipe, merged, found

    def checked(self) -> MergedModel:
        """As `merge`, with what `check` says."""
        merged = self.merge()
        found = self.check(merged)
        return merged if found is None else replace(
            merged, provenance=merged.provenance | {"check": found.to_json()}, notes=[*merged.notes, *found.notes()])

    def check(self, merged: MergedModel) -> Check | None:
        """What a merge kept of the models; None without volumes, and of models that share only a part."""
        if not self._experts.patches or self.recipe.share:
            return None
        base, layout, beside = self._known_base(), self.models[0].layout, {}
        if base is not None:
            beside = {BASE: base}
        elif self.method.strangers:
            chosen = self._experts.tensors[merged.provenance["found"]["weights"].index(1.0)]
            beside = {BEST: {name: chosen[name] for name in layout.body}}
        canonical = layout.canonical
        return check(self._with_labels(join(self.models, self.weights_of(self.recipe))), self._held_back,
                     {canonical[name]: tensor for name, tensor in merged.state_dict.items()}, beside)

    def _known_base(self) -> Network | None:
        """theta_0 in the units of all models, where it is known."""
        if not self.related:
            return None
        kept = (model.theta_0() for model in self.models)
        return self.theta_0 or next((theta_0 for theta_0 in kept if theta_0 is not None), None)

    def _vectors(self, aligned: Experts, weights: Sequence[float]) -> TaskVectors:
        """Of the body, in common units, beside the base, where one is known and models keep its units; else beside the
        mean."""
        names = [name for name in self.models[0].layout.body if aligned.tensors[0][name].is_floating_point()]
        thetas = [{name: tensors[name] for name in names} for tensors in aligned.tensors]
        base = self._known_base()
        if base is None:
            base = {name: weighted_sum([theta[name].float() for theta in thetas], [1 / len(thetas)] * len(thetas))
                    for name in names}
        return TaskVectors(base, thetas, weights)

    def _align(self, recipe: Recipe, weights: Sequence[float]) -> tuple[Experts, dict[str, Any]]:
        """The models in common units. The last ones are kept: many merges differ only in their weights."""
        experts = self._with_labels(join(self.models, weights))
        if self.aligner is None:
            return experts, {}
        settings = recipe.settings()
        options = settings[self.aligner.name]
        key, comes = [options, experts.joined], [weights, settings]
        last = self._aligned
        if last is None or last.key != key or (last.tried is not None and last.tried != comes):
            tried: list[Any] | None = None

            def merge(tensors: Sequence[Network]) -> dict[str, torch.Tensor]:
                nonlocal tried
                tried = comes
                if recipe.share:
                    raise TransplantError("-share makes several models: nobody can say how good one of them is")
                return self._mean(recipe, replace(experts, tensors=tensors), weights)[0]
            tensors, found = self.aligner.call(options, experts=experts, merge=merge)
            last = self._aligned = _Aligned(key, tried, replace(experts, tensors=tensors), found)
        return last.models, last.found

    def _with_labels(self, joined: JoinedHeads) -> Experts:
        """The models before alignment, for merged labels that depend on the weights: what only tasks of negative weight
        have is forgotten."""
        experts = self._unaligned if self.aligner is not None else self._experts
        return experts if joined == experts.joined else replace(experts, joined=joined)

    @cached_property
    def _unaligned(self) -> Experts:
        """What alignment starts from, checked; with running statistics of the volumes, where the network has any."""
        experts = self._experts
        for model, tensors in zip(self.models, experts.tensors, strict=True):
            for name, tensor in tensors.items():
                check_finite(tensor, name, model)
        if experts.patches and has_running_statistics(self.models[0].layout.names):
            experts = replace(experts, tensors=[{**tensors, **running_statistics(experts, experts.network(i))}
                                                for i, tensors in enumerate(experts.tensors)])
        return experts

    def _mean(self, recipe: Recipe, aligned: Experts,
              weights: Sequence[float]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """By the method, of models in common units: the merged tensors, and what was found out. Tensors of integers are
        those of the first model. Aligned models with batch norms get running statistics of their own."""
        first, names = aligned.tensors[0], self.models[0].layout.body
        floats = [name for name in names if first[name].is_floating_point()]

        def check(piece: Tensors) -> None:
            for model, theta in zip(self.models, piece.thetas, strict=True):
                check_finite(theta, piece.name, model)

        for model, tensors in zip(self.models, aligned.tensors, strict=True):
            for name in model.layout.heads:
                check_finite(tensors[name].float(), name, model)
        body, found = merge_tensors(
            self.method, recipe.settings()[self.method.name], weights, self.theta_0,
            [{name: tensors[name] for name in floats} for tensors in aligned.tensors], aligned, self.held_back, check,
            self.progress)
        heads = aligned.heads(found.get("weights", weights))
        merged = body | {name: first[name].clone() for name in names if name not in body} | heads
        if self.aligner is not None and aligned.patches and has_running_statistics(merged):
            merged |= running_statistics(aligned, aligned.merged_network(merged))
        return merged, found

    # -- the result --------------------------------------------------------------------------------------------------

    def _model(self, like: TrainedModel, tensors: Network, dataset_json: dict[str, Any],
               mirroring_axes: tuple[int, ...] | None, recipe: Recipe, found: Mapping[str, Any]) -> MergedModel:
        """The merged model with everything else as one of the models has it."""
        fingerprint = like.folder / "dataset_fingerprint.json"
        return MergedModel(
            state_dict={name: tensors[like.layout.canonical[name]] for name in like.layout.shapes},
            plans=like.plans, dataset_json=dataset_json, configuration=like.configuration,
            trainer=self._experts.trainer, mirroring_axes=mirroring_axes,
            fingerprint=fingerprint if fingerprint.is_file() else None, provenance=self._provenance(recipe, found),
            notes=[] if self.aligner is not None or self.method.strangers else self._warnings(recipe))

    def _provenance(self, recipe: Recipe, found: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that `record.read_merge` needs to do it again, and what a reader wants to know."""
        group_of = [index for index, size in enumerate(self.sizes) for _ in range(size)]
        cases = {patch.cases.dataset: list(patch.cases.files) for patch in self._experts.patches}
        steps = [{"name": step.name, "summary": step.summary, "reference": step.reference, "url": step.url}
                 for step in recipe.steps]
        return {
            "recipe": recipe.in_full().to_json(), "steps": steps, "found": dict(found), "volumes": cases,
            "device": str(self._experts.device) if cases else None,
            "base": None if self.base is None else str(Path(self.base).resolve()),
            "theta_0_sha256": self.theta_0_sha256,
            "inputs": [{"path": str(model.path.resolve()), "sha256": sha256, "fold": model.fold, "group": group,
                        "weight": weight, "structures": list(structures(model))}
                       for model, sha256, group, weight in zip(self.models, self.hashes, group_of,
                                                               self.weights_of(recipe), strict=True)]}

    @cached_property
    def hashes(self) -> list[str]:
        """SHA-256 of each model's checkpoint or task vector file."""
        return list(in_parallel(file_sha256, [model.path for model in self.models]))

    @cached_property
    def theta_0_sha256(self) -> str | None:
        """Of the base, where there is one common base; aligned models may have several."""
        sha256 = common_theta_0_sha256(self.models) if self.related else None
        return checkpoints.tensors_sha256(self.theta_0) if sha256 is None and self.theta_0 is not None else sha256

    def _warnings(self, recipe: Recipe) -> list[str]:
        """Where models that record no common base, and have a weight, look as if they had none."""
        counted = [tensors for tensors, weight in zip(self._experts.tensors, self.weights_of(recipe), strict=True)
                   if weight]
        return unrelated(self.models, counted)


def _common_trainer(models: Sequence[TrainedModel]) -> type[nnUNetTrainer]:
    """The trainer that builds the merged network: stock, unless the models' trainer changes the network."""
    # by name: nnU-Net imports a trainer of nnUNet_extTrainer anew each time it looks for one
    trainers = {model.trainer.__name__: model.trainer for model in models if changes_network(model.trainer)}
    if len(trainers) > 1:
        raise TransplantError("models whose trainers build networks of their own merge only with their like: "
                              + ", ".join(sorted(trainers)))
    return next(iter(trainers.values()), nnUNetTrainer)
