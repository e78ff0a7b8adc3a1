"""The labelled cases of a raw nnU-Net dataset."""
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_transplant.errors import TransplantError


@dataclass(frozen=True)
class Cases:
    """Cases of a raw dataset."""
    dataset: str
    dataset_json: dict[str, Any]
    files: dict[str, dict[str, Any]]  # case -> {"images": one path for each channel, "label": path}

    def chosen(self, cases: list[str], labelled: bool = True) -> "Cases":
        """Only these cases. Raises TransplantError for one that the dataset does not have or a file that is missing;
        label maps may be, unless `labelled`."""
        for case in cases:
            if case not in self.files:
                raise TransplantError(f"case {case} has no images in {self.dataset} of nnUNet_raw")
            files = [*self.files[case]["images"], *([self.files[case]["label"]] if labelled else [])]
            missing = [path for path in files if not Path(path).is_file()]
            if missing:
                raise TransplantError(f"case {case} of {self.dataset}: there is no file {missing[0]}")
        return replace(self, files={case: self.files[case] for case in cases})


def nnunet_folder(variable: str) -> Path:
    if not os.environ.get(variable):
        raise TransplantError(f"the environment variable {variable} is not set (see nnU-Net's setting_up_paths.md)")
    return Path(os.path.abspath(os.environ[variable]))


def open_cases(dataset: str | int) -> Cases:
    """All training cases of a dataset, given by its name or id as to -d. Raises TransplantError where it is not there.
    """
    raw = nnunet_folder("nnUNet_raw")
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        what = str(error).partition(". ")[0].partition("\n")[0]
        raise TransplantError(f"-d {dataset}: {what} (give a name such as Dataset004_Hippocampus or its id)") from error
    if not (raw / name / "dataset.json").is_file():
        raise TransplantError(f"-d {dataset}: nnUNet_raw has no dataset {name} ({raw / name / 'dataset.json'} is "
                              "missing); images and labels are read from there")
    dataset_json = load_json(str(raw / name / "dataset.json"))
    if "dataset" not in dataset_json and not (raw / name / "imagesTr").is_dir():
        raise TransplantError(f"{raw / name} has no imagesTr")
    files = get_filenames_of_train_images_and_targets(str(raw / name), dict(dataset_json))
    return Cases(name, dataset_json, {str(case): dict(files[case]) for case in sorted(files)})


def open_splits(dataset: str) -> list[dict[str, list[str]]] | None:
    """nnU-Net's folds of a dataset, where nnU-Net has written them yet."""
    path = nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json"
    return load_json(str(path)) if path.is_file() else None
