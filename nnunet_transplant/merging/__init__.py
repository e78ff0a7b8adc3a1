"""Merging methods, one file per family, and the merge of trained models with any of them."""
from nnunet_transplant.merging import linear, ties  # noqa: F401 - each registers its methods
from nnunet_transplant.merging.merge import MergedModel, merge_folders, merge_models, write_merge
from nnunet_transplant.merging.registry import METHODS, Method, Parameter

__all__ = ["METHODS", "MergedModel", "Method", "Parameter", "merge_folders", "merge_models", "write_merge"]
