"""Merged models scored in memory: one network that any weights are written into, cases that are preprocessed once, and
no files."""
import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_transplant.analysis.risk import volumes_of
from nnunet_transplant.architecture import bare
from nnunet_transplant.data.cases import Cases, evaluation_cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.heads import join, join_head, shares
from nnunet_transplant.labels import has_regions
from nnunet_transplant.merging import Recipe, merge_models
from nnunet_transplant.merging.calibration import open_calibration, preprocessed
from nnunet_transplant.merging.ensemble import ensemble_lessons, teach_head
from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import find
from nnunet_transplant.merging.vectors import Tensors
from nnunet_transplant.model_folder import TrainedModel, common_theta_0
from nnunet_transplant.prediction import HALF_PRECISION, BatchPredictor, predictor
from nnunet_transplant.targets import Target

LINEAR = ("average", "task_arithmetic")  # sums of the models' tensors, which the device makes in no time


@dataclass(frozen=True)
class LabelledCase:
    """A case of a dataset as a model's plans preprocess it."""
    name: str
    image: torch.Tensor      # (channels, x, y, z), float32
    reference: torch.Tensor  # (x, y, z), int16: the dataset's own label values, resampled as nnU-Net does for training


def open_labelled_cases(dataset: str | int, fold: str | int, model: TrainedModel, n_cases: int | None = None,
                        progress: bool = False) -> tuple[Cases, list[LabelledCase]]:
    """The validation cases of a dataset's fold (or with fold "all" every case), preprocessed by the model's plans; of
    them n_cases, spread evenly over the sorted names.

    Raises TransplantError for what `evaluation_cases` refuses, a missing label map among it, for channels that do
    not fit, second stages of a cascade, and files that nnU-Net cannot read.
    """
    found = evaluation_cases(dataset, fold)
    volumes = volumes_of(found.dataset, fold, len(found.files) if n_cases is None else n_cases)
    bar = tqdm(preprocessed(volumes, model), desc="reading cases", unit="case", delay=3, disable=not progress)
    volumes_read = list(bar)
    cases = volumes_read[0][2]  # of each volume the same: the cases that were chosen
    labelled = [LabelledCase(name, torch.from_numpy(image), torch.from_numpy(values.astype(np.int16).clip(min=0)))
                for name, (image, values, _) in zip(cases.files, volumes_read, strict=True)]  # -1: outside of the crop
    return cases, labelled


class MergedNetwork:
    """The network that merging makes of trained models: built once, its weights replaced in place.

    groups, theta_0, base: as `merge_models` takes them; recipe: the method and what stays the same of its parameters.
    A fitted head is fitted anew to each merge; what it is fitted to is computed once.
    merged: what merge_models makes of the recipe; labels and all else but the weights are the same for any weights
    that are not negative.
    Raises TransplantError for what merge_models refuses.
    """

    def __init__(self, groups: Sequence[Sequence[TrainedModel]], recipe: Recipe,
                 theta_0: dict[str, torch.Tensor] | None, base: Path | None, device: torch.device,
                 step_size: float = 0.5, mirroring: bool = False) -> None:
        self.groups, self.theta_0, self.base = groups, theta_0, base
        looks = find(recipe.method).looks(recipe.parameters)
        self.recipe = replace(recipe, fit_head=False, volumes=recipe.volumes if looks else None)
        self.models = [model for group in groups for model in group]
        self.layout = self.models[0].layout
        self.merged = merge_models(groups, self.recipe, theta_0, base)
        self.predictor = predictor(self.merged, device, step_size, mirroring, progress_bar=False, kind=BatchPredictor)
        network = bare(self.predictor.network).to(device).eval()
        network.load_state_dict(self.merged.weights)
        state = network.state_dict()
        self.tensors = {name: state[name] for name in self.layout.names}  # not copies: the network's own
        self._terms = self._linear_terms(device) if recipe.method in LINEAR else None
        self._calibration = self._lessons = None
        if recipe.fit_head:
            self._calibration = open_calibration(recipe.volumes, self.models, self.merged.dataset_json, {},
                                                 self.merged.trainer)
            equal = [1 / len(self.models)] * len(self.models)
            self._lessons = ensemble_lessons(self._calibration, join(self.models, equal))

    @property
    def fits_head(self) -> bool:
        return self._lessons is not None

    def _linear_terms(self, device: torch.device) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        """theta_0 and the models' tensors of floats, in float32 on the device."""
        def on_device(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()
                    if tensor.is_floating_point()}
        theta_0 = {}
        if find(self.recipe.method).needs_base:
            theta_0 = common_theta_0(self.models, self.theta_0, f"method {self.recipe.method} needs")
        return on_device(theta_0), [on_device(model.tensors()) for model in self.models]

    def set(self, weights: Sequence[float] | None, parameters: Mapping[str, Any] | None = None) -> None:
        """Write what merging gives with these weights (one for each group, none negative) and these parameters of the
        method, beside those of the recipe, into the network. Raises TransplantError for what merge_models refuses."""
        for name, tensor in self._merge(weights, parameters or {}):
            self.tensors[name].copy_(tensor)
        if self._lessons is not None:
            teach_head(self._calibration, bare(self.predictor.network), self._lessons)

    def _merge(self, weights: Sequence[float] | None, parameters: Mapping[str, Any]) -> Iterator:
        if self._terms is not None:
            yield from self._sum(weights)
            return
        recipe = replace(self.recipe, weights=weights, parameters={**self.recipe.parameters, **parameters})
        merged = merge_models(self.groups, recipe, self.theta_0, self.base).weights
        yield from ((name, merged[name]) for name in self.layout.names)

    def _sum(self, weights: Sequence[float]) -> Iterator[tuple[str, torch.Tensor]]:
        """As merge_models does it with a linear method, tensor by tensor."""
        theta_0, thetas = self._terms
        method = find(self.recipe.method)
        each = [weight / len(group) for weight, group in zip(weights, self.groups, strict=True) for _ in group]
        joined = join(self.models, each)
        for name in thetas[0]:
            tensors = Tensors(name, theta_0.get(name), [theta[name] for theta in thetas], each)
            if name not in self.layout.heads:
                result = method.merge(tensors, None)
            elif joined.rows is None:
                result = average(replace(tensors, weights=shares(each)))
            else:
                result = join_head(tensors.thetas, each, joined)
            yield name, result.to(self.merged.weights[name].dtype)  # as it is stored

    def logits(self, image: torch.Tensor) -> torch.Tensor:
        """What nnU-Net's sliding window gives a preprocessed image (channels, x, y, z): (heads, x, y, z), half
        precision. Raises TransplantError where half precision is not enough for them."""
        with contextlib.redirect_stdout(io.StringIO()):
            logits = self.predictor.predict_sliding_window_return_logits(image)
        if not bool(torch.isfinite(logits.sum(dtype=torch.float32))):
            raise TransplantError(HALF_PRECISION if bool(logits.isinf().any())
                                  else "the merged weights give logits that are no numbers")
        return logits

    def labels(self, image: torch.Tensor) -> torch.Tensor:
        """The label map (x, y, z) of a preprocessed image, in the merged model's label values."""
        logits = self.logits(image)
        if not has_regions(self.merged.dataset_json["labels"]):
            return logits.argmax(0)
        labels = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
        for region, value in zip(logits, self.predictor.label_manager.regions_class_order, strict=True):
            labels[region > 0] = value
        return labels

    def dice(self, cases: Sequence[LabelledCase], targets: Sequence[Target],
             ignore: int | None = None) -> dict[str, list[float]]:
        """The Dice of each target, by its row in tables, case by case. Raises TransplantError where logits overflow."""
        scores = [dice(case.reference, self.labels(case.image), targets, ignore) for case in cases]
        return {target.row: [score[target.row] for score in scores] for target in targets}


def dice(reference: torch.Tensor, labels: torch.Tensor, targets: Sequence[Target],
         ignore: int | None = None) -> dict[str, float]:
    """2 |A and B| / (|A| + |B|) of each target, by its row in tables, as `evaluation.score` gives it: NaN where it is
    in neither label map, and without the voxels that the reference marks with the ignore label.

    All from one count of how often each pair of values occurs: label maps are large, and structures many.
    """
    values = max(int(labels.max()), *(max(target.prediction) for target in targets)) + 1
    known = max(int(reference.max()), ignore or 0, *(max(target.reference) for target in targets)) + 1
    pairs = reference.to(labels.device, torch.int64).reshape(-1) * values + labels.reshape(-1)
    counts = torch.bincount(pairs, minlength=known * values).reshape(known, values).cpu().numpy()
    if ignore is not None:
        counts[ignore] = 0
    result = {}
    for target in targets:
        of_reference, of_prediction = sorted(set(target.reference)), sorted(set(target.prediction))
        sizes = counts[of_reference].sum() + counts[:, of_prediction].sum()
        both = counts[np.ix_(of_reference, of_prediction)].sum()
        result[target.row] = float(2 * both / sizes) if sizes else np.nan
    return result
