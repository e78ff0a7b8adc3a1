"""The models that steps of a merge look at, made on the spot."""
from collections.abc import Sequence
from pathlib import Path

import torch

from nnunet_transplant.experts import Experts
from nnunet_transplant.heads import join
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.volumes import Patch, Volumes, open_patches


def equal_weights(models: Sequence[object]) -> list[float]:
    return [1 / len(models)] * len(models)


def experts_with(folders: Sequence[Path], patches: Sequence[Patch]) -> Experts:
    """The models of these folders, to be merged with equal weights."""
    trained = [open_model(folder) for folder in folders]
    return Experts(trained, [model.tensors() for model in trained], join(trained, equal_weights(trained)),
                   trained[0].trainer, patches)


def experts_of(folders: Sequence[Path], volumes: Volumes) -> Experts:
    return experts_with(folders, open_patches(volumes, open_model(folders[0])))


def open_model(folder: Path) -> TrainedModel:
    return open_models(folder)[0]


def with_merged_heads(experts: Experts) -> dict[str, torch.Tensor]:
    """The first model's tensors, but the merged heads: what a network with the merged labels can load."""
    return {**experts.tensors[0], **experts.heads(equal_weights(experts.models))}
