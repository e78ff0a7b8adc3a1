"""Merging methods, one file per family. Each is a function that declares itself: see `registry.method`."""
from nnunet_transplant.methods import (  # noqa: F401 - each registers its methods
    coefficients,
    consensus,
    fisher,
    geometric,
    linear,
    refit,
    regmean,
    sparse,
    spectral,
    ties,
)
from nnunet_transplant.methods.registry import METHODS, Method, method

__all__ = ["METHODS", "Method", "method"]
