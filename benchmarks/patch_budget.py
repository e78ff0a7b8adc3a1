"""How the Dice of a merge depends on how many patches its steps look at (-n_patches), by step.

Prints a table and writes budget.csv and budget.png: for each recipe the mean Dice on cases that no step has seen, over
the budget; "all" is every patch that covers the volumes.
"""
import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from nnunet_transplant.analysis.scoring import MergedNetwork, open_labelled_cases
from nnunet_transplant.data.cases import evaluation_cases
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.figures.common import MODEL_COLOURS, save_figure
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models, open_theta_0
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.targets import name_targets
from nnunet_transplant.volumes import Volumes

ALL = 10 ** 6
RECIPES = {
    "average + head": Recipe(fit=["head"]),
    "fisher + head": Recipe("fisher", fit=["head"]),
    "regmean + head": Recipe("regmean", fit=["head"]),
    "average + head + polish": Recipe(fit=["head", "polish"], parameters={"steps": 50}),
    "mudsc + average + head": Recipe(align="mudsc", fit=["head"]),
    "mudsc (zip) + average + head": Recipe(align="mudsc", fit=["head"], parameters={"units": "zip"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, nargs="+", required=True, help="models to merge")
    parser.add_argument("-f", nargs="+", help="folds of them")
    parser.add_argument("-base", type=Path)
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-look", required=True, help="cases that the steps look at, as -cases")
    parser.add_argument("-score", required=True, help="cases that are scored, as -cases")
    parser.add_argument("-n_score", type=int, default=10, help="so many of them")
    parser.add_argument("-budgets", type=int, nargs="+", default=[8, 16, 32, 64, ALL])
    parser.add_argument("-recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("-o", type=Path, required=True, help="folder to write to")
    args = parser.parse_args()
    use_our_trainers()
    theta_0 = None if args.base is None else open_theta_0(args.base)
    groups = [open_models(path, args.f, theta_0=theta_0) for path in args.m]
    cases = evaluation_cases(args.d, "all", args.score, args.n_score)
    scored = open_labelled_cases(cases, groups[0][0])
    args.o.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.recipes:
        for budget in args.budgets:
            torch.manual_seed(0)
            recipe = RECIPES[name]
            volumes = Volumes([args.d], cases=args.look, n_patches=budget)
            start = time.perf_counter()
            merger = Merger(groups, Recipe(recipe.method, align=recipe.align, fit=recipe.fit, volumes=volumes,
                                           parameters=recipe.parameters), theta_0)
            network = MergedNetwork(merger, torch.device("cpu"))
            seconds = time.perf_counter() - start
            (targets,), _ = name_targets(["merged"], [[network.merged]], cases)
            dice = pd.DataFrame(network.dice(scored, targets, cases.dataset_json["labels"].get("ignore"))).mean()
            rows.append({"recipe": name, "n_patches": "all" if budget == ALL else budget,
                         "patches": len(merger._experts.patches), "dice": float(dice.mean()), "seconds": seconds})
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(args.o / "budget.csv", index=False)
    frame = pd.DataFrame(rows)
    print(frame.pivot(index="recipe", columns="n_patches", values="dice").to_string(float_format="{:.4f}".format))
    draw(frame, args.o / "budget.png")


def draw(frame: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, rows) in zip(MODEL_COLOURS, frame.groupby("recipe", sort=False), strict=False):
        axes.plot(rows["patches"], rows["dice"] - rows["dice"].iloc[-1], marker="o", label=name, color=colour)
    axes.axhspan(-0.005, 0.005, color="0.9", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="patches", ylabel="Dice less that with all patches", title="What a budget of patches costs")
    axes.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    main()
