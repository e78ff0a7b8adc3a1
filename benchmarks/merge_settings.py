"""The settings of default_merge.py: data made ready for nnU-Net, and models trained by its commands. What is there is
not done again."""
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brain import BASE as BRAIN_BASE
from brain import STRUCTURES as BRAIN_STRUCTURES
from brain import T1, T2
from brain import TASK as BRAIN_TASK
from brain import TASKS as BRAIN_TASKS
from hippocampus import BASE as HIPPOCAMPUS_BASE
from hippocampus import TASK as HIPPOCAMPUS_TASK
from hippocampus import TASKS as HIPPOCAMPUS_TASKS
from hippocampus import splits as hippocampus_splits
from nnunetv2.utilities.crossval_split import generate_crossval_split
from steps import PLANS, Steps, case_names, prepare_hippocampus, write_small_plans, write_splits

MOUSE, HIPPOCAMPUS = "Dataset005_MouseBrain", "Dataset004_Hippocampus"
MOUSE_BASE = "nnUNetTrainerPlasticRate_10epochs_100iterations_NoMirroring"
MOUSE_TASK = "nnUNetTrainerTaskVector_10epochs_25iterations_NoMirroring"
MOUSE_PATCH = (48, 32, 32)
WHOLE, HALF = (f"nnUNetTrainer_{epochs}epochs_100iterations_NoMirroring" for epochs in (8, 4))  # of the mouse folds
FIRST = ("Hippocampus", "CaudatePutamen", "Ventricles", "Cerebellum")  # the others in the order of the labels
TRAINED = [*(f"UT_{i:02d}" for i in (1, 2, 3, 5, 6, 7)), *(f"TT_{i:02d}" for i in (1, 2, 3))]
CHOICES = ["UT_09", "TT_05"]
LOOK = [case for case in TRAINED if case != "TT_03"]  # 8 of the tasks' own
OF_BASE, OF_TASKS, ALL, FOLDS = 0, 1, 2, range(3, 8)  # the splits of the mouse brains


@dataclass(frozen=True)
class Setting:
    """What is merged, what a merge may look at, and what it is scored on.

    experts: the checkpoints that are merged, by name; others: models to compare, each of one checkpoint, or an ensemble
    of several. answers: by structure the model whose Dice counts as the whole. groups: structures whose mean is shown
    by itself. base: theta_0 where the experts do not record it; known: whether they have any.
    """
    dataset: int
    experts: Mapping[str, Path]
    answers: Mapping[str, str]
    look: Sequence[str]     # of the experts' training cases
    choices: Sequence[str]
    test: Sequence[str]
    others: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base: Path | None = None
    known: bool = True


# ---------------------------------------------------------------------------------------------------------------------
# Mouse brains

class Mouse:
    """The mouse brains, and the training of what several settings share."""

    def __init__(self, run: Steps, data: Path, number: int, device: str) -> None:
        self.run, self.number = run, number
        self.train = f"-p {PLANS} -device {device}"
        raw, folder = run.raw / MOUSE, run.preprocessed / MOUSE
        if not raw.exists():
            shutil.copytree(data, raw)
        run(folder / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 5 -c 3d_fullres -np 2")
        write_small_plans(folder, patch_size=MOUSE_PATCH)
        cases = case_names(raw)
        wild = [case for case in cases if case.startswith("WT")]
        unseen = [case for case in cases if case not in (*wild, *TRAINED)]
        self.test = [case for case in unseen if case not in CHOICES]
        inner = generate_crossval_split([*wild, *TRAINED], seed=12345, n_splits=len(FOLDS))
        self.splits = [{"train": wild, "val": wild[:2]}, {"train": TRAINED, "val": unseen},
                       {"train": [*wild, *TRAINED], "val": unseen},
                       *({part: list(map(str, names)) for part, names in fold.items()} for fold in inner)]
        write_splits(folder, self.splits)
        labels = json.loads((raw / "dataset.json").read_text())["labels"]
        self.structures = [*FIRST, *(name for name in labels if name not in (*FIRST, "background"))]

    def split_tasks(self, tasks: Mapping[str, Sequence[str]], first_id: int, more: str = "") -> dict[str, str]:
        """The dataset of each task."""
        datasets = {name: f"Dataset{first_id + i}_{name}" for i, name in enumerate(tasks)}
        self.run(self.run.raw / [*datasets.values()][-1],
                 "nnunet_transplant_split_tasks -d 5 -tasks "
                 + " ".join(f"{name}={'+'.join(structures)}" for name, structures in tasks.items())
                 + f" -ids {' '.join(str(first_id + i) for i in range(len(tasks)))} -p {PLANS}{more}")
        for dataset in datasets.values():
            write_splits(self.run.preprocessed / dataset, self.splits)
        return datasets

    def base(self, dataset: str = MOUSE) -> Path:
        return self.trained(self.run, [(dataset, OF_BASE)], MOUSE_BASE)[0]

    def tune(self, datasets: Mapping[str, str], base: Path, results: str = "results") -> dict[str, Path]:
        run = tuning(self.run, self.number, results)
        found = self.trained(run, [(dataset, OF_TASKS) for dataset in datasets.values()], MOUSE_TASK, base)
        return dict(zip(datasets, found, strict=True))

    def trained(self, run: Steps, wanted: Sequence[tuple[str, int]], trainer: str, base: Path | None = None
                ) -> list[Path]:
        return trained(run, wanted, trainer, self.train, base)

    def setting(self, experts: Mapping[str, Path], answers: Mapping[str, str],
                others: Mapping[str, Sequence[Path]], groups: Mapping[str, Sequence[str]],
                base: Path | None = None, known: bool = True) -> Setting:
        return Setting(5, experts, answers, LOOK, CHOICES, self.test, others, groups, base, known)


def mouse(data: Mouse, tasks: int, regions: bool) -> Setting:
    """One structure a task, from a base of all; beside them a model of the first four together."""
    experts = data.split_tasks({name: [name] for name in data.structures}, 951 if regions else 911,
                               " --regions" * regions)
    base = data.base()
    others = {}
    if tasks == len(FIRST):
        others = {"joint": [data.tune(data.split_tasks({"Joint": FIRST}, 910), base)["Joint"]]}
    wanted = {name: experts[name] for name in data.structures[:tasks]}
    return data.setting(data.tune(wanted, base), {name: name for name in wanted}, others, {})


def grow(data: Mouse) -> Setting:
    """A base of 16 structures, and four tasks of the others, in one model of 20."""
    old = [name for name in data.structures if name not in FIRST]
    base = data.base(data.split_tasks({"Sixteen": old}, 931)["Sixteen"])
    tasks = data.split_tasks({name: [name] for name in data.structures}, 911)
    experts = {"base": base, **data.tune({name: tasks[name] for name in FIRST}, base, "results_grow")}
    answers = {**{name: name for name in FIRST}, **dict.fromkeys(old, "base")}
    return data.setting(experts, answers, {}, {"new": FIRST, "old": old})


def folds(data: Mouse, scratch: bool) -> Setting:
    """Five folds of 12 animals, from their own random weights or from a base of half the steps on all 15; beside them
    one model of all 15. Stock nnU-Net."""
    whole = data.trained(data.run, [(MOUSE, ALL)], WHOLE)
    base = None
    if scratch:
        found = data.trained(data.run, [(MOUSE, fold) for fold in FOLDS], WHOLE)
    else:
        base = data.trained(data.run, [(MOUSE, ALL)], HALF)[0]
        found = data.trained(data.run, [(MOUSE, fold) for fold in FOLDS], HALF, base)
    experts = {f"fold {i}": path for i, path in enumerate(found)}
    return data.setting(experts, dict.fromkeys(data.structures, "ensemble"),
                        {"ensemble": found, "one model of all cases": whole}, {}, base, known=not scratch)


# ---------------------------------------------------------------------------------------------------------------------
# The other two

def hippocampus(run: Steps, data: Path, number: int, device: str) -> Setting:
    """Two structures, two tasks, from a base of both on other cases; as hippocampus.py trains them."""
    splits = prepare_hippocampus(run, data, hippocampus_splits)
    write_small_plans(run.preprocessed / HIPPOCAMPUS)
    options = f"-p {PLANS} -device {device}"
    base = trained(run, [(HIPPOCAMPUS, 0)], HIPPOCAMPUS_BASE, options)[0]
    run(run.raw / "Dataset903_Joint",
        "nnunet_transplant_split_tasks -d 4 -tasks Anterior=Anterior Posterior=Posterior Joint=Anterior+Posterior "
        f"-ids 901 902 903 -p {PLANS}")
    wanted = [(f"Dataset{identifier}_{name}", 1) for identifier, name in HIPPOCAMPUS_TASKS.items()]
    found = trained(tuning(run, number), wanted, HIPPOCAMPUS_TASK, options, base)
    models = dict(zip(HIPPOCAMPUS_TASKS.values(), found, strict=True))
    joint = models.pop("Joint")
    own, unseen = (list(map(str, splits[1][part])) for part in ("train", "val"))
    return Setting(4, models, {name: name for name in models}, own[::10], unseen[::5],
                   [case for case in unseen if case not in unseen[::5]], {"joint": [joint]})


def brain(run: Steps, renderer: Path, number: int, device: str) -> Setting:
    """Four tasks in another contrast than the base's, as brain.py trains them. For choices, and as images of nobody,
    two of the base's subjects in the tasks' contrast."""
    options = f"-p {PLANS} -device {device}"
    for name, contrast, subjects in ((T1, "t1", "1-10"), (T2, "t2", "9-16")):
        run(run.raw / name / "dataset.json", f"python {renderer.resolve()} {run.raw / name} --contrast {contrast} "
                                             f"--subjects {subjects} --renders 4 --spacing 4")
    run(run.preprocessed / T1 / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 201 -c 3d_fullres -np 2")
    write_small_plans(run.preprocessed / T1)
    cases = case_names(run.raw / T1)
    write_splits(run.preprocessed / T1, [{"train": cases[:-4], "val": cases[-4:]}])
    base = trained(run, [(T1, 0)], BRAIN_BASE, options)[0]
    run(run.raw / f"Dataset915_{BRAIN_TASKS[915]}",
        "nnunet_transplant_split_tasks -d 202 -plans_from 201 -tasks "
        + " ".join(f"{name}={name if name != 'Joint' else '+'.join(BRAIN_STRUCTURES)}" for name in BRAIN_TASKS.values())
        + f" -ids {' '.join(map(str, BRAIN_TASKS))} -p {PLANS}")

    def of(*subjects: str) -> list[str]:
        return [case for case in case_names(run.raw / T2) if case[6:8] in subjects]

    own, choices, test = of("11", "12", "13", "14"), of("09", "10"), of("15", "16")
    wanted = [(f"Dataset{identifier}_{name}", 0) for identifier, name in BRAIN_TASKS.items()]
    for dataset, _ in wanted:
        write_splits(run.preprocessed / dataset, [{"train": own, "val": test}])
    found = trained(tuning(run, number), wanted, BRAIN_TASK, options, base)
    models = dict(zip(BRAIN_TASKS.values(), found, strict=True))
    joint = models.pop("Joint")
    return Setting(202, models, {name: name for name in models}, own[::2], choices, test, {"joint": [joint]})


def tuning(run: Steps, number: int, results: str = "results") -> Steps:
    """Where the so-manyth fine-tuning of the same goes."""
    return run.into(results if number == 1 else f"{results}_{number}")


def trained(run: Steps, wanted: Sequence[tuple[str, int]], trainer: str, options: str, base: Path | None = None
            ) -> list[Path]:
    """The checkpoints of some datasets and folds, trained two at a time."""
    start = "" if base is None else f" -pretrained_weights {base}"
    found = {run.model(dataset, trainer) / f"fold_{fold}" / "checkpoint_final.pth":
             f"nnUNetv2_train {dataset} 3d_fullres {fold} -tr {trainer} {options}{start}" for dataset, fold in wanted}
    run.side_by_side(found)
    return [*found]
