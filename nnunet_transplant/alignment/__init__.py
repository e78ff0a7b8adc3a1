"""Aligners: which unit of one model is which of another, for models with no common base."""
from nnunet_transplant.alignment import aligners  # noqa: F401 - they register themselves
from nnunet_transplant.alignment.registry import ALIGNERS, Aligner, aligner

__all__ = ["ALIGNERS", "Aligner", "aligner"]
