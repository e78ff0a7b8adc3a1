"""Fits: what comes after a merge, towards what the experts say of a few images; one file each."""
from nnunet_transplant.fitting import entries, head, polish  # noqa: F401 - each registers itself
from nnunet_transplant.fitting.registry import FITS, Fit, fit

__all__ = ["FITS", "Fit", "fit"]
