"""The tables and figures of transplant_experiment.py, from whatever of its results is there."""
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from transplant_settings import MAIN, REGIMES, curvature_folder, folder_name, merge_name

from nnunet_transplant.figures.common import MODEL_COLOURS, save_figure
from nnunet_transplant.figures.evaluation import save_dice_figure

TITLES = {f"{method} {kind}": title + more for method, title in (("average", "average"), ("ties", "TIES"))
          for kind, more in (("default", ""), ("published", ", as published"), ("searched", ", searched"),
                             ("fitted", ", head fitted"))}
TITLES |= {"average nothing": "base, head fitted", "average learned": "the default merge"}


def families(work: Path) -> Iterator[tuple[str, int, Path]]:
    """(regime, seed, folder) of everything that was fine-tuned so far."""
    for regime in REGIMES:
        for folder in sorted(work.glob(f"{folder_name(regime)}_[0-9]")):
            yield regime, int(folder.name.rpartition("_")[2]), folder


def scores(work: Path) -> pd.DataFrame:
    """Dice of each case: regime, seed, kind of model, tasks that it is of, structure, case, dice. Leaves where nothing
    is scored yet."""
    found = []
    for regime, seed, folder in families(work):
        for file in sorted(folder.glob("scores/*/evaluation.csv")):
            table = pd.read_csv(file)
            named = [_kind(file.parent.name, label) for label in table["model"]]
            found.append(table.assign(regime=regime, seed=seed, kind=[kind for kind, _ in named],
                                      tasks=[tasks for _, tasks in named]))
    if not found:
        raise SystemExit(f"{work} has no scores yet")
    return pd.concat(found, ignore_index=True)


def _kind(folder: str, label: str) -> tuple[str, str]:
    """What a row of an evaluation is about, from how the experiment names its folders."""
    if match := re.fullmatch(r"(average|ties)_(default|published|searched|fitted|grid|learned|nothing)_(.+)", label):
        return f"{match[1]} {match[2]}", match[3]
    if folder.startswith("joint_"):
        return "joint", folder.removeprefix("joint_")
    if label == "heads_only":
        return "heads only", ""
    return ("base", "") if folder == "base" else ("expert", _task(label))


def _task(label: str) -> str:
    """That an expert is of."""
    match = re.fullmatch(r"Dataset\d+_(.+?)__.+", label)
    assert match is not None, label
    return match[1]


def means(table: pd.DataFrame) -> pd.Series:
    """The mean Dice over structures and cases, every structure with the same weight, of each model: by regime, seed,
    kind and tasks."""
    keys = ["regime", "seed", "kind", "tasks"]
    return table.groupby([*keys, "structure"])["dice"].mean().groupby(keys).mean()


def curvature(work: Path, main: Sequence[str]) -> dict[str, dict]:
    """What flatness measured of each regime's base."""
    found = {}
    for regimes in (main, *([regime] for regime in REGIMES)):
        file = curvature_folder(work, regimes) / "flatness.json"
        if file.exists():
            found |= zip(regimes, json.loads(file.read_text())["models"].values(), strict=True)
    return found


def table_1(dice: pd.Series, measured_bases: Mapping[str, dict]) -> pd.DataFrame:
    """Each base's Dice and the width of its minimum (U-Net Transplant, Table 1)."""
    rows = {}
    for regime, measured in measured_bases.items():
        rows[regime] = [f"{dice[regime, 0, 'base', '']:.3f}", f"{measured['loss']:.3f}",
                        f"{measured['fisher_trace']:.3g}", f"{measured['fisher_largest'][0]:.2g}",
                        f"{measured['hessian_eigenvalues'][0]:.3g}",
                        f"{measured['hessian_trace']:.3g} ± {measured['hessian_trace_error']:.2g}"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[
        "Dice", "loss", "Fisher trace", "largest of Fisher", "lambda_1", "Hessian trace"]).reindex(
            [regime for regime in REGIMES if regime in rows])


def table_3(dice: pd.Series, merges: Sequence[Sequence[str]], paper: Mapping[str, Any]) -> pd.DataFrame:
    """Tasks that are merged (in the order of `merges`) x method and weights, beside experts and the joint model: mean
    over the fine-tunings, and where there are several, their range (U-Net Transplant, Table 3).

    paper: its own numbers, by regime, tasks and column."""
    experts = dice.xs("expert", level="kind")
    rows = {}
    for regime in REGIMES:
        if regime not in dice.index.get_level_values("regime"):
            continue
        for tasks in map("-".join, merges):
            each = {kind: dice[regime].xs(kind, level="kind").xs(tasks, level="tasks")
                    for kind in (*TITLES, "joint") if (regime, 0, kind, tasks) in dice.index}
            of_experts = pd.concat([experts[regime].xs(task, level="tasks") for task in tasks.split("-")])
            rows[regime, tasks.replace("-", ", ")] = {
                **{TITLES.get(kind, kind): _with_range(values) for kind, values in each.items()},
                "experts": _with_range(of_experts.groupby("seed").mean())}
    rows |= {(f"{regime}, the paper's", tasks): {column: f"{value:.3f}" for column, value in row.items()}
             for regime, table in paper.items() for tasks, row in table.items()}
    columns = [title for title in (*TITLES.values(), "joint", "experts") if any(title in row for row in rows.values())]
    return pd.DataFrame.from_dict(rows, orient="index").reindex(columns=columns)


def others(dice: pd.Series) -> pd.DataFrame:
    """The base as it is, and with new heads only."""
    found = pd.DataFrame({kind: dice.xs(kind, level="kind").groupby("regime").mean()
                          for kind in ("base", "heads only") if kind in dice.index.get_level_values("kind")})
    return found.loc[[regime for regime in REGIMES if regime in found.index]]


def maps(work: Path, main: Sequence[str], tasks: Sequence[str]) -> pd.DataFrame:
    """Mean Dice over the grids of the weights of these two tasks (U-Net Transplant, Fig. 3): at the default, at the
    best, the best that a search of so few merges finds on the same cases, and the share of the grid that is less than
    0.05 below the best."""
    rows = {}
    for regime in main:
        family = work / f"{folder_name(regime)}_0"
        for name, title in (("map", "joined heads"), ("map_fitted", "fitted heads")):
            if not (family / name / "sweep.csv").exists():
                continue
            dice = pd.read_csv(family / name / "sweep.csv").drop_duplicates(["w_1", "w_2"])["dice_mean"]
            rows[regime, title] = {"merges": str(len(dice)), "default": dice.iloc[0], "best": dice.max(),
                                   "within 0.05 of the best": f"{100 * (dice > dice.max() - 0.05).mean():.0f} %"}
            search = family / "searches" / merge_name("average", "searched", tasks) / "sweep.csv"
            if name == "map" and search.exists():
                found = pd.read_csv(search)["dice_mean"]
                rows[regime, title]["best of a search"] = f"{found.max():.3f} ({len(found)} merges)"
    columns = ["merges", "default", "best", "best of a search", "within 0.05 of the best"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns) if rows else pd.DataFrame(columns=columns)


def _with_range(values: Sequence[float]) -> str:
    values = np.asarray(values)
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


def pairs(work: Path, dice: pd.Series, measured: Mapping[str, dict]) -> pd.DataFrame:
    """Every pair that was merged: what was known before, and what merging with default weights lost of the experts'
    Dice."""
    rows = []
    for regime, seed, folder in families(work):
        file = folder / "interference" / "interference.csv"
        if not file.exists():
            continue
        table = pd.read_csv(file)
        whole = table[table["stage"] == table["stage"].iloc[-1]]
        norms = whole[whole["other"].isna() & whole["task"].notna()].set_index("task")["norm"]
        for _, pair in whole[whole["other"].notna()].iterrows():
            tasks = [_task(label) for label in (pair["task"], pair["other"])]
            lengths = norms[[pair["task"], pair["other"]]]
            row = {"regime": regime, "seed": seed, "tasks": ", ".join(tasks), "cosine": pair["cosine"],
                   "sign conflict": pair["sign_conflict"], "overlap": pair["overlap"], "norm": lengths.mean()}
            if regime in measured:
                row["loss of the base"] = measured[regime]["loss"]
                row["lambda_1"] = measured[regime]["hessian_eigenvalues"][0]
                row["bound"] = 0.5 * row["lambda_1"] * (lengths ** 2).mean()
            experts = np.mean([dice[regime, seed, "expert", task] for task in tasks])
            for kind in ("average default", "ties default", "average fitted", "ties fitted"):
                row[f"lost by {TITLES[kind]}"] = experts - dice[regime, seed, kind, "-".join(tasks)]
            rows.append(row)
    return pd.DataFrame(rows)


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho between what is known before and what merging loses, of five pairs or more, each the mean of its
    fine-tunings."""
    table = table.groupby(["regime", "tasks"]).mean(numeric_only=True)
    if len(table) < 5:
        return pd.DataFrame()
    known = ("cosine", "sign conflict", "overlap", "norm", "loss of the base", "lambda_1", "bound")
    before = [name for name in known if name in table]
    lost = [name for name in table if name.startswith("lost by")]
    return pd.DataFrame({name: {each: spearmanr(table[each], table[name], nan_policy="omit").statistic
                                for each in before} for name in lost})


def save_all_tasks_figure(table: pd.DataFrame, main: Sequence[str], tasks: Sequence[str], path: Path) -> None:
    """U-Net Transplant, Fig. 4: all tasks in one model, by both methods from both bases; a dot is a fine-tuning."""
    table = table[table["tasks"] == "-".join(tasks)]
    structures = list(table["structure"].unique())
    dice: dict[tuple[str, str], list[float]] = {}
    models: list[str] = []
    for kind in ("average default", "ties default", "average fitted", "ties fitted", "average nothing",
                 "average learned"):
        for regime in main:
            rows = table[(table["regime"] == regime) & (table["kind"] == kind)]
            if rows.empty:
                continue
            models.append(f"{regime} base, {TITLES[kind]}")
            by_seed = rows.groupby(["seed", "structure"])["dice"].mean().unstack()
            dice |= {(structure, models[-1]): by_seed[structure].tolist() for structure in structures}
            dice["mean", models[-1]] = by_seed.mean(axis=1).tolist()
    if dice:
        save_dice_figure(dice, [*structures, "mean"], models, f"{len(tasks)} tasks merged into one model", path)


def save_summary_figure(dice: Mapping[str, pd.Series], tasks: Mapping[str, Sequence[str]], path: Path) -> None:
    """What base, head and merging are worth: all tasks of each setting in one model; a dot is a fine-tuning.

    dice: `means` of each setting; tasks: the setting's."""
    bars = {}
    for kind, title in (("average default", "average"), ("average fitted", "average, head fitted"),
                        ("average nothing", TITLES["average nothing"]), ("average learned", TITLES["average learned"]),
                        ("joint", "trained on all tasks together"), ("expert", "experts, a model for each task")):
        for regime in reversed(MAIN):
            for setting, known in dice.items():
                if (regime, kind) in known.droplevel(["seed", "tasks"]).index:
                    rows = known.xs((regime, kind), level=("regime", "kind"))
                    wanted = [*tasks[setting]] if kind == "expert" else ["-".join(tasks[setting])]
                    bars[_group(setting, tasks), f"{regime} base: {title}"] = (
                        rows.unstack()[wanted].mean(axis=1).dropna().tolist())
    models = [*dict.fromkeys(model for _, model in bars)]
    save_dice_figure(bars, [_group(setting, tasks) for setting in dice], models, "Several tasks in one model", path)


def save_bases_figure(known: Mapping[str, pd.DataFrame], path: Path) -> None:
    """What merging loses over the base's loss, and over the width of its minimum: a dot is a pair of tasks that was
    fine-tuned once. known: the `pairs` of each setting. No figure before curvature is measured."""
    tables = {setting: table.dropna(subset="lambda_1") for setting, table in known.items() if "lambda_1" in table}
    if not tables:
        return
    lost = "lost by average, head fitted"
    measures = {"loss of the base": "loss of the base on its own cases",
                "lambda_1": "lambda_1 of the base (lower is wider)"}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    row = figure.subplots(1, 2, sharey=True)
    for axes, (measure, title) in zip(row, measures.items(), strict=True):
        for (setting, table), marker in zip(tables.items(), "os", strict=False):
            for regime, rows in table.groupby("regime", sort=False):
                axes.scatter(rows[measure], rows[lost], marker=marker, edgecolors="black", linewidths=0.5,
                             color=MODEL_COLOURS[[*REGIMES].index(regime)], label=f"{setting}: {regime}")
        axes.set_xlabel(title)
        axes.grid(alpha=0.4)
        axes.set_axisbelow(True)
    row[1].set_xscale("log")
    row[1].margins(x=0.15)
    row[1].tick_params(which="minor", labelbottom=False)
    row[0].set_ylabel("Dice lost by merging a pair\n(average, head fitted)")
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9, ncols=3)
    save_figure(figure, path)


def _group(setting: str, tasks: Mapping[str, Sequence[str]]) -> str:
    return f"{setting}, {len(tasks[setting])} tasks"


def markdown(table: pd.DataFrame) -> str:
    """A table for documentation; no dependency more."""
    rows = [[*(str(part) for part in (index if isinstance(index, tuple) else (index,))),
             *("" if isinstance(cell, float) and np.isnan(cell) else f"{cell:.3f}" if isinstance(cell, float)
               else str(cell) for cell in row)] for index, row in zip(table.index, table.to_numpy(object), strict=True)]
    head = [*(name or "" for name in table.index.names), *map(str, table.columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between the two comments with this name, which the page must have."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page} has no place for {name}: it needs the lines {begin} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
