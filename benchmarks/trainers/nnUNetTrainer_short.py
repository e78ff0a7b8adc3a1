"""Stock nnU-Net, only shorter, for experiments without a GPU: nnUNetTrainer_4epochs_125iterations_NoMirroring and so on
for all numbers. nnU-Net looks trainers up with hasattr(module, name)."""
import re

import torch
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring


def __getattr__(name: str) -> type[nnUNetTrainerNoMirroring]:
    match = re.fullmatch(r"nnUNetTrainer_(\d+)epochs_(\d+)iterations_NoMirroring", name)
    if match is None:
        raise AttributeError(name)
    epochs, iterations = int(match[1]), int(match[2])

    class Short(nnUNetTrainerNoMirroring):
        def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                     device: torch.device = torch.device("cuda")):  # noqa: B008 - nnU-Net's own signature
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch = epochs, iterations
            self.num_val_iterations_per_epoch = iterations // 5
    Short.__name__ = Short.__qualname__ = name
    return Short
