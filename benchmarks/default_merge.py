"""The default merge beside its rivals, on real data, on a CPU.

    python benchmarks/default_merge.py mouse DATA/Dataset005_MouseBrain WORK -tasks 4
    python benchmarks/default_merge.py hippocampus DATA/Dataset004_Hippocampus WORK

mouse: a base of all 20 structures on six wild-type brains, tasks of one structure each (-tasks: the first 4, 8 or all
20 of the list below) on nine transgenic ones, three others to test, two others for choices (and as images that no model
was trained on). hippocampus: a base of both structures on 80 cases, two tasks on 80 others, 40 to test.

-run K: fine-tune the tasks anew, for a second and third run of the same. --regions: tasks of regions (sigmoid heads).
--choices: merges of other settings, scored on the cases for choices. Every step is a command a user types; one whose
result is there is skipped, so an interrupted run goes on. Prints the mean Dice of the test cases, and wall times.
"""
import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from hippocampus import splits as hippocampus_splits
from steps import PLANS, Steps, case_names, prepare_hippocampus, write_small_plans, write_splits

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
    base: Path
    experts: dict[str, Path]   # by structure
    fold: int
    look: list[str]            # of the tasks' training cases
    choices: list[str]
    test: list[str]
    others: dict[str, Path] = field(default_factory=dict)  # models to compare


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
    rows = choices(run, setting) if args.choices else rivals(run, setting)
    print(merge_and_score(run, name, setting, rows, setting.choices if args.choices else setting.test, args.device))


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
    joint = "Joint" + "+".join(structures[:tasks]) if tasks == len(FIRST) else None
    run(run.raw / f"Dataset{ids[structures[-1]]}_{structures[-1]}",
        "nnunet_transplant_split_tasks -d 5 -tasks " + " ".join(f"{name}={name}" for name in structures)
        + f" -ids {' '.join(map(str, ids.values()))} -p {PLANS}" + " --regions" * regions)
    if joint is not None:
        run(run.raw / "Dataset910_Joint", f"nnunet_transplant_split_tasks -d 5 -tasks Joint={'+'.join(FIRST)} -ids 910 "
                                          f"-p {PLANS}")
    tuned = run if number == 1 else run.into(f"results_{number}")
    wanted = [(ids[name], name) for name in structures[:tasks]] + [(910, "Joint")] * (joint is not None)
    models = {}
    for identifier, name in wanted:
        dataset = f"Dataset{identifier}_{name}"
        write_splits(run.preprocessed / dataset, splits)
        models[name] = tuned.model(dataset, TASK)
        tuned(models[name] / "fold_1" / "checkpoint_final.pth",
              f"nnUNetv2_train {identifier} 3d_fullres 1 -tr {TASK} {train} -pretrained_weights {base}")
    others = {"joint": models.pop("Joint")} if "Joint" in models else {}
    return Setting(5, base, models, 1, LOOK, CHOICES, [case for case in unseen if case not in CHOICES], others)


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
    return Setting(4, base, models, 1, trained[::10], unseen[::5], [case for case in unseen if case not in unseen[::5]],
                   others)


# ---------------------------------------------------------------------------------------------------------------------
# Merging

def rivals(run: Steps, setting: Setting) -> dict[str, str]:
    """Of a table row, the flags of its merge."""
    nothing = f"-method task_arithmetic -weights {' '.join('0' * len(setting.experts))}"
    look, unseen = looking(run, setting.look), looking(run, setting.choices)
    return {
        "average": "-method average", "average, head fitted": f"-method average -fit head {look}",
        "fisher, head fitted": f"-method fisher -fit head {look}",
        "base, head fitted": f"{nothing} -fit head {look}",
        "base, polished": f"{nothing} -fit head polish {look}",
        "average, polished": f"-method average -fit head polish {look}",
        "default, no images": "", "default": look,
        **{f"default, {count} volumes": f"{look} -n_cases {count}" for count in (1, 2, 4)},
        **{f"default, {steps} steps": f"{look} -steps {steps}" for steps in (25, 50, 200, 400)},
        f"default, {len(setting.choices)} volumes of nobody": unseen}


def choices(run: Steps, setting: Setting) -> dict[str, str]:
    """Settings of which the defaults are one, with the tasks' own images."""
    look, fit = looking(run, setting.look), "-fit head entries"
    nothing = f"-method task_arithmetic -weights {' '.join('0' * len(setting.experts))}"
    return {
        **{f"{patches} patches": f"{fit} {look} -n_patches {patches}" for patches in (32, 64, 128, 1000)},
        **{f"{steps} steps": f"{fit} {look} -steps {steps}" for steps in (50, 200)},
        **{f"rate {rate}": f"{fit} {look} -lr {rate}" for rate in (0.015, 0.06)},
        "from fisher": f"-method fisher {fit} {look}", "from the base": f"{nothing} {fit} {look}",
        "polish": f"-fit head polish {look}", "polish, from the base": f"{nothing} -fit head polish {look}",
        "polish, 200 steps, from the base": f"{nothing} -fit head polish -steps 200 {look}",
        **{method: f"-method {method}" for method in ("iso_c", "iso_cts", "model_stock", "ties", "tsv_m", "della")}}


def looking(run: Steps, cases: Sequence[str]) -> str:
    """Flags for a dataset's images; the file of their names is written."""
    path = run.work / f"cases_{'_'.join(cases[:2])}_{len(cases)}.txt"
    path.write_text("\n".join(cases) + "\n")
    return f"-d {DATASETS[cases[0][:2]]} -cases {path}"


DATASETS = {"UT": 5, "TT": 5, "hi": 4}


def merge_and_score(run: Steps, name: str, setting: Setting, rows: Mapping[str, str], tests: Sequence[str],
                    device: str) -> str:
    """Merge, score on the test cases one by one, and make the table."""
    work = run.work / name
    work.mkdir(exist_ok=True)
    test = work / f"test_{len(tests)}.txt"
    test.write_text("\n".join(tests) + "\n")
    experts = " ".join(map(str, setting.experts.values()))
    merged = {}
    for row, flags in rows.items():
        merged[row] = work / row.replace(", ", "_").replace(" ", "_")
        run(merged[row], f"nnunet_transplant_merge -m {experts} -f {setting.fold} -o {merged[row]} -device {device} "
                         f"{flags}")
    models = {**{f"expert {structure}": path for structure, path in setting.experts.items()}, **setting.others,
              **merged}
    tables = []
    for row, model in models.items():
        output = work / "scores" / f"{row.replace(', ', '_').replace(' ', '_')}_{len(tests)}"
        run(output, f"nnunet_transplant_evaluate -m {model} -d {setting.dataset} -cases {test} -o {output} "
                    f"-device {device}")
        tables.append(pd.read_csv(output / "evaluation.csv").assign(
            model="experts" if row.startswith("expert ") else row))
    scores = pd.concat(tables)
    scores = scores[scores["structure"].isin(setting.experts)]
    table = scores.pivot_table(index="model", columns="structure", values="dice", sort=False)
    table = table.assign(mean=table.mean(axis=1, skipna=False))
    table["of experts"] = table["mean"] / table.loc["experts", "mean"]
    seconds = json.loads(run.log.read_text())
    taken = {row: seconds.get(command) for row in rows for command in seconds if f"-o {merged[row]} " in command}
    return table.assign(seconds=pd.Series(taken)).round(3).to_string()


if __name__ == "__main__":
    main()
