"""The settings of default_merge.py: data made ready for nnU-Net, and models trained by its commands. What is there is
not done again."""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from steps import PLANS, Steps, case_names, prepare_hippocampus, render, write_small_plans, write_splits
from transplant_settings import BASE, SEARCH, TEST, folder_name, from_file, split_tasks

MOUSE, HIPPOCAMPUS = "Dataset005_MouseBrain", "Dataset004_Hippocampus"
MOUSE_FILE = Path(__file__).parent / "settings" / "mouse.json"
MOUSE_REGIME = "Plastic, rate 1e-3"
MOUSE_TASK = "nnUNetTrainerTaskVector_10epochs_25iterations_NoMirroring"
MOUSE_BASE = "nnUNetTrainerPlasticRate_10epochs_100iterations_NoMirroring"
LONG_TASK = "nnUNetTrainerTaskVector_10epochs_100iterations_NoMirroring"  # the steps of four tasks
# of folds: 500 steps of 8 patches; from a base 250 more
WHOLE, MORE = (f"nnUNetTrainerPlasticRate_5epochs_{steps}iterations_NoMirroring" for steps in (100, 50))
NEW = 4  # structures that a grown model learns
ALL, FOLDS = 3, range(4, 9)  # splits of the mouse brains, beside those of transplant_settings.py


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
    """The mouse brains, and the training of what several settings share: the same models as those of
    transplant_experiment.py, in the same places."""

    def __init__(self, run: Steps, data: Path, number: int, device: str) -> None:
        self.run, self.number = run, number
        self.train = f"-p {PLANS} -device {device}"
        self.setting_of_file, _ = from_file(run, MOUSE_FILE, data.resolve().parent, "small")
        file = run.preprocessed / MOUSE / "splits_final.json"
        self.splits = json.loads(file.read_text())
        every = [*self.splits[BASE]["train"], *self.splits[TEST]["train"]]
        inner = generate_crossval_split(every, seed=12345, n_splits=len(FOLDS))
        self.splits += [{"train": every, "val": self.splits[TEST]["val"]}, *inner]
        write_splits(run.preprocessed / MOUSE, self.splits)
        self.structures = list(self.setting_of_file.tasks)

    def split_tasks(self, tasks: Mapping[str, Sequence[str]], first_id: int, more: str = "") -> dict[str, str]:
        """The dataset of each task."""
        labels = {name: "+".join(structures) for name, structures in tasks.items()}
        return split_tasks(self.run, f"-d 5 -p {PLANS}{more}", labels, first_id, self.splits)

    def base(self, dataset: str = MOUSE) -> Path:
        return trained(self.run, [(dataset, BASE)], MOUSE_BASE, self.train)[0]

    def tune(self, datasets: Mapping[str, str], base: Path, family: str = MOUSE_REGIME) -> dict[str, Path]:
        run = self.run.into(f"{folder_name(family)}_{self.number - 1}/results")
        found = trained(run, [(dataset, TEST) for dataset in datasets.values()], MOUSE_TASK, self.train, base)
        return dict(zip(datasets, found, strict=True))

    def setting(self, experts: Mapping[str, Path], answers: Mapping[str, str],
                others: Mapping[str, Sequence[Path]], groups: Mapping[str, Sequence[str]],
                base: Path | None = None, known: bool = True) -> Setting:
        own = self.splits[TEST]["train"]
        return Setting(5, experts, answers, own[:-1], self.splits[SEARCH]["val"], self.splits[TEST]["val"], others,
                       groups, base, known)


def mouse(data: Mouse, tasks: int, regions: bool) -> Setting:
    """One structure a task, from a base of all; beside them one model of all these structures."""
    wanted = data.structures[:tasks]
    datasets = data.setting_of_file.tasks
    joint = data.setting_of_file.joints.get(tuple(wanted))
    if regions:
        datasets = data.split_tasks({name: [name] for name in data.structures}, 951, " --regions")
    elif joint is None:
        joint = data.split_tasks({f"Joint{tasks}": wanted}, 970 + tasks)[f"Joint{tasks}"]
    base = data.base()
    experts = data.tune({name: datasets[name] for name in wanted}, base)
    others = {} if joint is None else {"joint": [data.tune({"joint": joint}, base)["joint"]]}
    return data.setting(experts, {name: name for name in wanted}, others, {})


def grow(data: Mouse) -> Setting:
    """A base of 16 structures, and four tasks of the others, in one model of 20."""
    new, old = data.structures[:NEW], data.structures[NEW:]
    base = data.base(data.split_tasks({"Sixteen": old}, 945)["Sixteen"])
    experts = data.tune({name: data.setting_of_file.tasks[name] for name in new}, base, "grow")
    answers = {**{name: name for name in new}, **dict.fromkeys(old, "base")}
    return data.setting({"base": base, **experts}, answers, {}, {"new": new, "old": old})


def forgetting(data: Mouse) -> Setting:
    """`grow`, and what else one could do with as many steps: train all 20 structures, for which the old labels are
    needed; the new ones alone, and read the old ones by the base's head; or the new ones without forgetting."""
    setting = grow(data)
    base, run = setting.experts["base"], data.run.into("grow_0/results")
    new = data.setting_of_file.joints[data.setting_of_file.merged_tasks]
    with_all, alone = trained(run, [(MOUSE, TEST), (new, TEST)], LONG_TASK, data.train, base)
    run.environment |= {"TRANSPLANT_BASE": str(base)}
    kept = trained(run, [(MOUSE, TEST)], LONG_TASK.replace("TaskVector", "WithoutForgetting"), data.train, base)
    plain = data.run.work / "grow_0" / "new_alone"
    data.run(plain, f"nnunet_transplant_merge -m {base} {alone} -method task_arithmetic -weights 0 1 -o {plain}")
    return replace(setting, others={"joint, with the old labels": [with_all], "the new ones alone": [plain],
                                    "without forgetting": kept})


def folds(data: Mouse) -> Setting:
    """Five folds of 12 animals, from the model of all 15."""
    base = trained(data.run, [(MOUSE, ALL)], WHOLE, data.train)[0]
    return _folds(data, trained(data.run, [(MOUSE, fold) for fold in FOLDS], MORE, data.train, base), base)


def scratch(data: Mouse) -> Setting:
    """Five folds of 12 animals, each from its own random weights."""
    return _folds(data, trained(data.run, [(MOUSE, fold) for fold in FOLDS], WHOLE, data.train), None)


def strangers(data: Mouse) -> Setting:
    """Two tasks of the tasks' animals, each from its own random weights; beside them one model of both."""
    names = data.structures[:2]
    datasets = [*(data.setting_of_file.tasks[name] for name in names), data.setting_of_file.joints[tuple(names)]]
    *found, joint = trained(data.run, [(dataset, TEST) for dataset in datasets], WHOLE, data.train)
    return data.setting(dict(zip(names, found, strict=True)), {name: name for name in names}, {"joint": [joint]}, {},
                        known=False)


def _folds(data: Mouse, found: Sequence[Path], base: Path | None) -> Setting:
    """Beside them one model of all 15 animals."""
    whole = trained(data.run, [(MOUSE, ALL)], WHOLE, data.train)
    return data.setting({f"fold {i}": path for i, path in enumerate(found)},
                        dict.fromkeys(data.structures, "ensemble"),
                        {"ensemble": found, "one model of all cases": whole}, {}, base, known=base is not None)


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


def brain(run: Steps, label_maps: Path, number: int, device: str) -> Setting:
    """Four tasks in another contrast than the base's, as brain.py trains them. For choices, and as images of nobody,
    two of the base's subjects in the tasks' contrast."""
    options = f"-p {PLANS} -device {device}"
    for name, contrast, subjects in ((T1, "t1", "1-10"), (T2, "t2", "9-16")):
        render(run, label_maps.resolve(), name, contrast, subjects, renders=4)
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


def tuning(run: Steps, number: int) -> Steps:
    """Where the so-manyth fine-tuning of the same goes."""
    return run.into("results" if number == 1 else f"results_{number}")


def trained(run: Steps, wanted: Sequence[tuple[str, int]], trainer: str, options: str, base: Path | None = None
            ) -> list[Path]:
    """The checkpoints of some datasets and folds, trained two at a time."""
    start = "" if base is None else f" -pretrained_weights {base}"
    found = {run.model(dataset, trainer) / f"fold_{fold}" / "checkpoint_final.pth":
             f"nnUNetv2_train {dataset} 3d_fullres {fold} -tr {trainer} {options}{start}" for dataset, fold in wanted}
    run.side_by_side(found)
    return [*found]
