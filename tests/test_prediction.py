"""Several windows at a time against nnU-Net's own predictor, window by window."""
from pathlib import Path

import pytest
import torch
from factory import small_plans, write_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import BatchPredictor, predictor


@pytest.mark.parametrize("shape", [(16, 16, 16), (9, 30, 21), (35, 16, 40)])
@pytest.mark.parametrize("mirroring", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_batches_of_windows_give_the_same_logits(tmp_path: Path, dim: int, mirroring: bool,
                                                 shape: tuple[int, ...]) -> None:
    plans = small_plans(dim)
    next(iter(plans["configurations"].values()))["batch_size"] = 11  # does not divide any number of windows here
    models = open_models(write_model(tmp_path / "model", plans=plans, axes=tuple(range(dim))))
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    expected, found = (predictor(models, torch.device("cpu"), mirroring=mirroring, progress_bar=False, kind=kind)
                       .predict_logits_from_preprocessed_data(image) for kind in (nnUNetPredictor, BatchPredictor))
    assert found.dtype == expected.dtype == torch.half and found.shape == expected.shape == (3, *shape)
    assert expected.std() > 0.01
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-3, atol=2e-3)  # sums of halves
