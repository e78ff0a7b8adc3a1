"""Merged models scored in memory: one network that any weights are written into, cases that are preprocessed once, and
no files."""
import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_transplant.architecture import bare
from nnunet_transplant.data.cases import Cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import has_regions
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import TrainedModel
from nnunet_transplant.prediction import HALF_PRECISION, BatchPredictor, predictor
from nnunet_transplant.targets import Target
from nnunet_transplant.volumes import preprocess


@dataclass(frozen=True)
class LabelledCase:
    """A case of a dataset as a model's plans preprocess it."""
    name: str
    image: torch.Tensor      # (channels, x, y, z), float32
    reference: torch.Tensor  # (x, y, z), int16: the dataset's own label values, resampled as nnU-Net does for training


def open_labelled_cases(cases: Cases, model: TrainedModel, progress: bool = False) -> list[LabelledCase]:
    """Cases that have label maps, sorted by name, preprocessed by the model's plans.

    Raises TransplantError for channels that do not fit, second stages of a cascade, and files that nnU-Net cannot read.
    """
    cases = replace(cases, files=dict(sorted(cases.files.items())))
    bar = tqdm(preprocess([cases], model), desc="reading cases", unit="case", delay=3, disable=not progress,
               total=len(cases.files))
    return [LabelledCase(name, torch.from_numpy(image), torch.from_numpy(values.astype(np.int16).clip(min=0)))
            for name, (image, values, _) in zip(cases.files, bar, strict=True)]  # -1: outside of the crop


class MergedNetwork:
    """The network that a merger makes: built once, its weights replaced in place.

    merged: what the merger makes of its recipe; labels and all else but the tensors are the same for any weights that
    are not negative. Raises TransplantError for what the merger refuses.
    """

    def __init__(self, merger: Merger, device: torch.device, step_size: float = 0.5, mirroring: bool = False) -> None:
        self.merger = merger
        self.merged = merger.merge()
        self.predictor = predictor(self.merged, device, step_size, mirroring, progress_bar=False, kind=BatchPredictor)
        network = bare(self.predictor.network).to(device).eval()
        network.load_state_dict(self.merged.state_dict)
        state = network.state_dict()
        self.tensors = {name: state[name] for name in merger.models[0].layout.names}  # not copies: the network's own

    def set(self, weights: Sequence[float] | None, parameters: Mapping[str, Any] | None = None) -> None:
        """Write what merging gives with these weights (one for each group, none negative) and these options, beside
        those of the recipe, into the network. Raises TransplantError for what the merger refuses."""
        merged = self.merger.tensors(weights, **(parameters or {}))
        for name, tensor in self.tensors.items():
            tensor.copy_(merged[name])

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
