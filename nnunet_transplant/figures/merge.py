"""What a merged fold consists of."""
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nnunet_transplant.figures.common import BLUE, save_figure


def save_inputs_figure(provenance: dict[str, Any], path: Path) -> None:
    """What a merged fold has in place of nnU-Net's progress.png: its inputs and their weights."""
    inputs = provenance["inputs"]
    names = [f"{Path(one['path']).parent.parent.parent.name} fold {one['fold']}: {', '.join(one['structures'])}"
             for one in inputs]
    names = [name if len(name) <= 80 else name[:77] + "..." for name in names]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(inputs)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(inputs)), [one["weight"] for one in inputs], color=BLUE)
    axes.set_yticks(range(len(inputs)), names, parse_math=False)  # a name may hold dollars
    axes.invert_yaxis()
    axes.set(title=f"Merged by {' + '.join(step['name'] for step in provenance['steps'])}", xlabel="weight")
    save_figure(figure, path, dpi=100)
