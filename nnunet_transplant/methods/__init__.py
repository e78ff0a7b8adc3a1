"""Merging methods, one file per family. Each is a function that declares itself: see `registry.method`."""
# isort: off
from nnunet_transplant.methods import linear, ties, sparse, consensus, spectral, geometric  # noqa: F401 - each registers
from nnunet_transplant.methods import fisher, regmean, refit, coefficients, best  # noqa: F401 - its methods, in this order
# isort: on
from nnunet_transplant.methods.registry import METHODS, Method, method

__all__ = ["METHODS", "Method", "method"]
