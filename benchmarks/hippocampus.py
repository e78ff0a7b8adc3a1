"""The whole job on real data: Dataset004_Hippocampus of the Medical Segmentation Decathlon, on a CPU.

    python benchmarks/hippocampus.py DATA/Dataset004_Hippocampus WORK

Pre-trains nnUNetTrainerStable on one half of the training cases with both structures, fine-tunes Anterior and Posterior
as two tasks and both together (Joint) on the other half, merges the two tasks by every method, and scores everything on
the 40 cases that no model saw. Beside them a stock nnUNetTrainer with as many steps. Every step is a command a user
types, run as such; a step whose result is there is skipped, so an interrupted run goes on. Prints seconds per step.
"""
import argparse
from pathlib import Path

from methods import merge_and_score
from nnunetv2.utilities.crossval_split import generate_crossval_split
from steps import PLANS, Steps, prepare_hippocampus, write_small_plans
from task_vector_files import size_and_dice

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
    run = Steps(args.work)
    prepare_hippocampus(run, args.data, splits)
    write_small_plans(run.preprocessed / "Dataset004_Hippocampus")

    train = f"-p {PLANS} -device {args.device}"
    base = run.model("Dataset004_Hippocampus", BASE)
    checkpoint = base / "fold_0" / "checkpoint_final.pth"
    run(checkpoint, f"nnUNetv2_train 4 3d_fullres 0 -tr {BASE} {train}")
    run(run.raw / "Dataset903_Joint",
        "nnunet_transplant_split_tasks -d 4 -tasks Anterior=Anterior Posterior=Posterior Joint=Anterior+Posterior "
        f"-ids 901 902 903 -p {PLANS}")
    experts = {name: run.model(f"Dataset{number}_{name}", TASK) for number, name in TASKS.items()}
    for number, name in TASKS.items():
        run(experts[name] / "fold_1" / "checkpoint_final.pth",
            f"nnUNetv2_train {number} 3d_fullres 1 -tr {TASK} {train} -pretrained_weights {checkpoint}")
    stock = run.model("Dataset004_Hippocampus", STOCK)
    run(stock / "fold_1" / "checkpoint_final.pth", f"nnUNetv2_train 4 3d_fullres 1 -tr {STOCK} {train}")

    merge_and_score(run, [experts["Anterior"], experts["Posterior"]], {"base": base, **experts, "stock": stock},
                    dataset=4, fold=1, device=args.device)
    size_and_dice(run, experts["Anterior"], base, dataset=4, fold=1, device=args.device)
    print(run.log.read_text())


def splits(cases: list[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's first fold keeps its 40 validation cases for testing; its 160 others train the base (fold 0) or the
    tasks (fold 1)."""
    first = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
    return [{"train": first["train"][half::2], "val": first["val"]} for half in (0, 1)]


if __name__ == "__main__":
    main()
