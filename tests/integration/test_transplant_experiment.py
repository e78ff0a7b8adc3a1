"""The papers' experiment at its toy scale, on volumes of a few spheres: it shows nothing but that it runs."""
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from commands import fork_command

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RENDERER = '''
import json, sys
from pathlib import Path
import numpy as np, SimpleITK as sitk

def write(folder, names, labels, contrast):
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.meshgrid(*[np.arange(34)] * 3, indexing="ij"))
    for number, name in enumerate(names):
        rng = np.random.default_rng([number, contrast])
        reference = np.zeros((34, 34, 34), np.uint8)
        for value in range(1, len(labels) + 1):
            centre = 17 + 9 * np.array([(value & 1) - 0.5, (value >> 1 & 1) - 0.5, (value >> 2) - 0.5])
            reference[((grid - (centre + rng.normal(0, 1, 3))[:, None, None, None]) ** 2).sum(0) < 25] = value
        image = rng.normal(0, 0.2, reference.shape) + (reference if contrast == 0 else -reference)
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.float32)), folder / "imagesTr" / f"{name}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(reference), folder / "labelsTr" / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "MRI"}, "labels": {"background": 0, **{n: i for i, n in enumerate(labels, 1)}},
        "numTraining": len(names), "file_ending": ".nii.gz"}))

if __name__ == "__main__":  # as make_brain_dataset.py is called
    output, _, contrast, _, subjects, _, renders, *_ = sys.argv[1:]
    first, last = map(int, subjects.split("-"))
    write(Path(output), [f"brain_{subject:02d}_{index:02d}" for subject in range(first, last + 1)
                         for index in range(int(renders))],
          ["Thalamus", "LateralVentricle", "Cerebellum", "Brainstem", "Cortex"], ["t1", "t2"].index(contrast))
'''


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script as a module, its commands run in forks of a server that has imported nnU-Net."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    (tmp_path / "renderer.py").write_text(RENDERER)
    monkeypatch.syspath_prepend(tmp_path)

    def execute(command: Sequence[str], environment: Mapping[str, str]) -> None:
        if command[0] == "python":
            subprocess.run([sys.executable, *command[1:]], check=True)
            return
        with monkeypatch.context() as patch:
            for name in environment.keys() - os.environ.keys() | {"nnUNet_results"}:
                patch.setenv(name, environment[name])
            for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_extTrainer"):
                patch.setenv(name, environment[name])
            fork_command(*command)

    monkeypatch.setattr(importlib.import_module("steps"), "execute", execute)
    return importlib.import_module("transplant_experiment")


def page(settings: Sequence[str], tables: Sequence[str]) -> str:
    return "# Results\n" + "\n".join(f"<!-- {setting}: {table} -->\n<!-- end of {setting}: {table} -->"
                                     for setting in settings for table in tables)


def test_the_whole_experiment(experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import renderer
    renderer.write(tmp_path / "Dataset004_Hippocampus", [f"hippocampus_{i:03d}" for i in range(25)],
                   ["Anterior", "Posterior"], 0)
    documentation = tmp_path / "documentation"
    documentation.mkdir()
    results = documentation / "results.md"
    results.write_text(page(("hippocampus", "brain"), experiment.TABLES))
    command = ["transplant_experiment.py", str(tmp_path / "work"), "--scale", "toy", "-documentation",
               str(documentation), "-hippocampus", str(tmp_path / "Dataset004_Hippocampus"), "-brain",
               str(tmp_path / "renderer.py")]
    monkeypatch.setattr(sys, "argv", command)
    experiment.main()

    text = results.read_text()
    for regime in ("Stable", "Plastic"):
        for tasks, missing in (("Anterior, Posterior", 0), ("Thalamus, LateralVentricle, Cerebellum", 2)):
            cells = re.search(rf"^\| {regime} \| {tasks} \| (.+) \|$", text, re.M)[1].split(" | ")
            dice = [float(cell) for cell in cells if cell.strip()]
            assert len(cells) == 8 and len(dice) == 8 - missing and all(0 <= each <= 1 for each in dice), cells
        assert len(re.findall(rf"^\| {regime} \| \w+, \w+ \| .+ \|$", text, re.M)) == 4  # all pairs
    figures = {path.name for path in documentation.glob("*.png")}
    assert figures == {"brain_flatness.png", "brain_merged.png", "hippocampus_flatness.png",
                       *(f"hippocampus_{name}_{regime}.png" for name in ("map", "map_fitted")
                         for regime in ("stable", "plastic"))}

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    splits = {path for path in before if path.name in ("splits_final.json", "nnUNetPlansSmall.json")}
    experiment.main()  # all is there: nothing is made again
    assert {path: path.stat().st_mtime_ns for path in before.keys() - splits} == {
        path: time for path, time in before.items() if path not in splits}
    assert results.read_text() == text
