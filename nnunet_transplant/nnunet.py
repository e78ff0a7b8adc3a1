"""nnU-Net's trainer, without what its import does to the process: its logger switches matplotlib to a backend that
shows nothing, so that the figures of a notebook which imports this package would stay away."""
import matplotlib

_use, matplotlib.use = matplotlib.use, lambda *_, **__: None
try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
finally:
    matplotlib.use = _use

__all__ = ["nnUNetTrainer"]
