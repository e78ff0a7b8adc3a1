"""Five folds become one model: Dataset004_Hippocampus of the Medical Segmentation Decathlon, on a CPU.

    python benchmarks/folds.py DATA/Dataset004_Hippocampus WORK

Of nnU-Net's first split the 40 validation cases are the test, which no model sees. The other 160 make folds as nnU-Net
makes them, each trained from its own random weights, or from one base of half the steps; beside them one model of all
160 cases, Anterior and Posterior as tasks without a common base, and wider networks. Every step is a command a user
types, run as such; a step whose result is there is skipped, so an interrupted run goes on. Last, what one model and an
ensemble of five take for a volume, side by side.
"""
import argparse
import os
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from methods import ALIGNED, flags
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.crossval_split import generate_crossval_split
from steps import PLANS, Steps, prepare_hippocampus, write_small_plans

from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import predictor, torch_device

DATASET = "Dataset004_Hippocampus"
WHOLE, HALF = (f"nnUNetTrainer_{epochs}epochs_125iterations_NoMirroring" for epochs in (4, 2))
ALL = 5  # the split with all 160 training cases; its validation cases are the test
TASKS = {921: "Anterior", 922: "Posterior"}
WIDTHS = {16: (1, 2), 32: (0, 1), 64: (0, 1)}  # features -> folds; fold 0 of 16 failed in training when we ran it
LOOK = f"-d 4 -cases train:{ALL} -n_cases 6 -n_patches 1000"  # all of 6 training volumes, not their labels
ALIGN = {name: flags(recipe) for name, recipe in ALIGNED.items()}
ACTIVATION, FIT = f"{ALIGN['activation_align']} {LOOK}", "-fit head"
METHODS = {
    "average": "", "average, head fitted": f"{LOOK} {FIT}", "rebasin": ALIGN["rebasin"],
    "weight_zip": ALIGN["weight_zip"], "activation_align": ACTIVATION,
    "activation_align to the mean": f"{ACTIVATION} -to mean",
    "mudsc_align, alpha 0.3": f"{ALIGN['mudsc_align']} -alpha 0.3 {LOOK}",
    "mudsc_align, alpha 0.5": f"{ALIGN['mudsc_align']} -alpha 0.5 {LOOK}", "zipit": f"{ALIGN['zipit']} {LOOK}",
    "zipit, decay 1": f"{ALIGN['zipit']} -decay 1 {LOOK}",
    "mudsc_zip, alpha 0.5": f"{ALIGN['mudsc_zip']} -alpha 0.5 {LOOK}",
    "mudsc_zip, head fitted": f"{ALIGN['mudsc_zip']} -alpha 0.5 {LOOK} {FIT}",
    "activation_align, head fitted": f"{ACTIVATION} {FIT}",
    "activation_align, regmean": f"-align activation -method regmean -off_diagonal 0.5 {LOOK}",
    "activation_align, refit": f"-align activation -method refit -positions 512 {LOOK}"}
COMMON = ("average", "activation_align", "activation_align, head fitted", "mudsc_zip, alpha 0.5",
          "mudsc_zip, head fitted")
PRACTICAL = (*COMMON, "average, head fitted")
AT_EVERY_WIDTH = (*COMMON, "mudsc_align, alpha 0.5")
POLISHED = 150  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Dataset004_Hippocampus in nnU-Net raw format")
    parser.add_argument("work", type=Path, help="folder for nnUNet_raw, nnUNet_preprocessed and nnUNet_results")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    run = Steps(args.work)
    tests = prepare(run, args.data)
    train(run, args.device)
    every, base = (run.model(DATASET, trainer) / f"fold_{ALL}" / "checkpoint_final.pth" for trainer in (WHOLE, HALF))
    ties = {"ties": f"-method ties -base {base}", "ties, head fitted": f"-method ties -base {base} {LOOK} {FIT}"}
    practical = {name: METHODS[name] for name in PRACTICAL}
    for name, trainer, plans, folds, methods, beside in (
            ("folds", WHOLE, PLANS, (0, 1, 2), METHODS, {"all cases": every}),
            ("five folds from scratch", WHOLE, PLANS, range(ALL), practical, {"all cases": every}),
            ("five folds from one base", HALF, PLANS, range(ALL), practical | ties, {"base": base}),
            # fold 0 failed in training
            ("four folds from one base", HALF, PLANS, range(1, ALL), practical | ties, {"base": base}),
            *((f"width {width}", HALF, f"{PLANS}{width}", folds, {name: METHODS[name] for name in AT_EVERY_WIDTH}, {})
              for width, folds in WIDTHS.items())):
        model = run.model(DATASET, trainer, plans)
        merge_and_score(run, name, [model / f"fold_{number}" for number in folds], methods, beside, args.device)
    print_seconds(run, run.model(DATASET, WHOLE), tests[:8], torch_device(args.device))


def prepare(run: Steps, data: Path) -> list[str]:
    """The test cases."""
    tests = prepare_hippocampus(run, data, splits)[ALL]["val"]
    preprocessed = run.preprocessed / DATASET
    write_small_plans(preprocessed)
    for features in WIDTHS:
        write_small_plans(preprocessed, f"{PLANS}{features}", features)
    run(run.raw / "Dataset922_Posterior", "nnunet_transplant_split_tasks -d 4 -tasks Anterior=Anterior "
                                          f"Posterior=Posterior -ids 921 922 -p {PLANS}")
    return tests


def splits(cases: list[str]) -> list[dict[str, list[str]]]:
    """Folds 0 to 4 of the 160 cases (four of a fold's own are enough for nnU-Net's validation), and all of them."""
    outer = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
    inner = generate_crossval_split(outer["train"], seed=12345, n_splits=5)
    return [{"train": fold["train"], "val": fold["val"][:4]} for fold in inner] + [outer]


def train(run: Steps, device: str) -> None:
    def fold(dataset: str, number: int, trainer: str, plans: str = PLANS, pretrained: Path | None = None) -> Path:
        checkpoint = run.model(dataset, trainer, plans) / f"fold_{number}" / "checkpoint_final.pth"
        start = "" if pretrained is None else f" -pretrained_weights {pretrained}"
        run(checkpoint,
            f"nnUNetv2_train {dataset} 3d_fullres {number} -tr {trainer} -p {plans} -device {device}{start}")
        return checkpoint

    for number in (*range(ALL), ALL):
        fold(DATASET, number, WHOLE)
    base = fold(DATASET, ALL, HALF)
    for number in range(ALL):
        fold(DATASET, number, HALF, pretrained=base)
    for number, name in TASKS.items():
        fold(f"Dataset{number}_{name}", ALL, WHOLE)
    for width, folds in WIDTHS.items():
        for number in folds:
            fold(DATASET, number, HALF, f"{PLANS}{width}")


def merge_and_score(run: Steps, name: str, folds: list[Path], methods: Mapping[str, str], beside: Mapping[str, Path],
                    device: str) -> None:
    """Merge folds by every method, and score all on the test cases beside them, their ensemble and other models."""
    work = run.work / name.replace(" ", "_")
    ensemble = work / "ensemble"
    if not ensemble.exists():
        ensemble.mkdir(parents=True)
        for file in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
            shutil.copy(folds[0].parent / file, ensemble)
        for fold in folds:
            shutil.copytree(fold, ensemble / fold.name)
    checkpoints = " ".join(str(fold / "checkpoint_final.pth") for fold in folds)
    only_first = f"-weights 1 {' '.join('0' * (len(folds) - 1))} {LOOK}"
    more = {"first fold, head fitted": f"{only_first} {FIT}"}
    if name == "folds":
        more |= {"first fold, polished": f"{only_first} -fit polish -steps {POLISHED}",
                 "activation_align, polished": f"{ACTIVATION} -fit polish -steps {POLISHED}"}
    models = {f"fold {fold.name[5:]}": fold / "checkpoint_final.pth" for fold in folds}
    models |= {"ensemble": ensemble, **beside}
    for method, options in (methods | more).items():
        models[method] = work / method.replace(", ", "_").replace(" ", "_")
        run(models[method], f"nnunet_transplant_merge -m {checkpoints} -o {models[method]} -device {device} "
                            f"{options}")
    if name == "folds":
        models["random weights, polished"] = output = work / "random_weights_polished"
        run(output, f"python {Path(__file__).with_name('polish_random.py')} {checkpoints} {LOOK} -steps {POLISHED} "
                    f"-device {device} -o {output}")
    scores = {}
    for method, model in models.items():  # one by one: an interrupted run goes on
        output = work / "scores" / method.replace(", ", "_").replace(" ", "_")
        run(output, f"nnunet_transplant_evaluate -m {model} -d 4 -f {ALL} -o {output} -device {device}")
        scores[method] = pd.read_csv(output / "evaluation.csv").groupby("structure", sort=False)["dice"].mean()
    table = pd.DataFrame(scores).T
    table = table.assign(mean=table.mean(axis=1))
    table["of the ensemble"] = table["mean"] / table.loc["ensemble", "mean"]
    print(f"{name}\n{table.round(3).to_string()}", flush=True)


def print_seconds(run: Steps, model: Path, cases: list[str], device: torch.device, rounds: int = 3) -> None:
    """nnU-Net's prediction of preprocessed volumes by one model and by an ensemble of five, in turn. A merged model is
    one model, whatever it is merged from."""
    os.environ["nnUNet_extTrainer"] = run.environment["nnUNet_extTrainer"]
    folds = open_models(model, [str(number) for number in range(ALL)])
    both = {"one model": predictor(folds[:1], device, progress_bar=False),
            "ensemble of five": predictor(folds, device, progress_bar=False)}
    data = nnUNetDatasetBlosc2(str(run.preprocessed / DATASET / "nnUNetPlans_3d_fullres"), cases)
    volumes = [torch.from_numpy(data.load_case(case)[0][:]) for case in cases]
    seconds = {name: [] for name in both}
    for volume in volumes * rounds:
        for name, each in both.items():
            start = time.perf_counter()
            each.predict_logits_from_preprocessed_data(volume)
            seconds[name].append(time.perf_counter() - start)
    for name, each in seconds.items():
        print(f"{name}: {statistics.median(each):.2f} s a volume ({min(each):.2f} to {max(each):.2f})")


if __name__ == "__main__":
    main()
