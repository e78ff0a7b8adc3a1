"""Every figure of the package."""
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

BLUE = "#0072B2"  # from Okabe and Ito's palette for colour-blind readers


def save_inputs_figure(provenance: dict[str, Any], path: Path) -> None:
    """What a merged fold has in place of nnU-Net's progress.png: its inputs and their weights."""
    inputs = provenance["inputs"]
    names = [f"{Path(one['path']).parent.parent.parent.name} fold {one['fold']}: {', '.join(one['structures'])}"
             for one in inputs]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.4 * len(inputs)), layout="constrained")
    axes.barh(range(len(inputs)), [one["weight"] for one in inputs], color=BLUE)
    axes.set_yticks(range(len(inputs)), names)
    axes.invert_yaxis()
    axes.set(title=f"Merged by {provenance['method']}", xlabel="weight")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
