from nnunet_transplant.training import TransplantTrainer, variants_of


class nnUNetTrainerStable(TransplantTrainer):
    """Pre-training into a wide minimum: small batch, dropout, high learning rate (U-Net Transplant, Table 1)."""
    effective_batch_size = 4
    learning_rate = 1e-3
    dropout = 0.5


__getattr__ = variants_of(nnUNetTrainerStable)
