from nnunet_transplant.training import TransplantTrainer, variants_of


class nnUNetTrainerPlastic(TransplantTrainer):
    """The paper's conventional counterpart: large batch, no dropout, low learning rate (U-Net Transplant, Table 1)."""
    effective_batch_size = 8
    learning_rate = 1e-4


__getattr__ = variants_of(nnUNetTrainerPlastic)
