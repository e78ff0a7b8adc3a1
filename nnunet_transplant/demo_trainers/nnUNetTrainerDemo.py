from nnunet_transplant.trainers.nnUNetTrainerStable import nnUNetTrainerStable
from nnunet_transplant.trainers.nnUNetTrainerTaskVector import nnUNetTrainerTaskVector


class nnUNetTrainerStableDemo(nnUNetTrainerStable):
    """nnUNetTrainerStable with few and large steps, for the demo's small volumes on a CPU."""
    epochs = 10
    iterations_per_epoch = 50
    learning_rate = 5e-3
    mirroring = False  # left is not right: the liver lies on one side


class nnUNetTrainerTaskVectorDemo(nnUNetTrainerTaskVector):
    """nnUNetTrainerTaskVector with few and large steps, for the demo's small volumes on a CPU."""
    epochs = 10
    iterations_per_epoch = 15
    learning_rate = 1e-3
    head_learning_rate = 1e-2
    mirroring = False
