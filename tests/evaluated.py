"""A small dataset to evaluate models of random weights on."""
import json
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK
from factory import small_plans, write_model

from nnunet_transplant.evaluation import evaluate


def write_dataset(root: Path) -> Path:
    """Three raw cases of noise with the labels one, two and three, and splits of them."""
    folder = root / "raw" / "Dataset700_Small"
    rng = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        write_volume(folder / "imagesTr" / f"{case}_0000.nii.gz", rng.normal(size=(12, 18, 20)).astype(np.float32))
        write_volume(folder / "labelsTr" / f"{case}.nii.gz", rng.integers(0, 4, (12, 18, 20)).astype(np.uint8))
    write_json(folder / "dataset.json", {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "numTraining": 3,
                                         "labels": {"background": 0, "one": 1, "two": 2, "three": 3}})
    write_json(root / "preprocessed" / folder.name / "splits_final.json",
               [{"train": ["c"], "val": ["a", "b"]}, {"train": ["a", "b", "c"], "val": []},
                {"train": ["a"], "val": ["z"]}])
    return folder


def random_model(folder: Path, *labels: object, plans: dict | None = None, **options: object) -> Path:
    """With the intensity statistics in the plans that preprocessing wants to see."""
    plans = plans or small_plans()
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    return write_model(folder, *labels, plans=plans, **options)


def write_volume(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = SimpleITK.GetImageFromArray(array)
    volume.SetSpacing((1.0, 1.5, 2.0))
    SimpleITK.WriteImage(volume, path)


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def run(models: list[Path], output: Path, **options: object) -> pd.DataFrame:
    return evaluate(models, "Dataset700_Small", output=output, **{"device": "cpu", "step_size": 1.0, **options})
