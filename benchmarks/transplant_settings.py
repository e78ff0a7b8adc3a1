"""The regimes and the two data sets of transplant_experiment.py, these made ready for nnU-Net: which cases a base sees,
which its tasks, which choose the weights of merges, and which test."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.crossval_split import generate_crossval_split
from steps import PLANS, Steps, case_names, prepare_hippocampus, write_small_plans, write_splits

# folds: what trains a base; what trains tasks, with the test cases for validation, and with those of searches
BASE, TEST, SEARCH = 0, 1, 2
MAIN = ("Stable", "Plastic")


class Regime(NamedTuple):
    """How a base is trained. batch: patches of an optimiser step; length: of the training, in that of the main two."""
    trainer: str
    batch: int
    length: int = 1


REGIMES = {"Stable": Regime("nnUNetTrainerStable", 4), "Plastic": Regime("nnUNetTrainerPlastic", 8),
           "Plastic, batch 4": Regime("nnUNetTrainerPlasticBatch4", 4),
           "Plastic, dropout 0.5": Regime("nnUNetTrainerPlasticDropout", 8),
           "Plastic, rate 1e-3": Regime("nnUNetTrainerPlasticRate", 8),
           "stock nnU-Net": Regime("nnUNetTrainerStockBatch4", 4),
           "Plastic, 3 times as long": Regime("nnUNetTrainerPlastic", 8, 3)}


@dataclass(frozen=True)
class Scale:
    """features: of the first stage, None for nnU-Net's own plans. base_patches: that each base is trained on, in so
    many epochs. task_steps: of eight patches, in so many epochs. suffix: of all trainers. seeds: fine-tunings from a
    main base; their merges' weights are searched in so many trials on so many cases. grid: values of both weights in
    the full map. curvature: options of flatness; eigenvalues: of a main base. all_joints: joint models of all pairs.
    changed: regimes beside the main ones. tasks: so many of the brain's.
    """
    features: int | None
    base_patches: int
    base_epochs: int
    task_steps: int
    task_epochs: int
    suffix: str
    seeds: int
    trials: int
    search_cases: int
    grid: int
    curvature: str
    eigenvalues: int
    all_joints: bool
    changed: Sequence[str] = tuple(REGIMES)[len(MAIN):]
    tasks: int = 4

    def trainer(self, name: str, epochs: int, steps: int) -> str:
        return f"{name}_{epochs}epochs_{steps // epochs}iterations{self.suffix}"


TOY = Scale(features=4, base_patches=8, base_epochs=1, task_steps=2, task_epochs=2, suffix="_NoMirroring", seeds=1,
            trials=1, search_cases=1, grid=3, curvature="-n_patches 1 -n_probes 2", eigenvalues=1, all_joints=False,
            changed=(), tasks=3)
SMALL = Scale(features=16, base_patches=6000, base_epochs=10, task_steps=250, task_epochs=10, suffix="_NoMirroring",
              seeds=3, trials=44, search_cases=6, grid=21, curvature="-n_patches 16 -n_probes 6", eigenvalues=10,
              all_joints=False)
FULL = Scale(features=None, base_patches=100000, base_epochs=100, task_steps=2500, task_epochs=10, suffix="", seeds=3,
             trials=44, search_cases=16, grid=21, curvature="-n_patches 64 -n_probes 10", eigenvalues=10,
             all_joints=True)
SCALES = {"toy": {"hippocampus": TOY, "brain": TOY},
          "small": {"hippocampus": SMALL,
                    # one seed: fine-tuning the four tasks from both bases once more takes an hour
                    "brain": replace(SMALL, base_patches=18000, task_steps=800, task_epochs=20,
                                     suffix="_NoMirroring_BFloat16", seeds=1, trials=20, grid=11,
                                     changed=("Plastic, rate 1e-3",))},
          "full": {"hippocampus": FULL, "brain": replace(FULL, trials=60)}}


@dataclass(frozen=True)
class Setting:
    """base: the data set that bases are trained on; whole: the one with all structures of the tasks, which everything
    is scored on. tasks: data set by structure. joints: data set of several structures, by these."""
    name: str
    run: Steps
    plans: str
    base: str
    whole: str
    tasks: Mapping[str, str]
    joints: Mapping[tuple[str, ...], str]

    @property
    def merges(self) -> list[tuple[str, ...]]:
        """The structures of each merge: all pairs, and all together."""
        return list(self.joints)


def folder_name(regime: str) -> str:
    return regime.replace(", ", "_").replace(" ", "_")


def merge_name(method: str, weights: str, tasks: Sequence[str]) -> str:
    return f"{method}_{weights}_{'-'.join(tasks)}"


def curvature_folder(work: Path, regimes: Sequence[str]) -> Path:
    return work / "curvature" / "_".join(map(folder_name, regimes))


def together(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    pairs = list(combinations(tasks, 2))
    return pairs if len(tasks) == 2 else [*pairs, tuple(tasks)]


def hippocampus(run: Steps, data: Path, features: int | None, tasks: int) -> Setting:
    """Dataset004_Hippocampus, see `hippocampus_splits`. The base is trained on both structures."""
    name, structures = "Dataset004_Hippocampus", ("Anterior", "Posterior")
    splits = prepare_hippocampus(run, data, hippocampus_splits)
    return _split_tasks(run, "hippocampus", name, name, structures[:tasks], splits, features, first_id=901)


def hippocampus_splits(cases: list[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's first fold keeps its validation cases: three of five test, two choose weights. One half of the others
    trains the base, the other half the tasks."""
    first = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
    tests, searched = ([case for i, case in enumerate(first["val"]) if (i % 5 < 3) == part] for part in (True, False))
    return [{"train": first["train"][half::2], "val": kept} for half, kept in ((0, tests), (1, tests), (1, searched))]


def brain(run: Steps, renderer: Path, features: int | None, tasks: int) -> Setting:
    """Volumes of 4 mm rendered from brain anatomies: the base sees T1 contrast with 11 structures (subjects 1 to 10),
    the tasks T2 contrast of subjects 11 to 14, four renderings of each; two more choose weights. Subjects 15 and 16
    test, four renderings of each."""
    base, whole = "Dataset201_BrainT1", "Dataset202_BrainT2"
    for name, contrast, subjects, renders in ((base, "t1", "1-10", 4), (whole, "t2", "11-16", 6)):
        run(run.raw / name / "dataset.json", f"python {renderer} {run.raw / name} --contrast {contrast} "
                                             f"--subjects {subjects} --renders {renders} --spacing 4")
    run(run.preprocessed / base / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 201 -c 3d_fullres -np 2")
    cases = case_names(run.raw / base)  # all but a few that show how the base learns; its own subjects are no test
    write_splits(run.preprocessed / base, [{"train": cases[:-4], "val": cases[-4:]}])

    def chosen(subjects: Sequence[str], renders: Sequence[str]) -> list[str]:
        return [case for case in case_names(run.raw / whole) if case[6:8] in subjects and case[9:] in renders]

    first = ("00", "01", "02", "03")
    training, tests = chosen(("11", "12", "13", "14"), first), chosen(("15", "16"), first)
    searched = chosen(("11", "12", "13", "14"), ("04", "05"))
    splits = [{"train": training, "val": part} for part in (tests, tests, searched)]
    (run.preprocessed / whole).mkdir(parents=True, exist_ok=True)
    write_splits(run.preprocessed / whole, splits)
    structures = ("Thalamus", "LateralVentricle", "Cerebellum", "Brainstem")
    return _split_tasks(run, "brain", base, whole, structures[:tasks], splits, features, first_id=911)


def _split_tasks(run: Steps, name: str, base: str, whole: str, tasks: Sequence[str], splits: Sequence[Mapping],
                 features: int | None, first_id: int) -> Setting:
    """A data set for each task and for all that are merged together, preprocessed by the base's plans: nnU-Net's own,
    or with so many features small ones."""
    plans = "nnUNetPlans" if features is None else PLANS
    if features is not None:
        write_small_plans(run.preprocessed / base, plans, features)
    structures = {task: (task,) for task in tasks} | {f"Joint{''.join(each)}": each for each in together(tasks)}
    ids = range(first_id, first_id + len(structures))
    datasets = {short: f"Dataset{number}_{short}" for number, short in zip(ids, structures, strict=True)}
    run(run.raw / [*datasets.values()][-1],
        f"nnunet_transplant_split_tasks -d {whole} {'' if whole == base else f'-plans_from {base} '}-tasks "
        + " ".join(f"{short}={'+'.join(each)}" for short, each in structures.items())
        + f" -ids {' '.join(map(str, ids))} -p {plans}")
    for dataset in datasets.values():
        write_splits(run.preprocessed / dataset, splits)
    return Setting(name, run, plans, base, whole, {task: datasets[task] for task in tasks},
                   {each: datasets[f"Joint{''.join(each)}"] for each in together(tasks)})
