"""The default merge beside its rivals, on real data, on a CPU.

    python benchmarks/default_merge.py mouse DATA/Dataset005_MouseBrain WORK -tasks 4
    python benchmarks/default_merge.py grow DATA/Dataset005_MouseBrain WORK
    python benchmarks/default_merge.py forgetting DATA/Dataset005_MouseBrain WORK
    python benchmarks/default_merge.py folds DATA/Dataset005_MouseBrain WORK
    python benchmarks/default_merge.py scratch DATA/Dataset005_MouseBrain WORK
    python benchmarks/default_merge.py strangers DATA/Dataset005_MouseBrain WORK
    python benchmarks/default_merge.py hippocampus DATA/Dataset004_Hippocampus WORK
    python benchmarks/default_merge.py brain LABEL_MAPS WORK

mouse: a base of all 20 structures on six wild-type brains, tasks of one structure each (-tasks: the first 4, 8 or all
20) on nine transgenic ones, three others to test, two others for choices (and as images that no model was trained on).
grow: a base of 16 of them, tasks of the other four, all in one model. forgetting: beside it, other ways to learn new
structures. folds: five folds of 15 animals from one base; scratch: each from its own random weights. strangers: two
tasks, each from its own. hippocampus: a base of both structures on 80 cases, two tasks on 80 others, 32 to test, 8 for
choices. brain: a base in T1 contrast, four tasks in T2.

-run K: fine-tune the tasks anew, for a second and third run of the same. --regions: tasks of regions (sigmoid heads).
--curves: the default with fewer volumes, and with other numbers of steps. --choices: merges of other settings. Models
are trained by commands, and merged and scored in this process. What is there is not done again, so an interrupted run
goes on. Prints the mean Dice of the test cases and of those for choices, and seconds.
"""
import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from merge_settings import Mouse, Setting, brain, folds, forgetting, grow, hippocampus, mouse, scratch, strangers
from steps import Steps

from nnunet_transplant.analysis.scoring import LabelledCase, MergedNetwork, dice, open_labelled_cases
from nnunet_transplant.data.cases import Cases, evaluation_cases
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.merger import Merger
from nnunet_transplant.merging import merge
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.targets import name_targets

Options = dict[str, Any]
OF_MOUSE = {"grow": grow, "forgetting": forgetting, "folds": folds, "scratch": scratch, "strangers": strangers}
FIT = ["head", "entries"]
WITHOUT_IMAGES = ("iso_c", "iso_cts", "model_stock", "breadcrumbs", "consensus", "ties", "tsv_m", "della", "pcb",
                  "magmax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=[*OF_MOUSE, "mouse", "hippocampus", "brain"])
    parser.add_argument("data", type=Path, help="the dataset in nnU-Net raw format, or for brain its label maps")
    parser.add_argument("work", type=Path, help="folder for nnUNet_raw, nnUNet_preprocessed and nnUNet_results")
    parser.add_argument("-tasks", type=int, default=4, help="of the mouse setting")
    parser.add_argument("-run", type=int, default=1, help="of the fine-tuning")
    parser.add_argument("--regions", action="store_true", help="of the mouse setting")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    setting = made(args)
    name = args.setting + f"{args.tasks}" * (args.setting == "mouse") + "_regions" * args.regions
    work = args.work.resolve() / (name + f"_run{args.run}" * (args.run > 1))
    work.mkdir(exist_ok=True)
    rows = rivals(setting, work) | (curves(setting, work) if args.curves else {})
    if args.choices:
        rows = choices(setting, work)
    print(merge_and_score(setting, rows, work, args.device).round(3).to_string())


def made(args: argparse.Namespace) -> Setting:
    """Its models trained, and this process in their environment."""
    run = Steps(args.work)
    os.environ.update(run.environment)
    use_our_trainers()
    if args.setting in ("hippocampus", "brain"):
        return {"hippocampus": hippocampus, "brain": brain}[args.setting](run, args.data, args.run, args.device)
    data = Mouse(run, args.data, args.run, args.device)
    if args.setting == "mouse":
        return mouse(data, args.tasks, args.regions)
    return OF_MOUSE[args.setting](data)


# ---------------------------------------------------------------------------------------------------------------------
# What is merged: of each table row, what its merge is told

def rivals(setting: Setting, work: Path) -> dict[str, Options]:
    look, nobody = images(setting, "look", work), images(setting, "choices", work)
    rows: dict[str, Options] = {
        "default": look, **{f"{name}, head fitted": {"fit": "head", **options, **look}
                            for name, options in starts(setting).items()},
        f"default, {len(setting.choices)} volumes of nobody": nobody, "default, 2 volumes": {**look, "n_cases": 2},
        "default, no images": {}, "average": {"method": "average"}, "average, head fitted": {"fit": "head", **look}}
    polish: Options = {"fit": ["head", "polish"], "steps": 300, **look}
    if setting.known:
        rows["fisher, head fitted"] = {"method": "fisher", "fit": "head", **look}
        rows["average, head polish"] = polish
        return rows | {f"{name}, head polish": {**options, **polish} for name, options in starts(setting).items()}
    zipped: Options = {"align": "mudsc", "units": "zip", **look}
    return rows | {"best, head polish": {"method": "best", **polish}, "zip, head fitted": {"fit": "head", **zipped},
                   "zip, head entries": {"fit": FIT, **zipped}, "zip, head polish": {**zipped, **polish}}


def starts(setting: Setting) -> dict[str, Options]:
    """Merges of nothing: the base, or where there is none each model alone."""
    count = len(setting.experts)
    if setting.known:
        return {"base": {"method": "task_arithmetic", "weights": [0] * count}}
    return {name: {"weights": [int(i == k) for i in range(count)]} for k, name in enumerate(setting.experts)}


def curves(setting: Setting, work: Path) -> dict[str, Options]:
    look = images(setting, "look", work)
    return {**{f"default, {count} volumes": {**look, "n_cases": count} for count in (1, 4)},
            **{f"default, {steps} steps": {**look, "steps": steps} for steps in (25, 50, 100, 200)}}


def choices(setting: Setting, work: Path) -> dict[str, Options]:
    """Settings of which the defaults are one, with the tasks' own images."""
    look = images(setting, "look", work)
    return {
        **{f"{steps} steps, {patches} patches": {**look, "steps": steps, "n_patches": patches}
           for steps, patches in ((100, 32), (100, 64), (100, 128), (100, 1000), (300, 64), (300, 1000))},
        **{f"rate {rate}": {**look, "lr": rate} for rate in (3e-4, 1e-3)},
        "from fisher, 100 steps": {"method": "fisher", "fit": FIT, "steps": 100, **look},
        **{f"from the {name}": {"fit": FIT, **options, **look} for name, options in starts(setting).items()},
        **{method: {"method": method} for method in WITHOUT_IMAGES},
        **{f"{name}, head fitted": {"method": name, "fit": "head", **look} for name in ("iso_c", "ties", "tsv_m")}}


def images(setting: Setting, part: str, work: Path) -> Options:
    """Those of a part of the setting's cases."""
    path = work / f"images_{part}.txt"
    path.write_text("\n".join(getattr(setting, part)) + "\n")
    return {"images": str(setting.dataset), "cases": str(path)}


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def merge_and_score(setting: Setting, rows: Mapping[str, Options], work: Path, device: str) -> pd.DataFrame:
    """Merge and score row by row, on the cases for choices and on those of the test; what rows.csv has is not done
    again."""
    file = work / "rows.csv"
    done = pd.read_csv(file, index_col="row") if file.exists() else pd.DataFrame()
    cases_file = work / "unseen.txt"
    cases_file.write_text("\n".join([*setting.test, *setting.choices]) + "\n")
    cases = evaluation_cases(str(setting.dataset), "all", str(cases_file))
    checkpoints = list(setting.experts.values())
    scored = open_labelled_cases(cases, open_models(checkpoints[0])[0])
    trained = {**{f"expert {name}": [path] for name, path in setting.experts.items()}, **setting.others}
    for name in (*trained, *rows):
        if name in done.index:
            continue
        models, seconds = trained.get(name, []), 0.0
        if name in rows:
            models = [work / name.replace(",", "").replace(" ", "_")]
            start = time.perf_counter()
            merge(checkpoints, base=setting.base, device=device, **rows[name]).save(models[0], overwrite=True)
            seconds = time.perf_counter() - start
        found = score(models, scored, cases, device)
        row = {f"{part} {structure}": found.loc[list(of), structure].mean()
               for part, of in (("choices", setting.choices), ("test", setting.test))
               for structure in setting.answers if structure in found}
        done = pd.concat([done, pd.DataFrame({**row, "seconds": seconds}, index=pd.Index([name], name="row"))])
        done.to_csv(file)
        print(name, round(float(pd.Series(row).filter(like="test").mean()), 3), round(seconds), flush=True)
    return summary(setting, done.loc[[*trained, *rows]])


def score(models: Sequence[Path], scored: Sequence[LabelledCase], cases: Cases, device: str) -> pd.DataFrame:
    """The Dice of each case (rows) and structure, of a model or of an ensemble."""
    networks = [MergedNetwork(Merger([open_models(model)]), torch.device(device)) for model in models]
    (targets,), _ = name_targets(["model"], [[networks[0].merged]], cases)
    dice_of = {}
    for case in scored:
        if len(networks) == 1:
            labels = networks[0].labels(case.image)
        else:  # nnU-Net's ensemble of models with the same labels
            labels = torch.stack([network.logits(case.image).float() for network in networks]).mean(0).argmax(0)
        dice_of[case.name] = dice(case.reference, labels, targets, cases.dataset_json["labels"].get("ignore"))
    return pd.DataFrame(dice_of).T


def summary(setting: Setting, done: pd.DataFrame) -> pd.DataFrame:
    """Means over structures and cases, and of which part of the answering models' Dice that is."""
    groups = {"mean": list(setting.answers), **setting.groups}
    own = pd.DataFrame({column: [done.loc[name if name in done.index else f"expert {name}", column]]
                        for part in ("test", "choices") for structure, name in setting.answers.items()
                        for column in [f"{part} {structure}"]}, index=["experts"])
    everything = pd.concat([own, done])
    table = pd.DataFrame(index=everything.index)
    for part in ("test", "choices"):
        for group, structures in groups.items():
            mean = everything[[f"{part} {name}" for name in structures]].mean(axis=1, skipna=False)
            table[f"{part} {group}"], table[f"{part} {group}, of experts"] = mean, mean / mean["experts"]
    few = [f"test {name}" for name in setting.answers] if len(setting.answers) <= 4 else []
    return pd.concat([table, everything[[*few, "seconds"]]], axis=1)


if __name__ == "__main__":
    main()
