"""Which models can merge."""
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from factory import base_network, small_plans, write_model
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.mergeable import _TURNED, check_mergeable
from nnunet_transplant.model_folder import open_models


def pair(tmp_path: Path, change: Callable[[dict], object], **dataset: Any) -> list:
    """Two folds of one base, the second with other plans."""
    plans = small_plans()
    change(plans)
    base = base_network()
    one = write_model(tmp_path / "one", base=base)
    other = write_model(tmp_path / "other", base=base, plans=plans, **dataset)
    return [open_models(one)[0], open_models(other)[0]]


@pytest.mark.parametrize(("names", "same"), [
    ({"0": "mri"}, True), ({"0": "MRI "}, True), ({"0": "T1"}, False), ({"0": "CT"}, False)])
def test_channel_names(tmp_path: Path, names: dict[str, str], same: bool) -> None:
    models = pair(tmp_path, lambda _: None, channel_names=names)
    if same:
        check_mergeable(models)
        return
    with pytest.raises(TransplantError, match=r"(?s)channels: \['MRI'\] .*If these channels are the same, pass "
                                              "--same_channels"):
        check_mergeable(models)
    check_mergeable(models, channels=False)


def test_same_channels_is_recorded_and_repeated(tmp_path: Path, run: Callable) -> None:
    models = [model.folder for model in pair(tmp_path, lambda _: None, channel_names={"0": "T1"})]
    status, _, err = run("merge", "-m", *models, "-o", tmp_path / "merged")
    assert status == 1 and "--same_channels" in err
    assert run("merge", "-m", *models, "-o", tmp_path / "merged", "--same_channels")[0] == 0
    assert run("merge", "-from", tmp_path / "merged", "-o", tmp_path / "again")[0] == 0
    both = [(tmp_path / name / "fold_all" / "checkpoint_final.pth").read_bytes() for name in ("merged", "again")]
    assert both[0] == both[1]


def test_more_channels_of_other_names_are_no_matter_of_names(tmp_path: Path) -> None:
    models = [open_models(write_model(tmp_path / name, channel_names=names))[0]
              for name, names in (("one", {"0": "MRI"}), ("two", {"0": "T1", "1": "T2"}))]
    for channels in (True, False):
        with pytest.raises(TransplantError, match="cannot merge; they differ in") as raised:
            check_mergeable(models, channels=channels)
        assert "--same_channels" not in str(raised.value)


def test_readers_that_agree_are_those_that_read_the_same(tmp_path: Path) -> None:
    """A file whose axes run against RAS and LPS, read by every reader of volumes."""
    voxels = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 2.0, 3.0))
    path = str(tmp_path / "image.nii.gz")
    for direction in ((0, 1, 0, -1, 0, 0, 0, 0, -1), (1, 0, 0, 0, 1, 0, 0, 0, 1)):
        image.SetDirection(tuple(map(float, direction)))
        SimpleITK.WriteImage(image, path)
        read = {name: recursive_find_reader_writer_by_name(name)().read_images([path]) for name in _TURNED}
        for one, other in itertools.combinations(_TURNED, 2):
            equal = read[one][0].shape == read[other][0].shape and np.array_equal(read[one][0], read[other][0])
            assert equal == (_TURNED[one] == _TURNED[other]), (one, other)
            if equal:
                np.testing.assert_allclose(read[one][1]["spacing"], read[other][1]["spacing"], rtol=1e-6)


@pytest.mark.parametrize(("reader", "merges"), [
    ("SimpleITKIO", True), ("NibabelIO", True), ("NibabelIOWithReorient", False), ("SimpleITKIOWithReorient", False),
    ("Tiff3DIO", False), ("ReaderOfSomebody", False)])
def test_readers(tmp_path: Path, reader: str, merges: bool) -> None:
    models = pair(tmp_path, lambda plans: plans.update(image_reader_writer=reader))
    if merges:
        check_mergeable(models)
    else:
        with pytest.raises(TransplantError, match=f"image_reader_writer: SimpleITKIO | {reader}"):
            check_mergeable(models)


def of_configuration(**changes: Any) -> Callable[[dict], None]:
    return lambda plans: plans["configurations"]["3d_fullres"].update(changes)


def of_network(**changes: Any) -> Callable[[dict], None]:
    return lambda plans: plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(changes)


SAME = {"batch_size": of_configuration(batch_size=7), "patch_size": of_configuration(patch_size=[32, 32, 32]),
        "batch_dice": of_configuration(batch_dice=True), "data_identifier": of_configuration(data_identifier="other"),
        "export": of_configuration(resampling_fn_probabilities_kwargs={"is_seg": False, "order": 0}),
        "name": lambda plans: plans.update(plans_name="mine", dataset_name="Dataset001_Mine"),
        "statistics without CT": lambda plans: plans.update(
            foreground_intensity_properties_per_channel={"0": {"mean": 7}}),
        "inplace": of_network(nonlin_kwargs={"inplace": False})}
OTHER = {"spacing": of_configuration(spacing=[1, 1, 2]), "order": of_configuration(
             resampling_fn_data_kwargs={"is_seg": False, "order": 1}),
         "mask": of_configuration(use_mask_for_norm=[True]),
         "normalisation": of_configuration(normalization_schemes=["RescaleTo01Normalization"]),
         "transposed": lambda plans: plans.update(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0]),
         "nonlinearity": of_network(nonlin="torch.nn.ReLU"), "slope": of_network(nonlin_kwargs={"negative_slope": 0.3}),
         "epsilon": of_network(norm_op_kwargs={"eps": 0.1, "affine": True})}


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_number_merges(tmp_path: Path, name: str) -> None:
    check_mergeable(pair(tmp_path, SAME[name]))


@pytest.mark.parametrize("name", OTHER)
def test_what_changes_numbers_does_not(tmp_path: Path, name: str) -> None:
    with pytest.raises(TransplantError, match="cannot merge; they differ in"):
        check_mergeable(pair(tmp_path, OTHER[name]))


@pytest.mark.parametrize("scheme", ["CTNormalization", "NormalizationOfSomebody"])
def test_statistics_count_where_a_normalisation_may_use_them(tmp_path: Path, scheme: str) -> None:
    models = []
    for name, mean in (("one", 1.0), ("other", 2.0)):
        plans = small_plans()
        plans["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme]
        plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": mean}}
        models.append(open_models(write_model(tmp_path / name, plans=plans))[0])
    with pytest.raises(TransplantError, match="CT intensity statistics"):
        check_mergeable(models)
