"""The whole job on the embedded phantom: pre-train, fine-tune, merge, predict, score, draw."""
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from nnunet_transplant import demo_trainers
from nnunet_transplant.data.phantom import ORGANS, write_phantom_dataset
from nnunet_transplant.environment import ext_trainer_value
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.evaluation import evaluate
from nnunet_transplant.figures.demo import save_segmentations_figure
from nnunet_transplant.merging import merge

BASE, PARENT = "Dataset801_PhantomA", "Dataset802_PhantomB"
TASKS = {"LiverSpleen": "Liver+Spleen", "KidneyAorta": "Kidney+Aorta", "Joint": "Liver+Spleen+Kidney+Aorta"}
LOOK = {"images": "903", "cases": "train:0", "n_cases": 6}  # their labels are not looked at
MERGES: dict[str, dict[str, Any]] = {  # options of `merge`
    "average": {"method": "average"},
    "base, head fitted": {"method": "task_arithmetic", "weights": [0, 0], "fit": "head", **LOOK},
    "default": LOOK}


@dataclass(frozen=True)
class DemoSize:
    """How much the demo trains; the tests use a smaller one."""
    cases: int = 20
    features: int = 16
    variant: str = ""  # of the demo's trainers, such as _1epochs_2iterations


def run_demo(output: Path, size: DemoSize | None = None) -> pd.DataFrame:
    """Run the demo with nnU-Net's own commands and write everything to a new folder.

    Scanner A pre-trains a base on all four organs; scanner B fine-tunes two tasks and, to compare, all organs at once;
    the two tasks merge as MERGES say; all are scored on scanner B's validation cases.

    Returns mean Dice, one row for each organ and one column for each model. Raises TransplantError for an existing
    folder or where an nnU-Net command fails.
    """
    size = size or DemoSize()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise TransplantError(f"{output} exists already: give another -o")
    output = output.resolve()
    steps = Steps(output)
    for name, scanner, seed in ((BASE, "A", 0), (PARENT, "B", 1000)):
        write_phantom_dataset(steps.raw / name, size.cases, scanner, seed)

    steps("planning and preprocessing", "nnUNetv2_plan_and_preprocess -d 801 -c 3d_fullres -npfp 2 -np 2")
    write_small_plans(steps.preprocessed / BASE / "nnUNetPlans.json", size.features)
    stable, task = (f"nnUNetTrainer{kind}Demo{size.variant}" for kind in ("Stable", "TaskVector"))
    train = "-device cpu"
    steps("pre-training on scanner A, four organs", f"nnUNetv2_train 801 3d_fullres 0 -tr {stable} {train}")
    steps("splitting scanner B's dataset into tasks",
          "nnunet_transplant_split_tasks -d 802 -plans_from 801 -np 2 -ids 901 902 903 -tasks "
          + " ".join(f"{name}={labels}" for name, labels in TASKS.items()))
    base = steps.model(BASE, stable) / "fold_0" / "checkpoint_final.pth"
    for number, name in enumerate(TASKS, 901):
        steps(f"fine-tuning {TASKS[name]}", f"nnUNetv2_train {number} 3d_fullres 0 -tr {task} {train} "
                                            f"-pretrained_weights {base}")
    experts = {name: steps.model(f"Dataset{number}_{name}", task) for number, name in enumerate(TASKS, 901)}
    steps.close()
    os.environ.update(steps.variables)
    merged = {name: output / f"merged_{name}".replace(", ", "_").replace(" ", "_") for name in MERGES}
    for name, folder in merged.items():
        merge([experts["LiverSpleen"], experts["KidneyAorta"]], device="cpu", **MERGES[name]).save(folder)
    return score(steps, experts, merged)


def score(steps: "Steps", experts: dict[str, Path], merged: dict[str, Path]) -> pd.DataFrame:
    """Evaluate all models on the validation cases of scanner B, and write the table and the picture."""
    folder = steps.output / "evaluation"
    models = [*experts.values(), *merged.values()]
    scores = evaluate(models, "903", 0, output=folder, device="cpu", progress=True)
    names = dict(zip(scores["model"].unique(), [*experts, *merged], strict=True))
    table = scores.assign(model=scores["model"].map(names)).pivot_table(
        index="structure", columns="model", values="dice", aggfunc="mean")
    table = table.reindex(index=list(ORGANS), columns=["LiverSpleen", "KidneyAorta", *MERGES, "Joint"])
    table.to_csv(steps.output / "dice.csv")
    case = scores["case"].iloc[0]
    predictions = {name: folder / label / "predictions" / f"{case}.nii.gz" for label, name in names.items()}
    titles = {"LiverSpleen": "expert: liver, spleen", "KidneyAorta": "expert: kidney, aorta",
              **{name: f"merged: {name}" for name in MERGES}, "base, head fitted": "base, head fitted",
              "Joint": "trained jointly"}
    panels = [(title, predictions[name], label_values(name, experts, merged)) for name, title in titles.items()]
    save_segmentations_figure(
        steps.raw / PARENT / "imagesTr" / f"{case}_0000.nii.gz",
        [("truth", steps.raw / PARENT / "labelsTr" / f"{case}.nii.gz", dict(ORGANS)), *panels],
        list(ORGANS), steps.output / "demo.png")
    return table


def label_values(name: str, experts: dict[str, Path], merged: dict[str, Path]) -> dict[str, int]:
    """Structure -> label value in the predictions of a model."""
    folder = experts.get(name) or merged[name]
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    return {structure: value for structure, value in labels.items() if structure != "background"}


def write_small_plans(path: Path, features: int) -> None:
    """nnU-Net's own plans with a narrower and shallower network, smaller patches and a small batch."""
    plans = json.loads(path.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"batch_size": 4, "patch_size": [24, 32, 32]}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": 4, "features_per_stage": [features * 2 ** stage for stage in range(4)],
        "kernel_sizes": [[3, 3, 3]] * 4, "strides": [[1, 1, 1]] + [[2, 2, 2]] * 3,
        "n_conv_per_stage": [1] * 4, "n_conv_per_stage_decoder": [1] * 3}
    path.write_text(json.dumps(plans, indent=4))


class Steps:
    """Runs commands as a user does, in nnU-Net folders of their own, with what they print in a log."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.raw, self.preprocessed, self.results = (output / f"nnUNet_{name}"
                                                     for name in ("raw", "preprocessed", "results"))
        trainers = str(Path(demo_trainers.__file__).parent)
        self.variables = {
            "nnUNet_raw": str(self.raw), "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results), "nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2",
            "nnUNet_extTrainer": os.pathsep.join([trainers, ext_trainer_value()])}
        for folder in (self.raw, self.preprocessed, self.results):
            folder.mkdir(parents=True)
        self.bar = tqdm(total=6, bar_format="{l_bar}{bar}| {elapsed}")

    def __call__(self, title: str, command: str) -> None:
        self.bar.set_description(title)
        program, *arguments = command.split()
        found = shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if found is None:
            raise TransplantError(f"the command {program} is not installed")
        log = self.output / "log.txt"
        start = time.time()
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"\n$ {command}\n")
            file.flush()
            done = subprocess.run([found, *arguments], env=os.environ | self.variables, stdout=file,
                                  stderr=subprocess.STDOUT)
            file.write(f"({time.time() - start:.0f} s)\n")
        if done.returncode:
            raise TransplantError(f"{command} failed; its output is in {log}")
        self.bar.update()

    def model(self, dataset: str, trainer: str) -> Path:
        return self.results / dataset / f"{trainer}__nnUNetPlans__3d_fullres"

    def close(self) -> None:
        self.bar.set_description("training done")
        self.bar.close()


