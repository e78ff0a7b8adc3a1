from nnunet_transplant.trainers.nnUNetTrainerStable import nnUNetTrainerStable
from nnunet_transplant.training import variants_of


class nnUNetTrainerStableDemo(nnUNetTrainerStable):
    """nnUNetTrainerStable with few and larger steps, for the demo's small volumes on a CPU."""
    epochs = 10
    iterations_per_epoch = 50
    learning_rate = 5e-3
    mirroring = False  # left is not right: the liver lies on one side


__getattr__ = variants_of(nnUNetTrainerStableDemo)
