"""The regimes and the settings of transplant_experiment.py, data sets made ready for nnU-Net: which cases a base sees,
which its tasks, which choose the weights of merges, and which test."""
import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from nnunetv2.utilities.crossval_split import generate_crossval_split
from steps import PLANS, Steps, case_names, prepare_hippocampus, render, write_small_plans, write_splits

# folds: what trains a base; what trains tasks, with the test cases for validation, and with those of searches
BASE, TEST, SEARCH = 0, 1, 2
MAIN = ("Stable", "Plastic")
PATCH = (32, 40, 32)  # of small plans


class Regime(NamedTuple):
    """How a base is trained. batch: patches of an optimiser step; length: of the training, in that of the main two;
    until: not to its end, but until it is as good as the base of that regime."""
    trainer: str
    batch: int
    length: int = 1
    until: str | None = None


REGIMES = {"Stable": Regime("nnUNetTrainerStable", 4), "Plastic": Regime("nnUNetTrainerPlastic", 8),
           "Plastic, batch 4": Regime("nnUNetTrainerPlasticBatch4", 4),
           "Plastic, dropout 0.5": Regime("nnUNetTrainerPlasticDropout", 8),
           "Plastic, rate 1e-3": Regime("nnUNetTrainerPlasticRate", 8),
           "stock nnU-Net": Regime("nnUNetTrainerStockBatch4", 4),
           "Plastic, 3 times as long": Regime("nnUNetTrainerPlastic", 8, 3),
           "Plastic, rate 1e-3, as good as Stable": Regime("nnUNetTrainerPlasticRateKept", 8, until="Stable"),
           "Stable, as published": Regime("nnUNetTrainerStablePublished", 4),
           "Plastic, as published": Regime("nnUNetTrainerPlasticPublished", 8)}


@dataclass(frozen=True)
class Scale:
    """features: of the first stage, None for nnU-Net's own plans. base_patches: that each base is trained on, in so
    many epochs. task_steps: of eight patches, in so many epochs. suffix: of all trainers. seeds: fine-tunings from a
    main base; their merges' weights are searched in so many trials on so many cases. grid: values of both weights in
    the full map. curvature: options of flatness; eigenvalues: of a main base. all_joints: joint models of all pairs.
    main: the regimes that are compared; changed: regimes beside them. tasks: so many of the setting's. n_patches: that
    merges look at, None for the default. default: whether the default merge (with these options), the base with a
    fitted head, and merges as the paper's code does them are made as well.
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
    main: Sequence[str] = MAIN
    changed: Sequence[str] = ("Plastic, batch 4", "Plastic, dropout 0.5", "Plastic, rate 1e-3", "stock nnU-Net",
                              "Plastic, 3 times as long")
    tasks: int = 4
    n_patches: int | None = 1000  # all that cover the volumes
    default: str | None = None

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
FILE_SCALES = {"toy": replace(TOY, n_patches=None, default=" -steps 2", main=("Stable",), tasks=2),
               "small": replace(SMALL, n_patches=None, default="", changed=()),
               "full": replace(FULL, n_patches=None, default="", changed=())}
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
    is scored on. tasks: data set by structure. joints: data set of several structures that are merged, by these."""
    name: str
    run: Steps
    plans: str
    base: str
    whole: str
    tasks: Mapping[str, str]
    joints: Mapping[tuple[str, ...], str]

    @property
    def merged_tasks(self) -> tuple[str, ...]:
        """The structures that are merged, all together: the first of the tasks."""
        return self.merges[-1]

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
    pairs: list[tuple[str, ...]] = list(combinations(tasks, 2))
    return pairs if len(tasks) == 2 else [*pairs, tuple(tasks)]


def hippocampus(run: Steps, data: Path, scale: Scale) -> Setting:
    """Dataset004_Hippocampus, see `hippocampus_splits`. The base is trained on both structures."""
    name, structures = "Dataset004_Hippocampus", ("Anterior", "Posterior")
    splits = prepare_hippocampus(run, data, hippocampus_splits)
    return _split_tasks(run, "hippocampus", name, name, {each: [each] for each in structures}, splits, scale,
                        first_id=901)


def hippocampus_splits(cases: list[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's first fold keeps its validation cases: three of five test, two choose weights. One half of the others
    trains the base, the other half the tasks."""
    first = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
    tests, searched = ([case for i, case in enumerate(first["val"]) if (i % 5 < 3) == part] for part in (True, False))
    return [{"train": first["train"][half::2], "val": kept} for half, kept in ((0, tests), (1, tests), (1, searched))]


def brain(run: Steps, label_maps: Path, scale: Scale) -> Setting:
    """Volumes of 4 mm rendered from brain anatomies: the base sees T1 contrast with 11 structures (subjects 1 to 10),
    the tasks T2 contrast of subjects 11 to 14, four renderings of each; two more choose weights. Subjects 15 and 16
    test, four renderings of each."""
    base, whole = "Dataset201_BrainT1", "Dataset202_BrainT2"
    for name, contrast, subjects, renders in ((base, "t1", "1-10", 4), (whole, "t2", "11-16", 6)):
        render(run, label_maps, name, contrast, subjects, renders)
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
    return _split_tasks(run, "brain", base, whole, {each: [each] for each in structures[:scale.tasks]}, splits, scale,
                        first_id=911)


def from_file(run: Steps, file: Path, data: Path, name: str) -> tuple[Setting, Scale]:
    """A setting of any two nnU-Net datasets, as a file of settings/ says (see its README), and the scale of this name.

    data: the folder that holds the datasets.
    """
    told = json.loads(file.read_text())
    scale = replace(FILE_SCALES[name], **told.get("scales", {}).get(name, {}))
    base, whole = told["base"]["dataset"], told["tasks"]["dataset"]
    run.raw.mkdir(parents=True, exist_ok=True)
    for dataset in {base, whole}:
        if not (run.raw / dataset).exists():
            shutil.copytree(data / dataset, run.raw / dataset)
    run(run.preprocessed / base / "nnUNetPlans_3d_fullres",
        f"nnUNetv2_plan_and_preprocess -d {int(base[7:10])} -c 3d_fullres -np 2")
    cases = case_names(run.raw / base)
    own = told["base"].get("train", cases[:-4])
    write_splits(run.preprocessed / base, [{"train": own, "val": [case for case in cases if case not in own] or own}])
    parts = told["tasks"] if "train" in told["tasks"] else task_cases(case_names(run.raw / whole))
    splits = [{"train": parts["train"], "val": parts[part]} for part in ("test", "test", "search")]
    if whole == base:
        splits[BASE] = {"train": own, "val": parts["test"]}
    (run.preprocessed / whole).mkdir(parents=True, exist_ok=True)
    write_splits(run.preprocessed / whole, splits)
    return _split_tasks(run, told["name"], base, whole, told["tasks"]["structures"], splits, scale, told["first_id"],
                        told.get("patch_size", PATCH), told.get("regions", False)), scale


def task_cases(cases: list[str]) -> dict[str, list[str]]:
    """nnU-Net's first fold: its training cases train the tasks; three of five of its validation cases test, two choose
    weights, at least one."""
    first = generate_crossval_split(cases, seed=12345, n_splits=5)[0]
    unseen = list(map(str, first["val"]))
    search = [case for i, case in enumerate(unseen) if i % 5 >= 3] or unseen[-1:]
    return {"train": list(map(str, first["train"])), "test": [case for case in unseen if case not in search],
            "search": search}


def _split_tasks(run: Steps, name: str, base: str, whole: str, structures: Mapping[str, Sequence[str]],
                 splits: Sequence[Mapping], scale: Scale, first_id: int, patch_size: Sequence[int] = PATCH,
                 regions: bool = False) -> Setting:
    """A data set for each task, and for all of the first ones that are merged together, preprocessed by the base's
    plans: nnU-Net's own, or small ones. structures: the labels of each task, which it joins."""
    plans = "nnUNetPlans" if scale.features is None else PLANS
    if scale.features is not None:
        write_small_plans(run.preprocessed / base, plans, scale.features, patch_size)

    source = f"-d {whole}{'' if whole == base else f' -plans_from {base}'} -p {plans}{' --regions' * regions}"

    def split(tasks: Mapping[str, Sequence[str]], first: int) -> dict[str, str]:
        """Of each name the tasks that it is of -> its data set."""
        labels = {short: "+".join(",".join(structures[task]) for task in each) for short, each in tasks.items()}
        return split_tasks(run, source, labels, first, splits)

    datasets = split({task: [task] for task in structures}, first_id)
    merges = together(list(structures)[:scale.tasks])
    joints = split({f"Joint{''.join(each)}": each for each in merges}, first_id + len(structures))
    return Setting(name, run, plans, base, whole, datasets, dict(zip(merges, joints.values(), strict=True)))


def split_tasks(run: Steps, source: str, labels: Mapping[str, str], first_id: int, splits: Sequence[Mapping]
                ) -> dict[str, str]:
    """The data set of each task. source: options of the command; labels: of each task, as it takes them."""
    datasets = {name: f"Dataset{first_id + i}_{name}" for i, name in enumerate(labels)}
    run(run.raw / [*datasets.values()][-1],
        f"nnunet_transplant_split_tasks {source} -tasks "
        + " ".join(shlex.quote(f"{name}={structures}") for name, structures in labels.items())
        + f" -ids {' '.join(str(first_id + i) for i in range(len(labels)))}")
    for dataset in datasets.values():
        write_splits(run.preprocessed / dataset, splits)
    return datasets
