"""Settings as files, of the papers' experiment at its toy scale."""
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from experiment import BENCHMARKS, row_of

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[2].parent / "shared" / "data"
AMOS = ("spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach", "arota", "postcava",
        "pancreas", "right adrenal gland", "left adrenal gland", "duodenum", "bladder", "prostate/uterus")
BTCV = ("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
        "inferior vena cava", "portal vein and splenic vein", "pancreas", "right adrenal gland", "left adrenal gland")
JAWS = ("Lower Jawbone", "Upper Jawbone", "Left Inferior Alveolar Canal", "Right Inferior Alveolar Canal",
        "Left Maxillary Sinus", "Right Maxillary Sinus", "Pharynx", "Bridge", "Crown", "Implant")
TEETH = ("Central Incisor", "Lateral Incisor", "Canine", "First Premolar", "Second Premolar", "First Molar",
         "Second Molar", "Third Molar (Wisdom Tooth)")
SIDES = ("Upper Right", "Upper Left", "Lower Left", "Lower Right")  # 11 to 18, 21 to 28, ...; 19 and 20 are no teeth
TOOTHFAIRY = (*JAWS, *(name for side in SIDES for name in (*(f"{side} {tooth}" for tooth in TEETH), f"NA {side} 9",
                                                           f"NA {side} 10")))[:48]
PAPERS = {"abdomen": ((AMOS, 7), (BTCV, 10)), "maxillofacial": ((TOOTHFAIRY, 7), (TOOTHFAIRY, 10))}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_own_datasets(experiment, tmp_path: Path, documentation: Path, monkeypatch: pytest.MonkeyPatch,
                                 name: str) -> None:
    """Their files, on miniatures with their label names: boxes side by side."""
    file = BENCHMARKS / "settings" / f"{name}.json"
    told = json.loads(file.read_text())
    for part, (labels, cases) in zip(("base", "tasks"), PAPERS[name], strict=True):
        write_boxes(tmp_path / "data" / told[part]["dataset"], labels, cases)
    monkeypatch.setattr(sys, "argv", ["transplant_experiment.py", str(tmp_path / "work"), "--scale", "toy",
                                      "--setting", str(file), "-data", str(tmp_path / "data"),
                                      "-documentation", str(documentation)])
    experiment.main()
    check_setting(documentation, told)


@pytest.mark.skipif(not (DATA / "Dataset005_MouseBrain").exists(), reason=f"no mouse brains in {DATA}")
def test_the_mouse_brains(experiment, tmp_path: Path, documentation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file, with two structures and few of its animals."""
    told = json.loads((BENCHMARKS / "settings" / "mouse.json").read_text())
    told["base"]["train"] = told["base"]["train"][:2]
    for part, count in (("train", 2), ("test", 1), ("search", 1)):
        told["tasks"][part] = told["tasks"][part][:count]
    told["tasks"]["structures"] = dict(list(told["tasks"]["structures"].items())[:2])
    (tmp_path / "mouse.json").write_text(json.dumps(told))
    source, raw = (folder / "Dataset005_MouseBrain" for folder in (DATA, tmp_path / "data"))
    for case in (*told["base"]["train"], *(case for part in ("train", "test", "search")
                                           for case in told["tasks"][part])):
        for file in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            (raw / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, raw / file)
    description = json.loads((source / "dataset.json").read_text()) | {"numTraining": 6}
    (raw / "dataset.json").write_text(json.dumps(description))
    monkeypatch.setattr(sys, "argv", ["transplant_experiment.py", str(tmp_path / "work"), "--scale", "toy",
                                      "--setting", str(tmp_path / "mouse.json"), "-data", str(tmp_path / "data"),
                                      "-documentation", str(documentation)])
    experiment.main()
    check_setting(documentation, told)


def check_setting(documentation: Path, told: Mapping) -> None:
    """The merges of the first two tasks have all their numbers, and the paper's stand beside them."""
    tasks = ", ".join(list(told["tasks"]["structures"])[:2])
    dice = [float(cell) for cell in row_of(documentation, "Stable", tasks)]  # ten merges, joint, experts
    assert len(dice) == 12 and all(0 <= each <= 1 for each in dice)
    for row in told.get("paper", {}).get("Stable", {}):
        assert row_of(documentation, "Stable, the paper's", row)


def write_boxes(folder: Path, labels: Sequence[str], cases: int) -> None:
    """A dataset in nnU-Net's raw format: a grid of boxes of 8 voxels, a label each, in noise."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    places = np.stack(np.meshgrid(*[np.arange(32) // 8] * 3, indexing="ij"))
    box = places[0] + 4 * places[1] + 16 * places[2]
    for number in range(cases):
        rng = np.random.default_rng(number)
        reference = np.where(box < len(labels), box + 1, 0).astype(np.uint8)
        image = (reference % 7 + rng.normal(0, 0.2, box.shape)).astype(np.float32)
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), folder / "imagesTr" / f"case_{number:02d}_0000.nii.gz")
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(reference), folder / "labelsTr" / f"case_{number:02d}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "labels": {"background": 0, **{name: i for i, name in enumerate(labels, 1)}},
        "numTraining": cases, "file_ending": ".nii.gz"}))
