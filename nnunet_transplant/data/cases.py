"""The labelled cases of a raw nnU-Net dataset, its folds, and which of its cases somebody chooses."""
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import parse_json, read_json
from nnunet_transplant.labels import check_dataset_json
from nnunet_transplant.task_vector import RECORD

Splits = list[dict[str, list[str]]]


@dataclass(frozen=True)
class Cases:
    """Cases of a raw dataset."""
    dataset: str
    dataset_json: dict[str, Any]
    files: dict[str, dict[str, Any]]  # case -> {"images": the files of its channels, "label": path}

    def chosen(self, cases: Sequence[str], labelled: bool = True) -> "Cases":
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


# ---------------------------------------------------------------------------------------------------------------------
# Datasets

def nnunet_folder(variable: str) -> Path:
    if not os.environ.get(variable):
        raise TransplantError(f"the environment variable {variable} is not set (see nnU-Net's setting_up_paths.md)")
    return Path(os.path.abspath(os.environ[variable]))


def dataset_name(dataset: str | int, flag: str = "-d") -> str:
    """Dataset004_Hippocampus of itself or of 4. Raises TransplantError for an unknown id and for what is no name."""
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        what = str(error).partition(". ")[0].partition("\n")[0]
        raise TransplantError(f"{flag} {dataset}: {what} (give a name such as Dataset004_Hippocampus or its id)"
                              ) from error
    if not re.match(r"Dataset\d{3}_", name):
        raise TransplantError(f"{flag} {dataset}: '{name}' is no dataset name of nnU-Net: they are like "
                              "Dataset004_Hippocampus")
    return name


def open_cases(dataset: str | int) -> Cases:
    """All training cases of a dataset, given by its name or id as to -d. Raises TransplantError where it is not there,
    or its dataset.json is not as nnU-Net wants it."""
    raw, name = nnunet_folder("nnUNet_raw"), dataset_name(dataset)
    path = raw / name / "dataset.json"
    if not path.is_file():
        raise TransplantError(f"-d {dataset}: nnUNet_raw has no dataset {name} ({path} is missing); images and labels "
                              "are read from there")
    dataset_json = read_json(path)
    _check_raw_dataset_json(dataset_json, path)
    if "dataset" not in dataset_json and not (raw / name / "imagesTr").is_dir():
        raise TransplantError(f"{raw / name} has no imagesTr")
    files = get_filenames_of_train_images_and_targets(str(raw / name), dict(dataset_json))
    return Cases(name, dataset_json, {str(case): dict(files[case]) for case in sorted(files)})


def _check_raw_dataset_json(content: dict[str, Any], path: Path) -> None:
    check_dataset_json(content, str(path), RECORD)
    if not isinstance(content.get("file_ending"), str):
        raise TransplantError(f"{path} has no 'file_ending' such as .nii.gz")
    entries = content.get("dataset", {})
    if not (isinstance(entries, dict) and all(
            isinstance(entry, dict) and isinstance(entry.get("label"), str) and _are_names(entry.get("images"))
            for entry in entries.values())):
        raise TransplantError(f"'dataset' in {path} must give each case its 'images', a list of files, and its 'label'")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# ---------------------------------------------------------------------------------------------------------------------
# Folds

def open_splits(dataset: str) -> Splits | None:
    """The folds of a dataset, where its splits_final.json says some. Raises TransplantError as `read_splits` does."""
    path = nnunet_folder("nnUNet_preprocessed") / dataset / "splits_final.json"
    return read_splits(path) if path.is_file() else None


def read_splits(path: Path) -> Splits:
    """The folds in a splits_final.json, which people write by hand. Raises TransplantError for what is no list of
    folds, each with its lists of cases 'train' and 'val'. Which cases exist is not asked."""
    folds = read_json(path, list)
    if not folds:
        raise TransplantError(f"{path} holds no fold")
    for number, fold in enumerate(folds):
        if not (isinstance(fold, dict) and _are_names(fold.get("train")) and _are_names(fold.get("val"))):
            raise TransplantError(f"fold {number} in {path} must have two lists of cases, 'train' and 'val'")
    return [{part: fold[part] for part in ("train", "val")} for fold in folds]


def new_splits(cases: Sequence[str]) -> Splits:
    """nnU-Net's own five folds of these cases: seeded, so always the same. Raises TransplantError below 5 cases."""
    if len(cases) < 5:
        raise TransplantError(f"nnU-Net cannot split fewer than 5 cases into its 5 folds, here are {len(cases)}")
    return [{part: [str(case) for case in fold[part]] for part in ("train", "val")}
            for fold in generate_crossval_split(sorted(cases), seed=12345, n_splits=5)]


def splits_of_cases(splits: Splits, cases: Sequence[str]) -> tuple[Splits, bool]:
    """Every fold without the cases that were not chosen, or a new split of the chosen ones if that would leave a fold
    with nothing to train or validate on; and whether it is a new one.

    Raises TransplantError if a new split has fewer than 5 cases."""
    chosen = set(cases)
    kept = [{part: [case for case in fold[part] if case in chosen] for part in ("train", "val")} for fold in splits]
    if all(fold["train"] and fold["val"] for fold in kept):
        return kept, False
    return new_splits(cases), True


# ---------------------------------------------------------------------------------------------------------------------
# Which cases

def choose_cases(cases: str | os.PathLike | Sequence[str], all_cases: Sequence[str],
                 splits: Splits | None) -> list[str]:
    """Sorted case ids: from a file (see `read_case_list`), from `train:K` or `val:K` (fold K of `splits`), or a
    sequence of ids as it is.

    Raises TransplantError for a missing file or fold, no case at all, and ids that are not in `all_cases`."""
    chosen: Sequence[str]
    if isinstance(cases, (str, os.PathLike)):
        fold = re.fullmatch(r"(train|val):(\d+)", str(cases))
        chosen = _of_fold(str(cases), splits, fold[1], int(fold[2])) if fold else read_case_list(Path(cases))
    else:
        chosen = cases
    unknown = sorted(set(chosen) - set(all_cases))
    if unknown:
        raise TransplantError(f"{len(unknown)} of the chosen cases are not in the dataset: {listed(unknown)}")
    if not chosen:
        raise TransplantError("no case was chosen")
    return sorted(set(chosen))


def _of_fold(cases: str, splits: Splits | None, part: str, fold: int) -> list[str]:
    if splits is None:
        raise TransplantError(f"-cases {cases}: the dataset has no splits_final.json, nnU-Net writes it when the "
                              "first fold is trained")
    if fold >= len(splits):
        raise TransplantError(f"-cases {cases}: the dataset has {len(splits)} folds, counted from 0")
    return splits[fold][part]


def spread(names: Sequence[str], count: int) -> list[str]:
    """So many of the names, spread evenly. Raises TransplantError below one."""
    if count < 1:
        raise TransplantError(f"-n_cases must be at least 1, not {count}")
    step = max(1.0, len(names) / count)
    return [names[int(i * step)] for i in range(min(count, len(names)))]


def evaluation_cases(dataset: str | int, fold: str | int, cases: str | None = None,
                     n_cases: int | None = None) -> Cases:
    """The validation cases of a fold, or with fold "all" every case of imagesTr, or those that `cases` chooses; of them
    n_cases, spread evenly. Raises TransplantError where the dataset, the fold or a file is not there."""
    found = open_cases(dataset)
    if cases is not None:
        chosen = choose_cases(cases, list(found.files), open_splits(found.dataset))
    else:
        chosen = list(found.files) if str(fold) == "all" else _validation_cases(found.dataset, fold)
    if not chosen:
        raise TransplantError(f"there is no case to evaluate: {found.dataset} has none in fold {fold}")
    return found.chosen(chosen if n_cases is None else spread(sorted(chosen), n_cases))


def _validation_cases(dataset: str, fold: str | int) -> list[str]:
    if not str(fold).isdecimal():
        raise TransplantError(f"-f must be the number of a fold or all, not {fold}")
    splits = open_splits(dataset)
    if splits is None:
        raise TransplantError(f"fold {fold} is unknown, {dataset} has no splits_final.json: nnU-Net writes it when the "
                              "first fold is trained. Use -f all for all cases")
    if int(fold) >= len(splits):
        raise TransplantError(f"{dataset} has no fold {fold}: its splits_final.json holds folds 0 to {len(splits) - 1}")
    return [str(case) for case in splits[int(fold)]["val"]]


def read_case_list(path: Path) -> list[str]:
    """The ids in a file: one on each line, or a JSON list; UTF-8 or, with its byte-order mark, UTF-16, as Windows
    writes them. Raises TransplantError for a missing file and for what is neither."""
    if not path.is_file():
        raise TransplantError(f"-cases: there is no file {path}. Give a file with one case id per line, or a fold of "
                              f"the dataset as train:0 or val:0")
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise TransplantError(f"-cases: {path} is not text in UTF-8: save it as such") from error
    if not text.lstrip().startswith("["):
        ids = [line.strip() for line in text.splitlines() if line.strip()]
        if any(not each.isprintable() for each in ids):  # UTF-16 without its mark, or no text at all
            raise TransplantError(f"-cases: {path} is not text in UTF-8: save it as such")
        return ids
    ids = parse_json(text, f"-cases: {path}", list)
    if not _are_names(ids):
        raise TransplantError(f"-cases: {path} must list case ids, each in quotes")
    return ids


def listed(items: Sequence[str], most: int = 5) -> str:
    items = [str(item) for item in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
