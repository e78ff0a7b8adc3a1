"""The loss between models: over the plane that lies closest to them, and along the lines between them.

Every point of the plane and of the lines is a mixture of the models, sum_i c_i theta_i with sum_i c_i = 1, so nothing
but the models themselves is ever in memory.
"""
import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_transplant.analysis.risk import Risk, open_risk
from nnunet_transplant.device import AUTO, threads_of_nnunet, torch_device
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures.landscape import save_lines_figure, save_plane_figure
from nnunet_transplant.files import atomic_path, file_sha256
from nnunet_transplant.heads import structures
from nnunet_transplant.mergeable import check_mergeable
from nnunet_transplant.model_folder import CHECKPOINT, model_labels, open_models
from nnunet_transplant.vectors import add_weighted
from nnunet_transplant.volumes import volumes_of

JSON, CSV, PLANE, LINES = "landscape.json", "landscape.csv", "plane.png", "lines.png"
MARGIN = 0.25  # of the plane's extent, around the models


@dataclass(frozen=True)
class Plane:
    """The plane through the mean of N models along their first two principal components.

    coordinates: (N, 2), where the models lie in it, in units of the Euclidean distance of weights.
    mixing: (N, 2): the point (x, y) is the mixture of the models with c = 1/N + mixing @ (x, y).
    explained: the share of the models' variance that lies in the plane.
    """
    coordinates: np.ndarray
    mixing: np.ndarray
    explained: float

    def mixture(self, x: float, y: float) -> np.ndarray:
        return 1 / len(self.mixing) + self.mixing @ (x, y)


def principal_plane(gram: np.ndarray) -> Plane:
    """Of the inner products (N, N) of the models' weights; N >= 3."""
    count = len(gram)
    centre = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(centre @ gram @ centre)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    vectors = vectors * np.where(vectors[np.abs(vectors).argmax(0), range(count)] < 0, -1, 1)  # signs that stay
    length = np.sqrt(np.where(values > 1e-12 * np.trace(gram), values, 0)[:2])  # less is rounding
    mixing = np.where(length > 0, vectors[:, :2] / np.where(length > 0, length, 1), 0)
    return Plane(vectors[:, :2] * length, mixing, float(values[:2].sum() / max(values.sum(), 1e-300)))


def inner_products(networks: Sequence[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """(N, N) of the whole networks, in float64, tensor by tensor; less the first network, which changes no distance and
    keeps what is small from being lost beside what is common."""
    gram = np.zeros((len(networks), len(networks)))
    for name, first in networks[0].items():
        rows = torch.stack([network[name].double().reshape(-1) - first.double().reshape(-1) for network in networks])
        gram += (rows @ rows.T).numpy()
    return gram


@dataclass(frozen=True)
class Losses:
    """The loss of each task as a function of a mixture of the models.

    networks: of each model the tensors that are mixed, by canonical name: all but the heads, which of models of
    different labels are those of the task's expert.
    """
    networks: Sequence[Mapping[str, torch.Tensor]]
    risks: Mapping[str, Risk]

    def at(self, mixture: np.ndarray) -> dict[str, float]:
        """Task -> the mean loss over its patches; NaN and Inf as they come."""
        mixed = {name: add_weighted(torch.zeros_like(tensor, dtype=torch.float32),
                                    [network[name].float() for network in self.networks], mixture.tolist())
                 for name, tensor in self.networks[0].items()}
        return {task: _loss(risk, mixed) for task, risk in self.risks.items()}


def _loss(risk: Risk, mixed: Mapping[str, torch.Tensor]) -> float:
    layout = risk.model.layout
    state = risk.network.state_dict()
    with torch.no_grad():
        for name, canonical in layout.canonical.items():
            if canonical in mixed:
                state[name].copy_(mixed[canonical])
    return risk.mean()


def landscape(models: Sequence[Path | str], dataset: str | int, fold: str | int = "0", *, output: Path | str,
              also: Sequence[Path | str] = (), cases: str | None = None, n_cases: int | None = None, n_patches: int = 8,
              points: int = 17, line_points: int = 11, seed: int = 0, checkpoint_name: str = CHECKPOINT,
              device: str = AUTO, trust: bool = False, overwrite: bool = False,
              progress: bool = False) -> dict[str, Any]:
    """Measure the loss around and between models, and draw it (MuDSC, Fig. 3).

    models: the experts, two or more. Where their labels differ each is a task, whose loss is that of its own labels
        with its own heads; models of the same labels have one loss, and their heads are mixed like the rest.
    also: models to mark and to lay the plane through, such as the base and merged models; of their heads as above.
    dataset, fold, cases, n_cases: labelled cases: the validation cases of a fold ("all": every case), or those chosen
        by `cases` (FILE, train:K, val:K); so many of them, unless told as many as patches.
    n_patches, seed: see `risk.open_risk`; every task's patches come from the same cases.
    points: of the plane, along each axis; measured from coarse to fine. 0, or only two models: no plane.
    line_points: of each line between two experts, both ends included.

    An interrupted run goes on where it was, with the same models and settings. Returns what landscape.json holds.
    Raises TransplantError for models that do not mix, missing data, and an output that is something else.
    """
    if points < 0 or line_points < 2:
        raise TransplantError("-points must not be negative, and -line_points at least 2")
    where = torch_device(device)
    threads_of_nnunet(where)
    volumes = volumes_of(dataset, fold, n_patches if n_cases is None else n_cases, cases)
    use_our_trainers()
    experts = [model for path in models for model in open_models(path, None, checkpoint_name, trust)]
    every = experts + [model for path in also for model in open_models(path, None, checkpoint_name, trust)]
    if len(experts) < 2:
        raise TransplantError("the loss between models needs at least two of them")
    check_mergeable(every, same_base=False, channels=False)
    labels = model_labels([model.path for model in every])
    same = all(model.dataset_json["labels"] == every[0].dataset_json["labels"] for model in every)
    names = [name for name in experts[0].layout.names if (same or name not in experts[0].layout.heads)
             and experts[0].tensors()[name].is_floating_point()]
    networks = [{name: model.tensors()[name] for name in names} for model in every]
    tasks = {"loss": experts[0]} if same else {", ".join(structures(expert)): expert for expert in experts}
    setup = {"models": {label: file_sha256(model.path) for label, model in zip(labels, every, strict=True)},
             "experts": len(experts), "tasks": list(tasks), "cases": volumes.cases, "n_cases": volumes.n_cases,
             "dataset": [str(name) for name in volumes.datasets], "patches": n_patches, "seed": seed, "points": points,
             "line_points": line_points}
    output = Path(os.path.abspath(output))
    known = _measured(output, setup, overwrite)
    losses = Losses(networks, {task: open_risk(expert, volumes, n_patches, seed, where, progress)
                               for task, expert in tasks.items()})
    if not known:
        output.mkdir(parents=True, exist_ok=True)
        for name in (CSV, PLANE, LINES):
            (output / name).unlink(missing_ok=True)
        (output / JSON).write_text(json.dumps({"setup": setup}, indent=4) + "\n", encoding="utf-8")
    plane = principal_plane(inner_products(networks)) if len(every) > 2 and points else None
    wanted = {**lines(len(experts), len(every), line_points), **({} if plane is None else grid(plane, points))}
    measure(losses, wanted, known, output / CSV, progress)
    places = {} if plane is None else dict(zip(labels, plane.coordinates.tolist(), strict=True))
    result = {"setup": setup, "barriers": barriers(known, labels),
              "plane": None if plane is None else {"models": places, "explained": plane.explained}}
    save_lines_figure({place: loss for place, loss in known.items() if place[0] != "plane"}, labels, output / LINES)
    if plane is not None:
        save_plane_figure({place[1:]: loss for place, loss in known.items() if place[0] == "plane"},
                          places, len(experts), output / PLANE)
    (output / JSON).write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")
    return result


Place = tuple[str, float, float]  # ("plane", x, y), or ("0-1", share of model 1, 0.0) on the line from model 0


def lines(experts: int, models: int, points: int) -> dict[Place, np.ndarray]:
    """The mixtures of the models along the lines between all pairs of experts, which are the first of them."""
    found = {}
    for one, other in itertools.combinations(range(experts), 2):
        for share in np.linspace(0, 1, points).round(12).tolist():
            mixture = np.zeros(models)
            mixture[one], mixture[other] = 1 - share, share
            found[f"{one}-{other}", share, 0.0] = mixture
    return found


def grid(plane: Plane, points: int) -> dict[Place, np.ndarray]:
    """The mixtures of a regular grid around the models, from coarse to fine: each level halves the distances."""
    low, high = plane.coordinates.min(0), plane.coordinates.max(0)
    extent = max((high - low).max(), 1e-12)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2, 0.25 * extent) + MARGIN * extent
    axes = [np.linspace(middle[i] - half[i], middle[i] + half[i], points) for i in (0, 1)]
    places = sorted(itertools.product(range(points), repeat=2), key=lambda ij: (-min(_step(ij[0], points),
                                                                                     _step(ij[1], points)), ij))
    return {("plane", float(axes[0][i]), float(axes[1][j])): plane.mixture(axes[0][i], axes[1][j]) for i, j in places}


def _step(index: int, points: int) -> int:
    """The distance of the coarsest grid that has this index: the largest power of two that divides it."""
    return points if index == 0 else index & -index


def measure(losses: Losses, wanted: Mapping[Place, np.ndarray], known: dict[Place, dict[str, float]], path: Path,
            progress: bool) -> None:
    """Add to `known`, and to the file, the losses of the places that are not there yet."""
    left = [place for place in wanted if place not in known]
    with atomic_path(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["where", "x", "y", *losses.risks],
                                    *([*place, *loss.values()] for place, loss in known.items())])
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for place in tqdm(left, desc="loss", delay=3, disable=not progress, initial=len(wanted) - len(left),
                          total=len(wanted)):
            known[place] = losses.at(wanted[place])
            writer.writerow([*place, *known[place].values()])
            file.flush()


def barriers(known: Mapping[Place, Mapping[str, float]], labels: Sequence[str]) -> dict[str, dict[str, float]]:
    """Pair of models -> task -> how far the loss rises above the straight line between its values at the two ends, at
    most (Git Re-Basin, Definition 2.1). 0 where it never does."""
    found: dict[str, dict[str, float]] = {}
    for where in dict.fromkeys(place[0] for place in known if place[0] != "plane"):
        on_line = {place[1]: loss for place, loss in known.items() if place[0] == where}
        one, other = (labels[int(index)] for index in where.split("-"))
        found[f"{one} - {other}"] = {task: max(
            loss[task] - (1 - share) * on_line[0.0][task] - share * on_line[1.0][task]
            for share, loss in on_line.items()) for task in on_line[0.0]}
    return found


def _measured(output: Path, setup: Mapping[str, Any], overwrite: bool) -> dict[Place, dict[str, float]]:
    """What an earlier run with the same setup has measured. Raises TransplantError where something else is there."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (output / JSON).is_file():
            raise TransplantError(f"{output} exists already, and is no landscape: give another -o")
        started = json.loads((output / JSON).read_text(encoding="utf-8"))
        if started.get("setup") == setup:
            return dict(_rows(output / CSV, setup["tasks"]))
        if not overwrite:
            raise TransplantError(f"{output} is a landscape of other models or settings: give another -o, or "
                                  "--overwrite to start anew")
    return {}


def _rows(path: Path, tasks: Sequence[str]) -> Iterator[tuple[Place, dict[str, float]]]:
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in list(csv.reader(file))[1:]:
            if len(row) == 3 + len(tasks):  # a killed run may leave half a line
                kind, x, y, *values = row
                yield (kind, float(x), float(y)), dict(zip(tasks, map(float, values), strict=True))
