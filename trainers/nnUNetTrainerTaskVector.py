from nnunet_transplant.training import TaskVectorTrainer, variants_of


class nnUNetTrainerTaskVector(TaskVectorTrainer):
    """Fine-tuning of a task vector tau = theta - theta_0 on a frozen base given by -pretrained_weights."""


__getattr__ = variants_of(nnUNetTrainerTaskVector)
