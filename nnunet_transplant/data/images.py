"""Whether a model can read the images of cases: what nnU-Net's reader makes of their files."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import SimpleITK
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import channel_names

ONE_A_FILE = (NibabelIO, NibabelIOWithReorient, Tiff3DIO)  # they refuse a file of more channels


def check_images(files: Mapping[str, Sequence[str]], ending: str, where: str, who: str, plans: dict[str, Any],
                 dataset_json: dict[str, Any]) -> None:
    """Raise TransplantError unless a model can read these images and gets as many channels as it takes.

    files: of each case, in the order of the channels; `ending` is theirs. where, who: the dataset or folder, and the
    model, for the message. plans, dataset_json: the model's.
    """
    reader = PlansManager(plans).image_reader_writer_class
    if ending.lower() not in reader.supported_file_endings:
        raise TransplantError(f"{who} reads images with {reader.__name__}, which cannot read the {ending} files of "
                              f"{where}")
    wanted = len(channel_names(dataset_json))
    for case, images in files.items():
        found = sum(channels_in_file(image, reader) for image in images)
        if found != wanted:
            raise TransplantError(f"{who} takes {wanted} channel{'s' * (wanted != 1)}, but case {case} of {where} has "
                                  f"{found}")


def channels_in_file(image: str | Path, reader: type[BaseReaderWriter]) -> int:
    """How many channels the reader makes of one file: a PNG may hold three or four, a 4d NIfTI any number. Raises
    TransplantError for what it cannot read."""
    if issubclass(reader, ONE_A_FILE):
        return 1
    try:
        if issubclass(reader, SimpleITKIO):  # volumes may be large: ask their headers
            header = SimpleITK.ImageFileReader()
            header.SetFileName(str(image))
            header.ReadImageInformation()
            if header.GetNumberOfComponents() == 1:
                return header.GetSize()[3] if header.GetDimension() == 4 else 1
        return len(reader().read_images([str(image)])[0])
    except Exception as error:  # the readers meet unfit files with any exception
        raise TransplantError(f"{reader.__name__} cannot read {image} ({type(error).__name__})") from error
