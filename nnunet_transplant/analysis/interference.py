"""How much task vectors are in each other's way, from weights alone, in each stage of the U-Net.

Sources: trimming and sign conflicts are those of TIES-Merging (Yadav et al., NeurIPS 2023), cosines between task
vectors those of task arithmetic (Ilharco et al., ICLR 2023).
"""
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.environment import use_our_trainers, versions
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures.interference import save_interference_figure
from nnunet_transplant.files import atomic_path, check_output, file_sha256
from nnunet_transplant.heads import structures
from nnunet_transplant.mergeable import check_finite, check_mergeable, common_theta_0, common_theta_0_sha256
from nnunet_transplant.methods.apply import Piece
from nnunet_transplant.methods.ties import thresholds
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, model_labels, open_models, open_theta_0
from nnunet_transplant.stages import stage_of
from nnunet_transplant.tables import aligned_lines, mean_without_nan
from nnunet_transplant.vectors import TaskVectors, Tensors, blocks, in_parallel, is_finite, keep_from

JSON, CSV, FIGURE, TABLE = "interference.json", "interference.csv", "interference.png", "table.txt"
WHOLE = "whole network"
_PARTS = ("encoder", "decoder", "other")  # the order of the stages; "other" is what lies in none
_COLUMNS = 1 << 12  # entries of each task vector that are worked on at a time: they stay in the cache


@dataclass(frozen=True)
class Interference:
    """Task vectors against each other in each of S stages. The last stage is the whole network.

    An entry is large where trimming keeps it: it is among the `density` share of its task's largest magnitudes over the
    whole network, and not zero. NaN is what is not defined: the energy and the cosines of a task vector of zero,
    conflicts where no two tasks have a large entry in common, overlaps where neither task has one.
    """
    tasks: list[str]
    stages: list[str]            # "encoder 0" (full resolution), ..., "decoder 0" (low), ..., "other", "whole network"
    density: float
    entries: np.ndarray          # (S,): how many entries the stage has
    norm: np.ndarray             # (S, T): ||tau_t||, Euclidean
    energy: np.ndarray           # (S, T): share of ||tau_t||^2; the stages of a task sum to 1
    kept: np.ndarray             # (S, T): share of the stage's entries that are large
    cosine: np.ndarray           # (S, T, T): <tau_s, tau_t> / (||tau_s|| ||tau_t||)
    conflict: np.ndarray         # (S, T, T): of the entries large in both tasks the share with opposite signs
    conflict_of_all: np.ndarray  # (S,): of the entries large in two tasks or more the share without one common sign
    overlap: np.ndarray          # (S, T, T): entries large in both tasks / entries large in either

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Every two tasks once, by their indices."""
        return list(combinations(range(len(self.tasks)), 2))

    @property
    def overlap_by_chance(self) -> np.ndarray:
        """(S, T, T): the overlap if each task had its large entries anywhere in the stage, independently: with shares p
        and q of the entries p q / (p + q - p q). In the whole network, density / (2 - density)."""
        p, q = self.kept[:, :, None], self.kept[:, None, :]
        return _ratio(p * q, p + q - p * q)

    def frame(self) -> pd.DataFrame:
        """As interference.csv: for each stage a row for each task, one for each pair and one for all tasks.

        Columns stage, task, other (empty in a task's row; both empty in the row of all), entries, norm, energy, kept,
        cosine, sign_conflict, overlap, overlap_by_chance; NaN is what the row does not have.
        """
        chance = self.overlap_by_chance
        rows: list[dict[str, Any]] = []
        for s, stage in enumerate(self.stages):
            here = {"stage": stage, "entries": int(self.entries[s])}
            rows += [here | {"task": task, "norm": self.norm[s, t], "energy": self.energy[s, t],
                             "kept": self.kept[s, t]} for t, task in enumerate(self.tasks)]
            rows += [here | {"task": self.tasks[a], "other": self.tasks[b], "cosine": self.cosine[s, a, b],
                             "sign_conflict": self.conflict[s, a, b], "overlap": self.overlap[s, a, b],
                             "overlap_by_chance": chance[s, a, b]} for a, b in self.pairs]
            rows.append(here | {"sign_conflict": self.conflict_of_all[s]})
        return pd.DataFrame(rows, columns=["stage", "task", "other", "entries", "norm", "energy", "kept", "cosine",
                                           "sign_conflict", "overlap", "overlap_by_chance"])


def interference(models: Sequence[Path | str], *, output: Path | str, folds: Sequence[str | int] | None = None,
                 checkpoint_name: str = CHECKPOINT, base: Path | str | None = None, density: float = 0.2,
                 trust: bool = False, overwrite: bool = False, progress: bool = False) -> Interference:
    """Measure the task vectors of fine-tuned models against each other, and write a table and a figure to a folder.

    models: trained model folders, checkpoints inside them or task vector files; folds as in `open_models`, each a task
        vector of its own.
    base: theta_0 for models that record none and for task vector files (see `open_theta_0`).
    density: share of each task vector's entries that count as large.
    output: gets interference.json, interference.csv, interference.png and table.txt; it appears whole or not at all.
        overwrite replaces an earlier one.
    trust: load checkpoints that ask for more than weights; they can run code.

    Raises TransplantError for fewer than two task vectors, models that cannot merge, a missing or other base, NaN or
    Inf in an input, a wrong density, an existing output.
    """
    if not 0 < density <= 1:
        raise TransplantError(f"-density must be above 0 and at most 1, not {density:g}")
    output = Path(os.path.abspath(output))
    inputs = [*models, *([] if base is None else [base])]
    check_output(output, inputs, overwrite, JSON, "an earlier analysis of interference")
    use_our_trainers()
    given = None if base is None else open_theta_0(base, checkpoint_name, trust)
    names = None if folds is None else [str(fold) for fold in folds]
    groups = [open_models(path, names, checkpoint_name, trust, given) for path in models]
    opened = [model for group in groups for model in group]
    if len(opened) < 2:
        raise TransplantError(f"interference is between task vectors: give two or more models with -m, not only "
                              f"{opened[0].name}")
    check_mergeable(opened, channels=False)
    theta_0 = common_theta_0(opened, given, "interference needs")
    thetas = [model.tensors() for model in opened]
    floats = [name for name in opened[0].layout.body if thetas[0][name].is_floating_point()]
    vectors = TaskVectors({name: theta_0[name] for name in floats},
                          [{name: theta[name] for name in floats} for theta in thetas], [1.0] * len(thetas))

    def check(block: Tensors) -> None:
        for model, theta in zip(opened, block.thetas, strict=True):
            check_finite(theta, block.name, model)
        if not is_finite(block.theta_0):
            raise TransplantError(f"the base holds NaN or Inf in {block.name}")

    result = measure(vectors, task_labels([Path(path) for path in models], groups), density, check, progress)
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        content = _provenance(opened, result, None if base is None else Path(base), theta_0) | _content(result)
        (folder / JSON).write_text(json.dumps(content, indent=4, allow_nan=False) + "\n", encoding="utf-8")
        result.frame().to_csv(folder / CSV, index=False)
        (folder / TABLE).write_text(table(result) + "\n", encoding="utf-8")
        save_figure(result, folder / FIGURE)
    return result


def task_labels(models: Sequence[Path], groups: Sequence[Sequence[TrainedModel]]) -> list[str]:
    """A short, unique name for each task vector, as evaluation names models; a folder of several folds adds the fold.
    """
    return model_labels(each for path, group in zip(models, groups, strict=True)
                        for each in ([model.path for model in group] if len(group) > 1 else [path]))


# ---------------------------------------------------------------------------------------------------------------------
# The numbers

def measure(vectors: TaskVectors, tasks: Sequence[str], density: float,
            check: Callable[[Tensors], None] = lambda block: None, progress: bool = False) -> Interference:
    """Task vectors against each other, block by block on all cores, with the same result on any number of them.

    vectors: floats without heads; their weights do not matter. tasks: a name for each.
    check: sees every block of the inputs, and raises for what must not be measured.
    """
    stage = {name: stage_of(name) or ("other", 0) for name in vectors.names}
    stages = sorted(set(stage.values()), key=lambda part: (_PARTS.index(part[0]), part[1]))
    limits = thresholds(vectors, density, "vector")
    pieces = [Piece(name, *block) for name, tensor in vectors.thetas[0].items() for block in blocks(tensor.numel())]

    def of_piece(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        block = vectors.block(*piece)
        check(block)
        return _sums(block, [limit[piece.name] for limit in limits])

    products = np.zeros((len(stages) + 1, 3, len(tasks), len(tasks)))
    counts = np.zeros((len(stages) + 1, 3))
    done = tqdm(in_parallel(of_piece, pieces), desc="interference", total=len(pieces), delay=3, disable=not progress)
    for piece, (product, count) in zip(pieces, done, strict=True):
        index = stages.index(stage[piece.name])
        products[index] += product
        counts[index] += count
    products[-1], counts[-1] = products.sum(0), counts.sum(0)

    dot, agreement, both = products.swapaxes(0, 1)
    entries, shared, torn = counts.T
    squares, large = (np.diagonal(matrix, axis1=1, axis2=2) for matrix in (dot, both))
    norm = np.sqrt(squares)
    cosine = _ratio(_ratio(dot, norm[:, :, None]), norm[:, None, :])  # one by one: their product may underflow
    return Interference(
        list(tasks), [*(part if part == "other" else f"{part} {number}" for part, number in stages), WHOLE], density,
        entries.astype(int), norm, _ratio(squares, squares[-1:]), _ratio(large, entries[:, None]), cosine.clip(-1, 1),
        _ratio((both - agreement) / 2, both), _ratio(torn, shared),
        _ratio(both, large[:, :, None] + large[:, None, :] - both))


def _sums(block: Tensors, limits: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """What a block adds to the sums of its stage.

    limits: for each task the magnitude of its smallest large entry.
    Returns (3, T, T): for each two tasks the inner product, over the entries large in both the sum of the products of
    their signs, and how many these are; and (3,): how many entries there are, how many are large in two tasks or more,
    and how many of these have both signs. The counts are exact: a block has fewer entries than float32 can count.
    """
    products = np.zeros((3, len(limits), len(limits)))
    counts = np.zeros(3)
    for taus in torch.stack([tau.reshape(-1) for tau in block.taus]).split(_COLUMNS, dim=1):
        exact = taus.double()
        signs = torch.stack([keep_from(tau, limit) for tau, limit in zip(taus, limits, strict=True)]).sgn_()
        large = signs.abs()
        products += [(matrix @ matrix.T).double().numpy() for matrix in (exact, signs, large)]
        users, total = large.sum(0), signs.sum(0).abs_()
        counts += [taus.shape[1], int((users >= 2).sum()), int((total < users).sum())]
    return products, counts


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN for 0 / 0, without a warning."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


# ---------------------------------------------------------------------------------------------------------------------
# What is written

def _provenance(models: Sequence[TrainedModel], result: Interference, base: Path | None,
                theta_0: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    sha256 = common_theta_0_sha256(models) or checkpoints.tensors_sha256(theta_0)
    hashes = in_parallel(file_sha256, [model.path for model in models])
    return {"versions": versions(),
            "base": None if base is None else str(base.resolve()), "theta_0_sha256": sha256,
            "inputs": [{"task": task, "path": str(model.path.resolve()), "sha256": digest, "fold": model.fold,
                        "structures": list(structures(model))}
                       for task, model, digest in zip(result.tasks, models, hashes, strict=True)]}


def _content(result: Interference) -> dict[str, Any]:
    """The numbers as JSON holds them; null is what is not defined."""
    frame = result.frame().astype(object)
    frame = frame.where(frame.notna(), None)

    def of_stage(stage: str) -> dict[str, Any]:
        here = frame[frame["stage"] == stage]
        tasks, pairs = here[here["norm"].notna()], here[here["other"].notna()]
        return {"stage": stage, "entries": here["entries"].iloc[0],
                "sign_conflict": here["sign_conflict"].iloc[-1],
                "tasks": tasks[["task", "norm", "energy", "kept"]].to_dict("records"),
                "pairs": pairs[["task", "other", "cosine", "sign_conflict", "overlap",
                                "overlap_by_chance"]].to_dict("records")}
    return {"density": result.density, "tasks": result.tasks, "whole_network": of_stage(WHOLE),
            "stages": [of_stage(stage) for stage in result.stages[:-1]]}


def table(result: Interference) -> str:
    """The whole network by task and by pair, and each stage: what the command prints."""
    numbers = [f"[{t}]" for t in range(1, len(result.tasks) + 1)]
    chance = result.overlap_by_chance
    tasks = [["", "task", "norm"], *([number, task, f"{norm:.4g}"] for number, task, norm
                                     in zip(numbers, result.tasks, result.norm[-1], strict=True))]
    pairs = [["pair", "cosine", "conflict", "overlap", "chance"],
             *([f"{numbers[a]} {numbers[b]}", *(_cell(matrix[-1, a, b]) for matrix in (
                 result.cosine, result.conflict, result.overlap, chance))] for a, b in result.pairs)]
    stages = [["stage", "entries", *numbers, "cosine", "conflict", "overlap", "chance"]]
    for s, stage in enumerate(result.stages):
        cosine, overlap, by_chance = (_cell(mean_without_nan(matrix[s, a, b] for a, b in result.pairs))
                                      for matrix in (result.cosine, result.overlap, chance))
        stages.append([stage, f"{result.entries[s]:,}", *(_cell(energy, 3) for energy in result.energy[s]), cosine,
                       _cell(result.conflict_of_all[s]), overlap, by_chance])
    return "\n".join([
        f"Interference of {len(result.tasks)} task vectors of {result.entries[-1]:,} entries", "",
        f"large      the {100 * result.density:g} % largest entries of each task vector",
        "conflict   of the entries large in both tasks, the share with opposite signs",
        "overlap    entries large in both tasks / large in either; chance: if they were drawn independently", "",
        *aligned_lines(tasks, 2), "", "Pairs, whole network", *aligned_lines(pairs, 1), "",
        "Stages: share of each task's squared norm" + (
            "; means over the pairs; conflict among the entries large in two tasks or more"
            if len(result.pairs) > 1 else ""),
        *aligned_lines(stages, 1)])


def _cell(value: float, digits: int = 4) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


def save_figure(result: Interference, path: Path) -> None:
    """Where in the network the tasks collide."""
    first, second = zip(*result.pairs, strict=True)
    save_interference_figure(
        result.tasks, result.stages, result.entries / result.entries[-1], result.energy,
        result.cosine[:, first, second], result.conflict[:, first, second], result.conflict_of_all,
        result.overlap[:, first, second], result.overlap_by_chance[:, first, second], result.density, path)
