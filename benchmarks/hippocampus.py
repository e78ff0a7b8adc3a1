"""The whole job on real data: Dataset004_Hippocampus of the Medical Segmentation Decathlon, on a CPU.

    python benchmarks/hippocampus.py DATA/Dataset004_Hippocampus WORK

Pre-trains nnUNetTrainerStable on one half of the training cases with both structures, fine-tunes Anterior and Posterior
as two tasks and both together (Joint) on the other half, merges the two tasks, and scores everything on the 40 cases
that no model saw. Beside them a stock nnUNetTrainer with as many steps. Every step is a command a user types, run as
such; a step whose result is there is skipped, so an interrupted run goes on. Prints seconds per step at the end.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_transplant.environment import ext_trainer_value

PLANS = "nnUNetPlansSmall"
BASE = "nnUNetTrainerStable_10epochs_150iterations_NoMirroring"
TASK = "nnUNetTrainerTaskVector_10epochs_50iterations_NoMirroring"
STOCK = "nnUNetTrainer_16epochs_125iterations_NoMirroring"
TASKS = {901: "Anterior", 902: "Posterior", 903: "Joint"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Dataset004_Hippocampus in nnU-Net raw format")
    parser.add_argument("work", type=Path, help="folder for nnUNet_raw, nnUNet_preprocessed and nnUNet_results")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    folders = {name: args.work.resolve() / name.removeprefix("nnUNet_")
               for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = os.environ | {name: str(folder) for name, folder in folders.items()} | {
        "nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2", "OMP_WAIT_POLICY": "PASSIVE",
        "nnUNet_extTrainer": os.pathsep.join([ext_trainer_value(), str(Path(__file__).parent.resolve() / "trainers")])}
    run = Steps(environment, args.work / "seconds.json")

    raw = folders["nnUNet_raw"] / "Dataset004_Hippocampus"
    if not raw.exists():
        shutil.copytree(args.data, raw)
    preprocessed = folders["nnUNet_preprocessed"] / "Dataset004_Hippocampus"
    run(preprocessed / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -np 2")
    write_small_plans(preprocessed)
    write_splits(preprocessed, sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").iterdir()))

    train = f"-p {PLANS} -device {args.device}"
    base = model(folders, "Dataset004_Hippocampus", BASE) / "fold_0" / "checkpoint_final.pth"
    run(base, f"nnUNetv2_train 4 3d_fullres 0 -tr {BASE} {train}")
    run(folders["nnUNet_raw"] / "Dataset903_Joint",
        "nnunet_transplant_split_tasks -d 4 -tasks Anterior=Anterior Posterior=Posterior Joint=Anterior+Posterior "
        f"-ids 901 902 903 -p {PLANS}")
    experts = {name: model(folders, f"Dataset{number}_{name}", TASK) for number, name in TASKS.items()}
    for number, name in TASKS.items():
        run(experts[name] / "fold_1" / "checkpoint_final.pth",
            f"nnUNetv2_train {number} 3d_fullres 1 -tr {TASK} {train} -pretrained_weights {base}")
    stock = model(folders, "Dataset004_Hippocampus", STOCK)
    run(stock / "fold_1" / "checkpoint_final.pth", f"nnUNetv2_train 4 3d_fullres 1 -tr {STOCK} {train}")

    merged = {method: args.work / f"merged_{method}" for method in ("average", "ties")}
    for method, folder in merged.items():
        run(folder, f"nnunet_transplant_merge -m {experts['Anterior']} {experts['Posterior']} -f 1 "
                    f"-o {folder} -method {method}")
    compared = [base.parents[1], *experts.values(), stock, *merged.values()]
    run(args.work / "evaluation", f"nnunet_transplant_evaluate -m {' '.join(map(str, compared))} -d 4 -f 1 "
                                  f"-o {args.work / 'evaluation'} -device {args.device}")
    print((args.work / "seconds.json").read_text())


class Steps:
    """Runs commands whose result is missing, and keeps their wall time."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.environment, self.log = environment, log
        self.bin = Path(sys.executable).parent

    def __call__(self, result: Path, command: str) -> None:
        if result.exists():
            return
        print(f"$ {command}", flush=True)
        start = time.time()
        program, *arguments = command.split()
        subprocess.run([str(self.bin / program), *arguments], env=self.environment, check=True)
        seconds = json.loads(self.log.read_text()) if self.log.exists() else {}
        self.log.write_text(json.dumps(seconds | {command: round(time.time() - start)}, indent=1))


def model(folders: dict[str, Path], dataset: str, trainer: str) -> Path:
    return folders["nnUNet_results"] / dataset / f"{trainer}__{PLANS}__3d_fullres"


def write_small_plans(preprocessed: Path) -> None:
    """nnU-Net's own plans with half the features, a smaller patch and batch 4, on the same preprocessed data."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"batch_size": 4, "patch_size": [32, 40, 32]}
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [16, 32, 64, 128]
    (preprocessed / f"{PLANS}.json").write_text(json.dumps(plans, indent=4, sort_keys=False))


def write_splits(preprocessed: Path, cases: list[str]) -> None:
    """nnU-Net's first fold keeps its 40 validation cases for testing; its 160 others train the base (fold 0) or the
    tasks (fold 1)."""
    first = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
    splits = [{"train": first["train"][half::2], "val": first["val"]} for half in (0, 1)]
    (preprocessed / "splits_final.json").write_text(json.dumps([
        {part: [str(case) for case in keys] for part, keys in split.items()} for split in splits], indent=4))


if __name__ == "__main__":
    main()
