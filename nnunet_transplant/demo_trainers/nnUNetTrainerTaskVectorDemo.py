from nnunet_transplant.trainers.nnUNetTrainerTaskVector import nnUNetTrainerTaskVector
from nnunet_transplant.training import variants_of


class nnUNetTrainerTaskVectorDemo(nnUNetTrainerTaskVector):
    """nnUNetTrainerTaskVector with few and larger steps, for the demo's small volumes on a CPU."""
    epochs = 10
    iterations_per_epoch = 15
    learning_rate = 3e-4
    head_learning_rate = 1e-2
    mirroring = False


__getattr__ = variants_of(nnUNetTrainerTaskVectorDemo)
