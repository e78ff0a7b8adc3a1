"""Merging methods, one file per family, and the merge of trained models with any of them."""
# isort: off
from nnunet_transplant.merging import linear, ties, sparse, consensus, spectral, geometric  # noqa: F401 - each
from nnunet_transplant.merging import fisher, regmean, refit, coefficients  # noqa: F401 - registers its methods, in
from nnunet_transplant.merging import align  # noqa: F401 - this order, align last: any other can follow it
# isort: on
from nnunet_transplant.merging.calibration import Volumes
from nnunet_transplant.merging.merge import (
    MergedModel,
    Recipe,
    merge_folders,
    merge_groups,
    merge_models,
    merge_shared,
    write_merge,
    write_shared,
)
from nnunet_transplant.merging.registry import METHODS, Method, Parameter, markdown_table

__all__ = ["METHODS", "MergedModel", "Method", "Parameter", "Recipe", "Volumes", "markdown_table", "merge_folders",
           "merge_groups", "merge_models", "merge_shared", "write_merge", "write_shared"]
