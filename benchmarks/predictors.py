"""Does anything known beforehand say that a pair of tasks will merge badly? On the mouse brains, with the models that
transplant_experiment.py and default_merge.py trained:

    python benchmarks/predictors.py WORK/mouse

All pairs of the tasks of every family (what was fine-tuned from one base, in one run), averaged, with joined heads and
with fitted ones. Known before: the interference of the two task vectors, the base's loss and lambda_1 (flatness), and
what a merge with images says by itself, without labels: its agreement with the experts on patches that were held back.
Rank correlations with what the average loses of the experts' Dice on the test animals. Their intervals (95 %) are of
1000 draws of the tasks, as pairs share tasks. What pairs.csv has is not merged again.
"""
import argparse
import os
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from default_merge import score
from merge_settings import MOUSE, MOUSE_FILE, MOUSE_TASK
from scipy.stats import spearmanr
from steps import PLANS, Steps
from transplant_settings import SEARCH, TEST, from_file
from transplant_tables import curvature, families, markdown

from nnunet_transplant.analysis.interference import interference
from nnunet_transplant.analysis.scoring import LabelledCase, open_labelled_cases
from nnunet_transplant.data.cases import Cases, evaluation_cases
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.merging import merge
from nnunet_transplant.model_folder import open_models

KNOWN = ("cosine", "sign_conflict", "overlap", "norm", "loss of the base", "lambda_1", "agreement",
         "agreement of the base")
LOST = ("lost by average", "lost by average, head fitted")
DRAWS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="that of the mouse setting")
    parser.add_argument("-data", type=Path, default=Path(), help="folder of the dataset, where it is not in WORK yet")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    run = Steps(args.work)
    os.environ.update(run.environment)
    use_our_trainers()
    setting, scale = from_file(run, MOUSE_FILE, args.data, "small")
    cases = evaluation_cases(MOUSE, TEST, None)
    file = run.work / "pairs.csv"
    measured = curvature(run.work, scale.main)
    scored: list[LabelledCase] = []
    for regime, seed, folder in families(run.work):
        experts = {task: path for task, dataset in setting.tasks.items()
                   if (path := checkpoint(folder, dataset)).exists()}
        if len(experts) < 2:
            continue
        scored = scored or open_labelled_cases(cases, open_models(next(iter(experts.values())))[0])
        of_base = {"loss of the base": measured[regime]["loss"],
                   "lambda_1": measured[regime]["hessian_eigenvalues"][0]} if regime in measured else {}
        measure(f"{regime}, {seed}", experts, of_base, scored, cases, file, run.work, args.device)
    table = pd.read_csv(file)
    for name, rows in [("all", table), *table.groupby("family")]:
        if len(rows) >= 10:
            print(f"\n{name}: {len(rows)} pairs\n{markdown(correlations(rows))}")


def checkpoint(folder: Path, dataset: str) -> Path:
    return folder / "results" / dataset / f"{MOUSE_TASK}__{PLANS}__3d_fullres" / f"fold_{TEST}" / "checkpoint_final.pth"


def measure(family: str, experts: Mapping[str, Path], of_base: Mapping[str, float], scored: list[LabelledCase],
            cases: Cases, file: Path, work: Path, device: str) -> None:
    """Merge and score the pairs that the file does not have yet, and add them to it."""
    done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=["family", "tasks"])
    wanted = [pair for pair in combinations(experts, 2)
              if not ((done["family"] == family) & (done["tasks"] == ", ".join(pair))).any()]
    if not wanted:
        return
    alone = {task: score([path], scored, cases, device)[task].mean() for task, path in experts.items()}
    before = interfering(experts, work / "interference" / family.replace(", ", "_").replace(" ", "_"))
    for pair in wanted:
        row = {"family": family, "tasks": ", ".join(pair), **before[pair], **of_base}
        for name, options in (("average", {}), ("average, head fitted", {
                "fit": "head", "images": MOUSE, "cases": f"train:{SEARCH}"})):
            merged = merge([experts[task] for task in pair], method="average", device=device, **options)
            merged.save(work / "pair", overwrite=True)
            found = score([work / "pair"], scored, cases, device)
            row[f"lost by {name}"] = float(np.mean([alone[task] - found[task].mean() for task in pair]))
        agreement = merged.provenance["check"]["agreement"]
        for column, said in zip(("agreement", "agreement of the base"), agreement.values(), strict=True):
            row[column] = float(np.nanmean([np.nan if dice is None else dice for dice in said.values()]))
        done = pd.concat([done, pd.DataFrame([row])], ignore_index=True)
        done.to_csv(file, index=False)
        print(row, flush=True)


def interfering(experts: Mapping[str, Path], output: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """Of each pair what `interference` says of the whole network."""
    result = interference(list(experts.values()), output=output, overwrite=True)
    tasks = list(experts)
    return {(tasks[i], tasks[j]): {"cosine": result.cosine[-1, i, j], "sign_conflict": result.conflict[-1, i, j],
                                   "overlap": result.overlap[-1, i, j],
                                   "norm": float(result.norm[-1, [i, j]].mean())} for i, j in result.pairs}


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's rho between what is known (rows) and what is lost, with its interval over draws of the tasks."""
    pairs = [row.split(", ") for row in table["tasks"]]
    tasks = sorted({task for pair in pairs for task in pair})
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        times = dict(zip(tasks, np.bincount(rng.integers(len(tasks), size=len(tasks)), minlength=len(tasks)),
                         strict=True))
        draws.append(np.repeat(np.arange(len(pairs)), [times[a] * times[b] for a, b in pairs]))

    def rho(known: str, lost: str) -> str:
        x, y = table[known].to_numpy(), table[lost].to_numpy()
        if len(set(x)) < 2:
            return ""
        drawn = [spearmanr(x[draw], y[draw]).statistic for draw in draws if len(set(x[draw])) > 1]
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        return f"{spearmanr(x, y).statistic:.2f} ({low:.2f} to {high:.2f})"
    return pd.DataFrame({lost: {known: rho(known, lost) for known in KNOWN if known in table} for lost in LOST})


if __name__ == "__main__":
    main()
