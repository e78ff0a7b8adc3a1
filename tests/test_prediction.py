"""Several windows at a time, and merged models in memory, against nnU-Net's own predictor."""
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from factory import base_network, small_plans, write_model, write_volumes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_transplant import prediction
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging import merge, predict
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import BatchPredictor, WatchedPredictor, predictor


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


def test_a_watched_predictor_counts_its_windows_and_gives_the_same_logits(tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    models = open_models(write_model(tmp_path / "model", plans=small_plans(), axes=(0, 1)))
    image = torch.randn(1, 9, 30, 21, generator=torch.Generator().manual_seed(0))
    plain, watched = (predictor(models, torch.device("cpu"), progress_bar=False, kind=kind)
                      for kind in (nnUNetPredictor, WatchedPredictor))
    bars = []

    class Bar(prediction.tqdm):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(prediction, "tqdm", Bar)
    expected, found = (each.predict_logits_from_preprocessed_data(image) for each in (plain, watched))
    assert torch.equal(found, expected)
    assert [(bar.n, bar.total) for bar in bars] == [(6, 6)]  # 1 x 3 x 2 windows of 16 voxels, half a window apart


def test_a_bar_is_shown_only_where_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture) -> None:
    watched = predictor(open_models(write_model(tmp_path / "model")), torch.device("cpu"), progress_bar=False,
                        kind=WatchedPredictor)
    shown = []
    for waits in (prediction.WINDOWS_AFTER, 0.0):
        monkeypatch.setattr(prediction, "WINDOWS_AFTER", waits)
        watched.predict_logits_from_preprocessed_data(torch.zeros(1, 20, 20, 20))
        shown.append("sliding window" in capsys.readouterr().err)
    assert shown == [False, True]


# Merged models and folders of images

LABELS = {"background": 0, "A": 1, "B": 2}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, cases=2) / "imagesTr"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    plans, base = small_plans(), base_network()
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    return [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i, plans=plans, axes=(0, 1))
            for i, name in enumerate("AB")]


QUICK = {"device": "cpu", "npp": 0, "nps": 0, "step_size": 1.0, "mirroring": False}


def voxels(folder: Path) -> list[np.ndarray]:
    return [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)) for path in sorted(folder.glob("*.nii.gz"))]


@pytest.mark.parametrize("mirroring", [True, False])
def test_a_merge_predicts_as_nnunet_does_once_it_is_saved(tmp_path: Path, models: list[Path], images: Path,
                                                          mirroring: bool) -> None:
    """From memory, and merged on the fly from the models; a predictor that nnU-Net itself initialises is the judge."""
    merged = merge(models, method="ties", density=0.4)
    folder = merged.save(tmp_path / "merged")
    judge = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=mirroring, allow_tqdm=False,
                            perform_everything_on_device=False, tile_step_size=0.7)
    judge.initialize_from_trained_model_folder(str(folder), ("all",))
    (tmp_path / "judge").mkdir()
    judge.predict_from_files_sequential(str(images), str(tmp_path / "judge"))
    expected = voxels(tmp_path / "judge")
    assert len(expected) == 2 and all(each.any() for each in expected)
    options = {**QUICK, "step_size": 0.7, "mirroring": mirroring}
    for name, given, more in (("memory", merged, {}), ("saved", folder, {}),
                              ("fly", models, {"method": "ties", "density": 0.4})):
        assert predict(given, images, tmp_path / name, **options, **more) == tmp_path / name
        for found, wanted in zip(voxels(tmp_path / name), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("progress", [True, False])
def test_a_folder_is_predicted_with_nnunets_own_bar(tmp_path: Path, models: list[Path], images: Path, progress: bool,
                                                    capsys: pytest.CaptureFixture) -> None:
    merged = merge(models)
    capsys.readouterr()
    predict(merged, images, tmp_path / "out", progress=progress, **QUICK)
    assert ("100%" in capsys.readouterr().err) is progress


def test_what_is_there_may_stay_and_parts_are_parts(tmp_path: Path, models: list[Path], images: Path) -> None:
    merged, output = merge(models), tmp_path / "out"
    predict(merged, images, output, num_parts=2, part_id=1, **QUICK)
    assert [path.name for path in output.glob("case_*")] == ["case_1.nii.gz"]
    before = (output / "case_1.nii.gz").stat().st_mtime_ns
    predict(merged, images, output, continue_prediction=True, **QUICK)
    assert (output / "case_1.nii.gz").stat().st_mtime_ns == before
    assert sorted(path.name for path in output.glob("case_*")) == ["case_0.nii.gz", "case_1.nii.gz"]
    predict(merged, images, output, num_parts=2, part_id=0, save_probabilities=True, **QUICK)
    assert sorted(path.name for path in output.glob("case_0*")) == ["case_0.nii.gz", "case_0.npz", "case_0.pkl"]
    (probabilities,) = np.load(output / "case_0.npz").values()
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-2)


@pytest.mark.parametrize(("options", "message"), [
    ({"step_size": 0.0}, "-step_size must be above 0"), ({"step_size": float("nan")}, "-step_size must be above 0"),
    ({"num_parts": 2, "part_id": 2}, "-part_id must lie between 0 and 1, not 2"),
    ({"device": "tpu"}, "-device must be"), ({"input": "nowhere"}, "there is no folder nowhere"),
    ({"input": "empty"}, "empty has no image CASE_0000.nii.gz"),
    ({"models": ["nowhere"]}, "there is no model folder nowhere"), ({"method": "tise"}, "did you mean ties"),
    ({"align": "rebasin", "share": ["encoder.*"]}, "models that share only a part are several: save them")])
def test_what_cannot_be_predicted_is_refused(tmp_path: Path, models: list[Path], images: Path,
                                             monkeypatch: pytest.MonkeyPatch, options: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    arguments = {"models": models, "input": images, "output": tmp_path / "out", **QUICK, **options}
    with pytest.raises(TransplantError, match=message):
        predict(**arguments)
    assert not (tmp_path / "out").exists()


def test_logits_that_overflow_are_explained(tmp_path: Path, models: list[Path], images: Path) -> None:
    merged = merge(models)
    for name, tensor in merged["all"].state_dict.items():
        if "seg_layers" in name:
            tensor.fill_(1e6)
    with pytest.raises(TransplantError, match="beyond half precision"):
        predict(merged, images, tmp_path / "out", **QUICK)
