"""The default merge beside its rivals, on real data, on a CPU.

    python benchmarks/default_merge.py mouse DATA/Dataset005_MouseBrain WORK -tasks 4
    python benchmarks/default_merge.py hippocampus DATA/Dataset004_Hippocampus WORK

mouse: a base of all 20 structures on six wild-type brains, tasks of one structure each (-tasks: the first 4, 8 or all
20 of the list below) on nine transgenic ones, three others to test, two others for choices (and as images that no model
was trained on). hippocampus: a base of both structures on 80 cases, two tasks on 80 others, 40 to test.

-run K: fine-tune the tasks anew, for a second and third run of the same. --regions: tasks of regions (sigmoid heads).
--choices: merges of other settings. All are trained by commands, and merged and scored in this process. What is there
is not done again, so an interrupted run goes on. Prints the mean Dice of the test cases and of those for choices, and
seconds.
"""
import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hippocampus import splits as hippocampus_splits
from steps import PLANS, Steps, case_names, prepare_hippocampus, write_small_plans, write_splits

from nnunet_transplant.analysis.scoring import MergedNetwork, open_labelled_cases
from nnunet_transplant.data.cases import evaluation_cases
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.merger import Merger
from nnunet_transplant.merging import merge
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.targets import name_targets

Options = dict[str, Any]

MOUSE = "Dataset005_MouseBrain"
BASE = "nnUNetTrainerPlasticRate_10epochs_100iterations_NoMirroring"
TASK = "nnUNetTrainerTaskVector_10epochs_25iterations_NoMirroring"
HIPPOCAMPUS_BASE = "nnUNetTrainerStable_10epochs_150iterations_NoMirroring"
HIPPOCAMPUS_TASK = "nnUNetTrainerTaskVector_10epochs_50iterations_NoMirroring"
FIRST = ("Hippocampus", "CaudatePutamen", "Ventricles", "Cerebellum")  # the others in the order of the labels
TRAINED = [*(f"UT_{i:02d}" for i in (1, 2, 3, 5, 6, 7)), *(f"TT_{i:02d}" for i in (1, 2, 3))]
CHOICES = ["UT_09", "TT_05"]
LOOK = [case for case in TRAINED if case != "TT_03"]  # 8 of the tasks' own


@dataclass
class Setting:
    """What is merged, what it may look at, and what it is scored on."""
    dataset: int
    experts: dict[str, Path]   # by structure
    fold: int
    look: list[str]            # of the tasks' training cases
    choices: list[str]
    test: list[str]
    others: dict[str, Path] = field(default_factory=dict)  # models to compare
    work: Path = Path()        # for its table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=("mouse", "hippocampus"))
    parser.add_argument("data", type=Path, help="the dataset in nnU-Net raw format")
    parser.add_argument("work", type=Path, help="folder for nnUNet_raw, nnUNet_preprocessed and nnUNet_results")
    parser.add_argument("-tasks", type=int, default=4, help="of the mouse setting")
    parser.add_argument("-run", type=int, default=1, help="of the fine-tuning")
    parser.add_argument("--regions", action="store_true")
    parser.add_argument("--choices", action="store_true")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    run = Steps(args.work)
    if args.setting == "mouse":
        setting = mouse(run, args.data, args.tasks, args.run, args.regions, args.device)
        name = f"mouse{args.tasks}"
    else:
        setting = hippocampus(run, args.data, args.run, args.device)
        name = "hippocampus"
    name += "_regions" * args.regions + f"_run{args.run}" * (args.run > 1)
    setting.work = run.work / name
    setting.work.mkdir(exist_ok=True)
    os.environ.update(run.environment)
    use_our_trainers()
    rows = choices(setting) if args.choices else rivals(setting)
    print(merge_and_score(setting, rows, args.device).round(3).to_string())


# ---------------------------------------------------------------------------------------------------------------------
# Training

def mouse(run: Steps, data: Path, tasks: int, number: int, regions: bool, device: str) -> Setting:
    raw, folder = run.raw / MOUSE, run.preprocessed / MOUSE
    if not raw.exists():
        shutil.copytree(data, raw)
    run(folder / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 5 -c 3d_fullres -np 2")
    write_mouse_plans(folder)
    cases = case_names(raw)
    wild = [case for case in cases if case.startswith("WT")]
    unseen = [case for case in cases if case not in wild and case not in TRAINED]
    splits = [{"train": wild, "val": wild[:2]}, {"train": TRAINED, "val": unseen}]
    write_splits(folder, splits)
    train = f"-p {PLANS} -device {device}"
    base = run.model(MOUSE, BASE) / "fold_0" / "checkpoint_final.pth"
    run(base, f"nnUNetv2_train 5 3d_fullres 0 -tr {BASE} {train}")
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    structures = [*FIRST, *(name for name in labels if name not in (*FIRST, "background"))]
    ids = {name: (951 if regions else 911) + i for i, name in enumerate(structures)}
    joint = tasks == len(FIRST)
    run(run.raw / f"Dataset{ids[structures[-1]]}_{structures[-1]}",
        "nnunet_transplant_split_tasks -d 5 -tasks " + " ".join(f"{name}={name}" for name in structures)
        + f" -ids {' '.join(map(str, ids.values()))} -p {PLANS}" + " --regions" * regions)
    if joint:
        run(run.raw / "Dataset910_Joint", f"nnunet_transplant_split_tasks -d 5 -tasks Joint={'+'.join(FIRST)} -ids 910 "
                                          f"-p {PLANS}")
    tuned = run if number == 1 else run.into(f"results_{number}")
    wanted = [(ids[name], name) for name in structures[:tasks]] + [(910, "Joint")] * joint
    models = {}
    for identifier, name in wanted:
        dataset = f"Dataset{identifier}_{name}"
        write_splits(run.preprocessed / dataset, splits)
        models[name] = tuned.model(dataset, TASK)
        tuned(models[name] / "fold_1" / "checkpoint_final.pth",
              f"nnUNetv2_train {identifier} 3d_fullres 1 -tr {TASK} {train} -pretrained_weights {base}")
    others = {"joint": models.pop("Joint")} if "Joint" in models else {}
    return Setting(5, models, 1, LOOK, CHOICES, [case for case in unseen if case not in CHOICES], others)


def write_mouse_plans(folder: Path) -> None:
    """nnU-Net's own plans with four stages of 16 to 128 features, a smaller patch and batch 4."""
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["plans_name"] = PLANS
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"batch_size": 4, "patch_size": [48, 32, 32]}
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs |= {"n_stages": 4, "features_per_stage": [16 * 2 ** i for i in range(4)],
               "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"][:3]}
    for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[key] = kwargs[key][:4]
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=4))


def hippocampus(run: Steps, data: Path, number: int, device: str) -> Setting:
    splits = prepare_hippocampus(run, data, hippocampus_splits)
    write_small_plans(run.preprocessed / "Dataset004_Hippocampus")
    train = f"-p {PLANS} -device {device}"
    base = run.model("Dataset004_Hippocampus", HIPPOCAMPUS_BASE) / "fold_0" / "checkpoint_final.pth"
    run(base, f"nnUNetv2_train 4 3d_fullres 0 -tr {HIPPOCAMPUS_BASE} {train}")
    tasks = {901: "Anterior", 902: "Posterior", 903: "Joint"}
    run(run.raw / "Dataset903_Joint",
        "nnunet_transplant_split_tasks -d 4 -tasks Anterior=Anterior Posterior=Posterior Joint=Anterior+Posterior "
        f"-ids 901 902 903 -p {PLANS}")
    tuned = run if number == 1 else run.into(f"results_{number}")
    models = {}
    for identifier, name in tasks.items():
        models[name] = tuned.model(f"Dataset{identifier}_{name}", HIPPOCAMPUS_TASK)
        tuned(models[name] / "fold_1" / "checkpoint_final.pth",
              f"nnUNetv2_train {identifier} 3d_fullres 1 -tr {HIPPOCAMPUS_TASK} {train} -pretrained_weights {base}")
    others = {"joint": models.pop("Joint")}
    trained, unseen = (list(map(str, splits[1][part])) for part in ("train", "val"))
    return Setting(4, models, 1, trained[::10], unseen[::5], [case for case in unseen if case not in unseen[::5]],
                   others)


# ---------------------------------------------------------------------------------------------------------------------
# Merging

FIT = ["head", "entries"]
WITHOUT_IMAGES = ("iso_c", "iso_cts", "model_stock", "breadcrumbs", "consensus", "ties", "tsv_m", "della", "pcb",
                  "magmax")


def rivals(setting: Setting) -> dict[str, Options]:
    """Of a table row, what its merge is told."""
    base: Options = {"method": "task_arithmetic", "weights": [0] * len(setting.experts)}
    look, nobody = images(setting, setting.look), images(setting, setting.choices)
    return {
        "average": {"method": "average"}, "average, head fitted": {"fit": "head", **look},
        "fisher, head fitted": {"method": "fisher", "fit": "head", **look},
        "base, head fitted": {"fit": "head", **base, **look},
        "base, head polish": {"fit": ["head", "polish"], "steps": 200, **base, **look},
        "average, head polish": {"fit": ["head", "polish"], "steps": 200, **look},
        "default, no images": {}, "default": look,
        **{f"default, {count} volumes": {**look, "n_cases": count} for count in (1, 2, 4)},
        **{f"default, {steps} steps": {**look, "steps": steps} for steps in (25, 50, 100, 400)},
        f"default, {len(setting.choices)} volumes of nobody": nobody}


def choices(setting: Setting) -> dict[str, Options]:
    """Settings of which the defaults are one, with the tasks' own images."""
    base: Options = {"method": "task_arithmetic", "weights": [0] * len(setting.experts)}
    look = images(setting, setting.look)
    return {
        **{f"{steps} steps, {patches} patches": {**look, "steps": steps, "n_patches": patches}
           for steps, patches in ((100, 32), (100, 64), (100, 128), (100, 1000), (200, 64), (200, 1000))},
        **{f"rate {rate}": {**look, "steps": 100, "lr": rate} for rate in (0.015, 0.06)},
        "from fisher, 100 steps": {"method": "fisher", "fit": FIT, "steps": 100, **look},
        "from the base": {"fit": FIT, **base, **look},
        **{method: {"method": method} for method in WITHOUT_IMAGES},
        **{f"{name}, head fitted": {"method": name, "fit": "head", **look} for name in ("iso_c", "ties", "tsv_m")}}


def images(setting: Setting, cases: Sequence[str]) -> Options:
    path = setting.work / f"look_{len(cases)}.txt"
    path.write_text("\n".join(cases) + "\n")
    return {"images": str(setting.dataset), "cases": str(path)}


def merge_and_score(setting: Setting, rows: Mapping[str, Options], device: str) -> pd.DataFrame:
    """Merge and score row by row, on the cases for choices and on those of the test; what rows.csv has is not done
    again."""
    file = setting.work / "rows.csv"
    done = pd.read_csv(file, index_col="row") if file.exists() else pd.DataFrame()
    cases_file = setting.work / "unseen.txt"
    cases_file.write_text("\n".join([*setting.test, *setting.choices]) + "\n")
    cases = evaluation_cases(str(setting.dataset), "all", str(cases_file))
    first = open_models(next(iter(setting.experts.values())), [str(setting.fold)])[0]
    scored = open_labelled_cases(cases, first)
    models = {f"expert {name}": [path] for name, path in setting.experts.items()}
    models |= {name: [path] for name, path in setting.others.items()}
    every = {**{name: (paths, Options()) for name, paths in models.items()},
             **{name: (list(setting.experts.values()), options) for name, options in rows.items()}}
    for name, (paths, options) in every.items():
        if name in done.index:
            continue
        model, seconds, folds = paths[0], 0.0, [str(setting.fold)]
        if name in rows:
            model, folds = setting.work / name.replace(",", "").replace(" ", "_"), None
            start = time.perf_counter()
            merge(paths, folds=[setting.fold], device=device, **options).save(model, overwrite=True)
            seconds = time.perf_counter() - start
        network = MergedNetwork(Merger([open_models(model, folds)]), torch.device(device))
        (targets,), _ = name_targets(["model"], [[network.merged]], cases)
        dice = pd.DataFrame(network.dice(scored, targets, cases.dataset_json["labels"].get("ignore")),
                            index=[case.name for case in scored])
        dice = dice[[structure for structure in setting.experts if structure in dice]]
        row = {f"{part} {structure}": dice.loc[of, structure].mean() for part, of in (
            ("choices", setting.choices), ("test", setting.test)) for structure in dice}
        done = pd.concat([done, pd.DataFrame({**row, "seconds": seconds}, index=pd.Index([name], name="row"))])
        done.to_csv(file)
        print(name, {key: round(float(value), 3) for key, value in row.items() if key.startswith("test")}, flush=True)
    experts = {column: done.loc[f"expert {column.split(' ', 1)[1]}", column] for column in done if column != "seconds"}
    table = pd.concat([pd.DataFrame(experts, index=["experts"]),
                       done.drop([f"expert {name}" for name in setting.experts])])
    for part in ("test", "choices"):
        mean = table[[f"{part} {name}" for name in setting.experts]].mean(axis=1, skipna=False)
        table[f"{part} mean"], table[f"{part}, of experts"] = mean, mean / mean["experts"]
    return table.drop(columns=[f"choices {name}" for name in setting.experts])


if __name__ == "__main__":
    main()
