"""Four tasks on real brain anatomy in rendered MR contrast, on a CPU.

    python benchmarks/brain.py LABEL_MAPS WORK

Pre-trains on T1 contrast with all 11 structures (subjects 1 to 10), fine-tunes four tasks of one structure each and all
four together (Joint) on T2 contrast (subjects 11 to 14), merges the four tasks by every method, and scores everything
on subjects 15 and 16, which no model saw. render_brains.py makes the volumes (4 mm) from LABEL_MAPS. The base
comes from the stock trainer: in as many steps (2000) nnUNetTrainerStable, with its dropout, does not learn the small
structures. Every step is a command a user types; one whose result is there is skipped, so an interrupted run goes on.
"""
import argparse
from pathlib import Path

from methods import merge_and_score
from steps import PLANS, Steps, case_names, render, write_small_plans, write_splits

BASE = "nnUNetTrainer_16epochs_125iterations_NoMirroring"
TASK = "nnUNetTrainerTaskVector_10epochs_30iterations_NoMirroring"
STRUCTURES = ("Thalamus", "LateralVentricle", "Cerebellum", "Brainstem")
TASKS = {911: "Thalamus", 912: "LateralVentricle", 913: "Cerebellum", 914: "Brainstem", 915: "Joint"}
T1, T2 = "Dataset201_BrainT1", "Dataset202_BrainT2"
RENDERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("label_maps", type=Path, help="folder, see render_brains.py")
    parser.add_argument("work", type=Path, help="folder for nnUNet_raw, nnUNet_preprocessed and nnUNet_results")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    run = Steps(args.work)
    models = train(run, args.label_maps.resolve(), args.device)
    merge_and_score(run, [models[name] for name in STRUCTURES], models, dataset=202, fold=0, device=args.device)
    print(run.log.read_text())


def train(run: Steps, label_maps: Path, device: str) -> dict[str, Path]:
    """Render, preprocess, pre-train, split and fine-tune. Returns the model folders: base, the four experts, Joint."""
    for name, contrast, subjects in ((T1, "t1", "1-10"), (T2, "t2", "11-16")):
        render(run, label_maps, name, contrast, subjects, RENDERS)
    run(run.preprocessed / T1 / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 201 -c 3d_fullres -np 2")
    write_small_plans(run.preprocessed / T1)
    # the base takes all its volumes but a few that show how it learns; its own subjects are no test
    cases = case_names(run.raw / T1)
    write_splits(run.preprocessed / T1, [{"train": cases[:-RENDERS], "val": cases[-RENDERS:]}])
    options = f"-p {PLANS} -device {device}"
    base = run.model(T1, BASE)
    checkpoint = base / "fold_0" / "checkpoint_final.pth"
    run(checkpoint, f"nnUNetv2_train 201 3d_fullres 0 -tr {BASE} {options}")

    # T2 is preprocessed by the base's plans, so that every task has what the base was trained on
    whole = run.preprocessed / T2
    run(run.raw / f"Dataset915_{TASKS[915]}",
        "nnunet_transplant_split_tasks -d 202 -plans_from 201 -tasks "
        + " ".join(f"{name}={name if name != 'Joint' else '+'.join(STRUCTURES)}" for name in TASKS.values())
        + f" -ids {' '.join(map(str, TASKS))} -p {PLANS}")
    tests, training = ([case for case in case_names(run.raw / T2) if (case[6:8] in ("15", "16")) == part]
                       for part in (True, False))
    whole.mkdir(exist_ok=True)
    write_splits(whole, [{"train": training, "val": tests}])
    models = {"base": base}
    for number, name in TASKS.items():
        dataset = f"Dataset{number}_{name}"
        write_splits(run.preprocessed / dataset, [{"train": training, "val": tests}])
        models[name] = run.model(dataset, TASK)
        run(models[name] / "fold_0" / "checkpoint_final.pth",
            f"nnUNetv2_train {number} 3d_fullres 0 -tr {TASK} {options} -pretrained_weights {checkpoint}")
    return models


if __name__ == "__main__":
    main()
