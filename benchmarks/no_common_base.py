"""What alignment does to the loss, with the models that folds.py trained, or those of `default_merge.py strangers`:

    python benchmarks/no_common_base.py WORK documentation/experiments
    python benchmarks/no_common_base.py WORK documentation/experiments -part tasks -mouse DATA/Dataset005_MouseBrain

The loss barrier along the line between two folds, before and after alignment (figure), and two tasks that share no base
(Anterior and Posterior, or two structures of mouse brains, each from its own random weights): Dice and cross-entropy of
every task by itself and of both together, and MuDSC's scaled performance (L - L_0) / (L_1 - L_0) (Eq. 9), L_1 the
expert's loss, L_0 that of always predicting the classes' frequencies. On patches of the test cases: every eighth for
the line, every second for tasks.
"""
import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from folds import ALL, DATASET, TASKS, WHOLE
from matplotlib.figure import Figure
from merge_settings import Mouse, strangers
from methods import ALIGNED
from steps import Steps
from transplant_settings import TEST as TESTED

from nnunet_transplant.experts import Experts
from nnunet_transplant.figures.common import STRUCTURE_COLOURS, save_figure
from nnunet_transplant.heads import join
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import IGNORED, Volumes, open_patches

LOOK = Volumes([4], 6, f"train:{ALL}", n_patches=1000)  # all patches of them
TEST = Volumes([4], 40, f"val:{ALL}", n_patches=1000)
TRIED = {"average": Recipe(), **ALIGNED}
BARRIERS = ("not aligned", "rebasin", "activation_align", "mudsc_align")


def opened(models: list[TrainedModel], every: int, test: Volumes = TEST) -> Experts:
    """With every so-manyth patch of the test cases, for models merged with equal weights."""
    return Experts(models, [model.tensors() for model in models], join(models, [1 / len(models)] * len(models)),
                   models[0].trainer, open_patches(test, models[0], progress=True)[::every], progress=True)


def opened_merger(models: list[TrainedModel], recipe: Recipe, look: Volumes = LOOK) -> Merger:
    if recipe.looking:
        recipe = replace(recipe, volumes=look)
    return Merger([[model] for model in models], recipe, progress=True)


def predicted(test: Experts, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, voxels) and labels (voxels) of all test patches."""
    network = test.merged_network(tensors)
    logits, labels = [], []
    with torch.no_grad():
        for patch in test.patches:
            target = test.targets([patch])[0].flatten()
            logits.append(network(test.images([patch]))[0].flatten(1)[:, target != IGNORED])
            labels.append(target[target != IGNORED])
    return torch.cat(logits, 1), torch.cat(labels)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Cross-entropy in nats."""
    return float(torch.nn.functional.cross_entropy(logits.T, labels))


def frequency_loss(labels: torch.Tensor) -> float:
    frequencies = torch.bincount(labels) / len(labels)
    return float(-(frequencies * frequencies.clamp(min=1e-12).log()).sum())


def dice(logits: torch.Tensor, labels: torch.Tensor, row: int) -> float:
    found, there = logits.argmax(0) == row, labels == row
    return float(2 * (found & there).sum() / (found.sum() + there.sum()))


def barrier(run: Steps, figure: Path) -> None:
    folder = run.model(DATASET, WHOLE)
    models = [open_models(folder, [fold])[0] for fold in ("0", "1")]
    test = opened(models, every=8)
    positions = [step / 4 for step in range(5)]
    losses = {}
    for name in BARRIERS:
        merger = opened_merger(models, ALIGNED.get(name, Recipe()))
        losses[name] = [loss(*predicted(test, merger.tensors([1 - position, position]))) for position in positions]
        print(f"{name}: " + " ".join(f"{value:.4f}" for value in losses[name]), flush=True)
    save_barrier_figure(positions, losses, figure)


def save_barrier_figure(positions: Sequence[float], losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """The loss along the line from one model (0) to another (1), a line for each way to align them."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(losses.items(), STRUCTURE_COLOURS, strict=False):
        axes.plot(positions, values, marker="o", color=colour, label=name)
    axes.set(xlabel="share of the second model's weights", ylabel="loss")
    axes.legend()
    save_figure(figure, path, dpi=130)


def tasks(models: Mapping[str, TrainedModel], joint: TrainedModel, look: Volumes, volumes: Volumes) -> None:
    """models: by the structure that each knows; joint: a model of them all, in this order."""
    trained = list(models.values())
    test = opened(trained, every=2, test=volumes)
    expert = []
    for model in trained:
        logits, labels = predicted(opened([model], every=2, test=volumes), model.tensors())
        expert.append((loss(logits, labels), frequency_loss(labels), dice(logits, labels, 1)))
    rows = {"experts": {f"{name} Dice": expert[i][2] for i, name in enumerate(models)}}
    fits = ["head"], ["head", "entries"]
    recipes = TRIED | {"the first model, head fitted": Recipe(weights=[1, 0], fit=["head"])} | {
        f"{name}, {' '.join(fit)} fitted": replace(TRIED[name], fit=fit) for name in ("zipit", "mudsc_zip")
        for fit in fits}
    tried = {"trained jointly": joint.tensors} | {
        name: lambda recipe=recipe: opened_merger(trained, recipe, look).tensors() for name, recipe in recipes.items()}
    for method, tensors in tried.items():
        logits, labels = predicted(test, tensors())
        row = {}
        for i, name in enumerate(models):
            alone, of_task = logits[[0, i + 1]], (labels == i + 1).long()
            row[f"{name} Dice"] = dice(alone, of_task, 1)
            row[f"{name} L_SP"] = (loss(alone, of_task) - expert[i][1]) / (expert[i][0] - expert[i][1])
        row["joint Dice"] = sum(dice(logits, labels, i + 1) for i in range(len(models))) / len(models)
        rows[method] = row
        print(method, row, flush=True)
    print(pd.DataFrame(rows).T.round(3).to_string())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder that folds.py has filled")
    parser.add_argument("figures", type=Path, help="folder for barrier.png")
    parser.add_argument("-part", choices=("barrier", "tasks"), nargs="+", default=["barrier", "tasks"])
    parser.add_argument("-mouse", type=Path, help="the mouse brains in nnU-Net raw format: two tasks of theirs")
    args = parser.parse_args()
    run = Steps(args.work)
    os.environ.update(run.environment)
    if "barrier" in args.part:
        barrier(run, args.figures / "barrier.png")
    if "tasks" in args.part and args.mouse is not None:
        setting = strangers(Mouse(run, args.mouse, 1, "cpu"))
        tasks({name: open_models(path)[0] for name, path in setting.experts.items()},
              open_models(setting.others["joint"][0])[0], Volumes([5], 8, f"train:{TESTED}"),
              Volumes([5], 3, f"val:{TESTED}", n_patches=1000))
    elif "tasks" in args.part:
        folder = {name: run.model(f"Dataset{number}_{name}", WHOLE) for number, name in TASKS.items()}
        tasks({name: open_models(path, [str(ALL)])[0] for name, path in folder.items()},
              open_models(run.model(DATASET, WHOLE), [str(ALL)])[0], LOOK, TEST)


if __name__ == "__main__":
    main()
