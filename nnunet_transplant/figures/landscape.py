"""The loss between models."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nnunet_transplant.figures.common import STRUCTURE_COLOURS, add_legend, save_figure


def save_plane_figure(losses: Mapping[tuple[float, float], Mapping[str, float]],
                      models: Mapping[str, tuple[float, float]], experts: int, path: Path) -> None:
    """The loss over a plane through models, a panel for each task and one for their mean (MuDSC, Fig. 3); every model
    marked: the first `experts` with dots, others with stars, numbered as the legend says."""
    places = np.array(list(losses))
    tasks = list(next(iter(losses.values())))
    values = {task: np.array([loss[task] for loss in losses.values()]) for task in tasks}
    if len(tasks) > 1:
        values = {"mean of the tasks": np.mean(list(values.values()), axis=0), **values}
    figure = Figure(figsize=(4.6 * len(values), 4.2 + 0.25 * len(models)), layout="constrained")
    row = figure.subplots(1, len(values), squeeze=False)
    for axes, (title, loss) in zip(row[0], values.items(), strict=True):
        finite = np.isfinite(loss)
        # beyond the upper half all is far too high: levels would tell nothing of the valley
        top = np.quantile(loss[finite], 0.75)
        levels = np.linspace(loss[finite].min(), max(top, loss[finite].min() + 1e-6), 16)
        filled = axes.tricontourf(*places[finite].T, loss[finite], levels=levels, cmap="cividis", extend="max")
        axes.tricontour(*places[finite].T, loss[finite], levels=levels, colors="white", linewidths=0.4)
        figure.colorbar(filled, ax=axes, label="loss", format="%.2f")
        for index, (x, y) in enumerate(models.values()):
            axes.plot(x, y, "o" if index < experts else "*", color="white", markeredgecolor="black",
                      markersize=8 if index < experts else 13)
            axes.annotate(str(index + 1), (x, y), (6, 6), textcoords="offset points", fontsize=10, color="black",
                          bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85, "linewidth": 0})
        axes.set_title(title, parse_math=False)
        axes.set(xlabel="first principal component\n(distance of weights)",
                 ylabel="second principal component\n(distance of weights)", aspect="equal")
    handles = [Line2D([], [], linestyle="", marker="o" if index < experts else "*", color="white",
                      markeredgecolor="black", markersize=9) for index in range(len(models))]
    add_legend(figure, handles, [f"{index}  {name}" for index, name in enumerate(models, 1)], 1)
    figure.suptitle("Loss over the plane closest to the models")
    save_figure(figure, path)


def save_lines_figure(losses: Mapping[tuple[str, float, float], Mapping[str, float]], labels: Sequence[str],
                      path: Path) -> None:
    """The loss along the line between each two models, a panel for each pair ("0-1", by their numbers) and a curve for
    each task."""
    pairs = list(dict.fromkeys(place[0] for place in losses))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    used = sorted({int(index) for pair in pairs for index in pair.split("-")})
    names = [f"{index + 1}  {labels[index]}" for index in used]
    figure = Figure(figsize=(max(4.4 * columns, 0.08 * max(map(len, names))), 3.2 * rows + 0.2 * len(used) + 0.6),
                    layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(pairs):]:
        axes.set_axis_off()
    for axes, pair in zip(grid.flat, pairs, strict=False):
        line = sorted((place[1], loss) for place, loss in losses.items() if place[0] == pair)
        one, other = (int(index) + 1 for index in pair.split("-"))
        for index, task in enumerate(line[0][1]):
            axes.plot([share for share, _ in line], [loss[task] for _, loss in line], label=task,
                      color=STRUCTURE_COLOURS[-1 - index % len(STRUCTURE_COLOURS)], marker="os^Dvx"[index % 6],
                      linestyle=("-", "--", ":", "-.")[index % 4])
        axes.set(xlabel=f"share of model {other}, the rest is model {one}", ylabel="loss",
                 title=f"between {one} and {other}")
        axes.grid(alpha=0.4)
        for text in axes.legend(title="" if len(line[0][1]) == 1 else "task").get_texts():
            text.set_parse_math(False)
    add_legend(figure, [Line2D([], [], linestyle="") for _ in names], names, 1)
    figure.suptitle("Loss along the lines between models")
    save_figure(figure, path)
