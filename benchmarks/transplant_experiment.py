"""Does a stable base make models merge? U-Net Transplant's experiments (Lumetti et al., MICCAI 2025) on open data.

    python benchmarks/transplant_experiment.py WORK -hippocampus DATA/Dataset004_Hippocampus \
        -brain LABEL_MAPS -documentation documentation/experiments
    python benchmarks/transplant_experiment.py WORK --setting benchmarks/settings/mouse.json -data DATA

Trains bases under the paper's two regimes and with one thing changed at a time, all on as many patches; fine-tunes task
vectors from them, as often as the scale says from the two main ones; merges all pairs and all tasks, with default
weights and with weights searched on cases of their own; and scores everything on cases that no training and no search
saw. Beside them joint models, experts, and the base with new heads only. Then it measures curvature and interference.

Every step is a command a user types, run as such. A step whose result is there is skipped, a training that was cut off
continues, so an interrupted run goes on. Without -documentation it prints the tables; with --tables it only makes them,
from what is there so far.
"""
import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from steps import Steps
from transplant_settings import (
    BASE,
    REGIMES,
    SCALES,
    SEARCH,
    TEST,
    Scale,
    Setting,
    brain,
    curvature_folder,
    folder_name,
    from_file,
    hippocampus,
    merge_name,
)
from transplant_tables import (
    curvature,
    maps,
    markdown,
    means,
    others,
    pairs,
    rank_correlations,
    save_all_tasks_figure,
    save_bases_figure,
    save_summary_figure,
    scores,
    table_1,
    table_3,
    write_section,
)

TABLES = ("bases", "merges", "bases with new heads", "maps", "pairs", "rank correlations")
# the method with default weights; that of a search, and what it searches beside weights (those of ties are only ratios)
METHODS = {"average": ("task_arithmetic", ""), "ties": ("ties", " -search lambda=0:2")}
# the same as the paper's code does them, see documentation/experiments/published_code.md
PUBLISHED = {"average": " -method task_arithmetic -weights{shares}",
             "ties": " -method ties -trim tensor -density 0.1"}


@dataclass(frozen=True)
class Family:
    """What was fine-tuned once from a base, and the folder of everything that is made of it."""
    regime: str
    seed: int
    base: Path
    experts: dict[str, Path]
    work: Path

    def models(self, tasks: Sequence[str]) -> str:
        return " ".join(str(self.experts[task]) for task in tasks)


class Experiment:
    """One setting: its steps, in the order of what they tell."""

    def __init__(self, setting: Setting, scale: Scale, device: str) -> None:
        self.setting, self.scale, self.device, self.run = setting, scale, device, setting.run
        self.work = setting.run.work

    def base(self, regime: str) -> Path:
        trainer, batch, length, until = REGIMES[regime]
        steps = self.scale.base_patches // batch * length
        model = self._train(self.run, self.setting.base, BASE,
                            self.scale.trainer(trainer, self.scale.base_epochs, steps))
        return model if until is None else self._early(model, self.base(until))

    def _early(self, model: Path, other: Path) -> Path:
        """A model folder of the first of its epochs that is as good as another base, on cases that neither saw."""
        folder, epoch = self.work / "early" / model.name, 0
        if folder.exists():
            return folder
        goal, dice = self._validation_dice(other, "checkpoint_final.pth"), -1.0
        while dice < goal:
            epoch += 1
            dice = self._validation_dice(model, f"checkpoint_epoch_{epoch}.pth")
        print(f"{model.name}: {dice:.3f} after {epoch} epochs, {other.name}: {goal:.3f}", flush=True)
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checkpoint_*", "validation"))
        shutil.copy(model / f"fold_{BASE}" / f"checkpoint_epoch_{epoch}.pth",
                    folder / f"fold_{BASE}" / "checkpoint_final.pth")
        return folder

    def _validation_dice(self, model: Path, checkpoint: str) -> float:
        """The mean over structures, on cases for choices, or where the base has a data set of its own, on this one's.
        """
        same = self.setting.base == self.setting.whole
        output = self.work / "early" / "scores" / f"{model.name}_{Path(checkpoint).stem}"
        self.run(output, f"nnunet_transplant_evaluate -m {model} -chk {checkpoint} -d {self.setting.base} "
                         f"-f {SEARCH if same else BASE} -o {output} -device {self.device}")
        return float(pd.read_csv(output / "evaluation.csv").groupby("structure")["dice"].mean().mean())

    def family(self, regime: str, seed: int) -> Family:
        base = self.base(regime)
        name = f"{folder_name(regime)}_{seed}"
        experts = {task: self._tune(self.setting.tasks[task], base, name) for task in self.setting.merged_tasks}
        return Family(regime, seed, base, experts, self.work / name)

    def _tune(self, dataset: str, base: Path, results: str, trainer: str = "nnUNetTrainerTaskVector") -> Path:
        return self._train(self.run.into(f"{results}/results"), dataset, TEST,
                           self.scale.trainer(trainer, self.scale.task_epochs, self.scale.task_steps), base)

    def _train(self, run: Steps, dataset: str, fold: int, trainer: str, base: Path | None = None) -> Path:
        model = run.model(dataset, trainer, self.setting.plans)
        start = "" if base is None else f" -pretrained_weights {base}/fold_{BASE}/checkpoint_final.pth"
        if (model / f"fold_{fold}" / "checkpoint_latest.pth").exists():
            start = " --c"
        run(model / f"fold_{fold}" / "checkpoint_final.pth",
            f"nnUNetv2_train {dataset} 3d_fullres {fold} -tr {trainer} -p {self.setting.plans} "
            f"-device {self.device}{start}")
        return model

    # -----------------------------------------------------------------------------------------------------------------
    # What is made of a family

    def merge(self, family: Family) -> None:
        """All merges with default weights, scored beside the experts and the base; and with looking at a few volumes,
        without labels, which is not the papers': the same with the head fitted, the default merge, and the base with
        its head fitted."""
        look = f" -d {self.setting.whole} -cases train:{TEST} -device {self.device}"
        head = f" -fit head -n_cases {self.scale.search_cases}{self._patches}{look}"
        kinds = {"default": {method: f" -method {method}" for method in METHODS},
                 "fitted": {method: f" -method {method}{head}" for method in METHODS}}
        if self.scale.default is not None:
            kinds |= {"published": PUBLISHED, "learned": {"average": look + self.scale.default},
                      "nothing": {"average": f" -method task_arithmetic -weights {{zeros}} -fit head{look}"}}
        for kind, merges in kinds.items():
            models = [*family.experts.values()] if kind == "default" else []
            for tasks in self.setting.merges:
                for method, options in merges.items():
                    models.append(family.work / "merged" / merge_name(method, kind, tasks))
                    self.run(models[-1], f"nnunet_transplant_merge -m {family.models(tasks)} -f {TEST} -o {models[-1]}"
                                         + options.format(zeros=" ".join("0" * len(tasks)),
                                                          shares=f" {1 / (len(tasks) - 1):.6f}" * len(tasks)))
            self._score(family, kind, models)
        if family.seed == 0:
            self._score(family, "base", [family.base], self.setting.base, BASE)

    def search(self, family: Family) -> None:
        """The same with searched weights."""
        merged = []
        for tasks in self.setting.merges:
            for method, (turned, more) in METHODS.items():
                name = merge_name(method, "searched", tasks)
                sweep = family.work / "searches" / name
                self._sweep(family, tasks, sweep, f"-trials {self.scale.trials} -sampler gp -method {turned}{more}")
                merged.append(family.work / "merged" / name)
                self.run(merged[-1], f"nnunet_transplant_merge -m {family.models(tasks)} -f {TEST} -o {merged[-1]} "
                                     f"-recipe {sweep}/recipe.json")
        self._score(family, "searched", merged)

    def map(self, family: Family) -> None:
        """The paper's Fig. 3, of the first two tasks, and the merge with its best weights; then the same coarser, with
        the head of every merge fitted."""
        tasks = self.setting.merges[0]
        sweep = family.work / "map"
        self._sweep(family, tasks, sweep, f"-grid {self.scale.grid}")
        self._sweep(family, tasks, family.work / "map_fitted", f"-grid {(self.scale.grid + 1) // 2} -fit head")
        merged = family.work / "merged" / merge_name("average", "grid", tasks)
        self.run(merged, f"nnunet_transplant_merge -m {family.models(tasks)} -f {TEST} -o {merged} "
                         f"-recipe {sweep}/recipe.json")
        self._score(family, "grid", [merged])

    def _sweep(self, family: Family, tasks: Sequence[str], output: Path, options: str) -> None:
        self.run(output / "recipe.json",
                 f"nnunet_transplant_sweep -m {family.models(tasks)} -d {self.setting.whole} -f {SEARCH} -tune 1 "
                 f"-n_cases {self.scale.search_cases}{self._patches} -device {self.device} -o {output} {options}")

    @property
    def _patches(self) -> str:
        return "" if self.scale.n_patches is None else f" -n_patches {self.scale.n_patches}"

    def heads_only(self, family: Family) -> None:
        """The base as it is with new heads, merged: what merging is to beat."""
        models = [self._tune(self.setting.tasks[task], family.base, family.work.name, "nnUNetTrainerHeadsOnly")
                  for task in self.setting.merged_tasks]
        merged = family.work / "merged" / "heads_only"
        self.run(merged, f"nnunet_transplant_merge -m {' '.join(map(str, models))} -f {TEST} -o {merged}")
        self._score(family, "heads_only", [merged])

    def joint(self, family: Family) -> None:
        """One model trained for several tasks at once: of all, of the pair that merges best, and of the worst."""
        scores = pd.read_csv(family.work / "scores" / "default" / "evaluation.csv").groupby("model")["dice"].mean()
        pairs = sorted((each for each in self.setting.merges if len(each) == 2),
                       key=lambda each: scores[merge_name("average", "default", each)])
        every = self.setting.merges[-1]
        chosen = self.setting.merges if self.scale.all_joints else dict.fromkeys((every, pairs[-1], pairs[0]))
        for tasks in chosen:
            model = self._tune(self.setting.joints[tasks], family.base, family.work.name)
            self._score(family, f"joint_{'-'.join(tasks)}", [model])

    def _score(self, family: Family, name: str, models: Sequence[Path], dataset: str | None = None,
               fold: int = TEST) -> None:
        output = family.work / "scores" / name
        self.run(output, f"nnunet_transplant_evaluate -m {' '.join(map(str, models))} "
                         f"-d {dataset or self.setting.whole} -f {fold} -o {output} -device {self.device}")

    # -----------------------------------------------------------------------------------------------------------------
    # What may say beforehand how a family merges

    def curvature(self, families: Sequence[Family]) -> None:
        """Of each family's base, on the cases it was trained on: a minimum is one of these cases' loss."""
        tasks = " ".join(str(expert) for family in families for expert in family.experts.values())
        bases = " ".join(dict.fromkeys(str(family.base) for family in families))
        regimes = [family.regime for family in families]
        output = curvature_folder(self.work, regimes)
        eigenvalues = self.scale.eigenvalues if regimes == [*self.scale.main] else 1
        self.run(output, f"nnunet_transplant_flatness -m {bases} -tasks {tasks} -d {self.setting.base} "
                         f"-cases train:{BASE} {self.scale.curvature} -n_eigenvalues {eigenvalues} "
                         f"-device {self.device} -o {output}")

    def interference(self, family: Family) -> None:
        output = family.work / "interference"
        self.run(output, f"nnunet_transplant_interference -m {family.models(self.setting.merged_tasks)} -f {TEST} "
                         f"-o {output}")

    def __call__(self) -> None:
        """In the order of what it tells: the main bases, the bases with one change, more fine-tunings of the main ones.
        """
        first = [self._merged_family(regime, 0) for regime in self.scale.main]
        self.curvature(first)
        for family in first:
            self.map(family)
            self.search(family)
        changed = [self._merged_family(regime, 0) for regime in self.scale.changed]
        for family in changed:
            self.curvature([family])
        for family in (*first, *changed):
            self.heads_only(family)
        for family in first:
            self.joint(family)
        for seed in range(1, self.scale.seeds):
            for regime in self.scale.main:
                self.search(self._merged_family(regime, seed))

    def _merged_family(self, regime: str, seed: int) -> Family:
        family = self.family(regime, seed)
        self.merge(family)
        self.interference(family)
        return family


def show(setting: Setting, main: Sequence[str], table: pd.DataFrame, dice: pd.Series, known: pd.DataFrame,
         measured: Mapping[str, dict], paper: Mapping[str, Any], documentation: Path | None) -> None:
    """Print the tables, or write them and the figures into the documentation. main: the regimes compared; table:
    `scores`; dice: their means; known: `pairs`; measured: `curvature`; paper: its own numbers, see `table_3`."""
    work = setting.run.work
    tables = (table_1(dice, measured), table_3(dice, setting.merges, paper), others(dice),
              maps(work, main, setting.merges[0]), known.set_index(["regime", "seed", "tasks"]),
              rank_correlations(known))
    for name, content in zip(TABLES, tables, strict=True):
        if documentation is None:
            print(f"{setting.name}: {name}\n{content.to_string()}\n")
        else:
            write_section(documentation / "stable_base.md", f"{setting.name}: {name}",
                          markdown(content) if len(content) else "Not measured.")
    if documentation is not None:
        figures = {curvature_folder(work, main) / "flatness.png": "flatness"} | {
            work / f"{folder_name(regime)}_0" / name / "sweep.png": f"{name}_{folder_name(regime).lower()}"
            for regime in main for name in ("map", "map_fitted")}
        for figure, name in figures.items():
            if figure.exists():
                shutil.copy(figure, documentation / f"{setting.name}_{name}.png")
        if len(setting.merged_tasks) > 2:
            save_all_tasks_figure(table, main, setting.merged_tasks, documentation / f"{setting.name}_merged.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for everything that is trained and measured")
    parser.add_argument("-hippocampus", type=Path, help="Dataset004_Hippocampus in nnU-Net raw format")
    parser.add_argument("-brain", type=Path, help="label maps, see render_brains.py")
    parser.add_argument("--setting", type=Path, help="FILE.json: any two nnU-Net datasets, see settings/README.md")
    parser.add_argument("-data", type=Path, help="with --setting: the folder of its datasets, in nnU-Net raw format")
    parser.add_argument("-documentation", type=Path, help="folder whose stable_base.md and figures are written anew")
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--tables", action="store_true", help="train and measure nothing")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    dice, tasks, known = {}, {}, {}
    for setting, scale, paper in wanted(args):
        if not args.tables:
            Experiment(setting, scale, args.device)()
        table = scores(setting.run.work)
        dice[setting.name], tasks[setting.name] = means(table), setting.merged_tasks
        measured = curvature(setting.run.work, scale.main)
        known[setting.name] = pairs(setting.run.work, dice[setting.name], measured)
        show(setting, scale.main, table, dice[setting.name], known[setting.name], measured, paper, args.documentation)
    if args.documentation is not None and dice:
        save_summary_figure(dice, tasks, args.documentation / "transplant.png")
        save_bases_figure(known, args.documentation / "transplant_bases.png")


def wanted(args: argparse.Namespace) -> Iterator[tuple[Setting, Scale, Mapping[str, Any]]]:
    """The settings that are asked for, their scales, and the paper's own numbers of them."""
    for name, data, prepare in (("hippocampus", args.hippocampus, hippocampus), ("brain", args.brain, brain)):
        if data is not None:
            scale = SCALES[args.scale][name]
            yield prepare(Steps(args.work / name), data.resolve(), scale), scale, {}
    if args.setting is not None:
        told = json.loads(args.setting.read_text())
        yield *from_file(Steps(args.work / told["name"]), args.setting, args.data, args.scale), told.get("paper", {})


if __name__ == "__main__":
    main()
