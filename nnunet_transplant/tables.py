"""Tables of text: Dice by structure and model, and columns side by side."""
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

_TERMINAL = 120  # characters; wider tables number the models


def means_table(frame: pd.DataFrame) -> str:
    """Mean Dice over the cases: a row for each structure, a column for each model, and below the mean over those
    structures for which every model has a Dice, so that it compares like with like.

    frame: as `evaluate` returns it. "-" is a structure that a model does not have (or that the dataset cannot score),
    "nan" one that no case has, neither in the reference nor in the prediction.
    """
    models, means = list(frame["model"].unique()), structure_means(frame)
    rows = [[structure, *(_cell(of_structure, model) for model in models)] for structure, of_structure in means.items()]
    return _layout(["structure"], models, rows)


def structure_means(frame: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The numbers of `means_table`: structure -> model -> mean Dice. "mean of N" is the last, where there is one."""
    means: dict[str, dict[str, float]] = {structure: {} for structure in frame["structure"].unique()}
    for (structure, model), mean in frame.groupby(["structure", "model"], sort=False)["dice"].mean().items():
        means[structure][model] = float(mean)
    models = list(frame["model"].unique())
    common = [of_model for of_model in means.values()
              if not any(np.isnan(of_model.get(model, np.nan)) for model in models)]
    if common:
        means[f"mean of {len(common)}"] = {model: float(np.mean([each[model] for each in common])) for model in models}
    return means


def cases_table(frame: pd.DataFrame) -> str:
    """Dice of every case: a row for each case and structure, a column for each model; cells as in `means_table`."""
    models = list(frame["model"].unique())
    dice = frame.set_index(["case", "structure", "model"])["dice"].to_dict()
    rows = [[case, structure, *(_cell(dice, (case, structure, model)) for model in models)]
            for case in frame["case"].unique() for structure in frame["structure"].unique()]
    return _layout(["case", "structure"], models, rows)


def _cell(values: Mapping[Any, float], where: Any) -> str:
    return f"{values[where]:.4f}" if where in values else "-"


def _layout(names: list[str], models: list[str], rows: list[list[str]]) -> str:
    """Aligned columns: the names to the left, the numbers to the right. Where the models' labels would make the table
    wider than a terminal, they are numbered, with a line for each above the table."""
    legend = []
    lines = [[*names, *models], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    if sum(widths) + 2 * len(widths) > _TERMINAL:
        numbers = [f"[{i}]" for i in range(1, len(models) + 1)]
        legend = [f"{number} {model}" for number, model in zip(numbers, models, strict=True)]
        lines[0] = [*names, *numbers]
    return "\n".join([*legend, *aligned_lines(lines, len(names))])


def aligned_lines(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """The lines of a table: the first columns to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if i < names else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def mean_without_nan(values: Iterable[float]) -> float:
    """The mean without NaN; NaN (and no warning) where nothing is left."""
    numbers = [value for value in values if not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else np.nan
