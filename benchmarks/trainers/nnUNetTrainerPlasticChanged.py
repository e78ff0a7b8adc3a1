"""nnUNetTrainerPlastic with one of the three things changed that make it nnUNetTrainerStable, and one of these that
keeps a checkpoint of every epoch; both as the published code of U-Net Transplant trains them, with dropout 0.1; batches
of four by nnU-Net's own optimiser; and task vectors of zero, which are new heads on a base that stays as it is. Each
with variants of any length."""
from collections.abc import Callable

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_transplant.training import TaskVectorTrainer, TransplantTrainer, variants_of


class nnUNetTrainerPlasticBatch4(TransplantTrainer):
    effective_batch_size = 4
    learning_rate = 1e-4


class nnUNetTrainerPlasticDropout(TransplantTrainer):
    effective_batch_size = 8
    learning_rate = 1e-4
    dropout = 0.5


class nnUNetTrainerPlasticRate(TransplantTrainer):
    effective_batch_size = 8
    learning_rate = 1e-3


class nnUNetTrainerPlasticRateKept(nnUNetTrainerPlasticRate):
    def on_epoch_end(self) -> None:
        super().on_epoch_end()
        self.save_checkpoint(f"{self.output_folder}/checkpoint_epoch_{self.current_epoch}.pth")


class nnUNetTrainerStablePublished(TransplantTrainer):
    effective_batch_size = 4
    learning_rate = 1e-3
    dropout = 0.1


class nnUNetTrainerPlasticPublished(TransplantTrainer):
    effective_batch_size = 8
    learning_rate = 1e-4
    dropout = 0.1


class nnUNetTrainerStockBatch4(TransplantTrainer):
    effective_batch_size = 4
    learning_rate = 1e-2
    gradient_clip = 12.0

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        self.weight_decay = 3e-5
        return nnUNetTrainer.configure_optimizers(self)


class nnUNetTrainerHeadsOnly(TaskVectorTrainer):
    def on_train_start(self) -> None:
        super().on_train_start()
        for p in self.optimizer.param_groups[0]["params"]:
            p.requires_grad_(False)


def __getattr__(name: str) -> Callable:
    for trainer in (nnUNetTrainerPlasticBatch4, nnUNetTrainerPlasticDropout, nnUNetTrainerPlasticRateKept,
                    nnUNetTrainerPlasticRate,
                    nnUNetTrainerStablePublished, nnUNetTrainerPlasticPublished, nnUNetTrainerStockBatch4,
                    nnUNetTrainerHeadsOnly):
        if name.startswith(trainer.__name__):
            return variants_of(trainer)(name)
    raise AttributeError(name)
