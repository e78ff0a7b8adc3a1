"""Channels are counted as nnU-Net's own reader returns them, whatever the files."""
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from factory import dataset_json, small_plans
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from skimage import io

from nnunet_transplant.data.images import channels_in_file, check_images
from nnunet_transplant.errors import TransplantError


def write(path: Path, shape: tuple[int, ...], vectors: bool = False) -> Path:
    voxels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    if path.suffix in (".png", ".tif"):
        io.imsave(path, voxels, check_contrast=False)
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels, isVector=vectors), path)
    return path


@pytest.mark.parametrize(("name", "shape", "reader"), [
    ("grey.png", (6, 7), NaturalImage2DIO), ("rgb.png", (6, 7, 3), NaturalImage2DIO),
    ("rgba.png", (6, 7, 4), NaturalImage2DIO), ("rgb.tif", (6, 7, 3), NaturalImage2DIO),
    ("volume.tif", (5, 6, 7), Tiff3DIO), ("slice.nii.gz", (6, 7), SimpleITKIO),
    ("volume.nii.gz", (5, 6, 7), SimpleITKIO), ("volume.nii.gz", (5, 6, 7), NibabelIO),
    ("four.nii.gz", (4, 5, 6, 7), SimpleITKIO), ("two.nrrd", (2, 5, 6, 7), SimpleITKIO)])
@pytest.mark.filterwarnings("ignore::UserWarning:skimage")
def test_as_many_as_the_reader_returns(tmp_path: Path, name: str, shape: tuple[int, ...],
                                       reader: type[BaseReaderWriter]) -> None:
    path = write(tmp_path / name, shape)
    assert channels_in_file(path, reader) == len(reader().read_images([str(path)])[0])


def test_vectors_in_a_volume_are_what_the_reader_makes_of_them(tmp_path: Path) -> None:
    path = write(tmp_path / "vectors.nrrd", (5, 6, 7, 3), vectors=True)
    assert channels_in_file(path, SimpleITKIO) == len(SimpleITKIO().read_images([str(path)])[0])


def test_a_file_may_hold_all_channels_or_one(tmp_path: Path) -> None:
    rgb, grey = write(tmp_path / "rgb.png", (6, 7, 3)), write(tmp_path / "grey.png", (6, 7))
    plans = small_plans(2) | {"image_reader_writer": "NaturalImage2DIO"}
    model = dataset_json({"background": 0, "one": 1}, channel_names={"0": "R", "1": "G", "2": "B"})

    def check(*images: Path) -> None:
        check_images({"case": list(map(str, images))}, ".png", "FOLDER", "the model", plans, model)
    check(rgb)
    check(grey, grey, grey)
    for images, found in (([grey], 1), ([rgb, grey], 4)):
        with pytest.raises(TransplantError, match=f"the model takes 3 channels, but case case of FOLDER has {found}"):
            check(*images)
    with pytest.raises(TransplantError, match="NaturalImage2DIO, which cannot read the .nii.gz files of FOLDER"):
        check_images({}, ".nii.gz", "FOLDER", "the model", plans, model)
    (tmp_path / "rgb.png").write_bytes(b"no image")
    with pytest.raises(TransplantError, match="NaturalImage2DIO cannot read .*rgb.png"):
        check(rgb)
