"""How wide the minima of models are."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from nnunet_transplant.figures.common import add_legend, model_style, save_figure


def save_flatness_figure(models: Mapping[str, Mapping[str, Any]], patches: int, path: Path) -> None:
    """The largest eigenvalues of the Hessian, and the largest entries of the Fisher's diagonal, models side by side
    (U-Net Transplant, Fig. 2). Logarithmic: what is not positive has no bar."""
    panels = [(key, title, symbol) for key, title, symbol in (
        ("hessian_eigenvalues", "largest eigenvalues of the Hessian", "λ"),
        ("fisher_largest", "largest entries of the Fisher's diagonal", "F"))
        if any(key in model for model in models.values())]
    figure = Figure(figsize=(5.5 * len(panels), 4 + 0.2 * len(models)), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)
    width = 0.8 / len(models)
    for axes, (key, title, symbol) in zip(row[0], panels, strict=True):
        longest = max(len(model.get(key, ())) for model in models.values())
        for index, model in enumerate(models.values()):
            values = np.array(model.get(key, ()))
            axes.bar(np.arange(len(values)) + (index - (len(models) - 1) / 2) * width, np.where(values > 0, values, 0),
                     width, **model_style(index))
        axes.set_xticks(range(longest), [f"{symbol}{i + 1}" for i in range(longest)])
        lowest = min((value for model in models.values() for value in model.get(key, ()) if value > 0), default=1.0)
        axes.set(yscale="log", title=title, ylabel="curvature of the loss", xlabel="by size")
        axes.set_ylim(bottom=10.0 ** (np.floor(np.log10(lowest)) - (np.log10(lowest) % 1 < 0.1)))
        axes.grid(axis="y", alpha=0.4)
        axes.set_axisbelow(True)
    figure.suptitle(f"Width of the minimum on {patches} patches (lower is wider)")
    add_legend(figure, row[0][0].containers, list(models), 1)
    save_figure(figure, path)
