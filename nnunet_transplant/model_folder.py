"""A trained nnU-Net model folder: open it, check that several can merge, write a new one."""
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant import files
from nnunet_transplant.architecture import Layout, Network, check_plans, find_trainer, layout
from nnunet_transplant.errors import TransplantError, note
from nnunet_transplant.labels import check_dataset_json
from nnunet_transplant.nnunet import nnUNetTrainer
from nnunet_transplant.task_vector import (
    RECORD,
    Header,
    apply_task_vector,
    read_header,
    read_theta_0,
    theta_0_path,
)

CHECKPOINT = "checkpoint_final.pth"


@dataclass(frozen=True)
class TrainedModel:
    """One trained fold of an nnU-Net model folder. Its weights stay on disk until `tensors()`."""
    path: Path                             # the checkpoint
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    trainer: type[nnUNetTrainer]
    mirroring_axes: tuple[int, ...] | None  # None: no mirroring at test time
    record: dict[str, Any]                 # what our trainers note in a checkpoint; {} from stock trainers
    layout: Layout
    # all of its names, as maps of the file: memory is used only where they are read
    stored: Network = field(default_factory=dict, repr=False, compare=False)

    @property
    def folder(self) -> Path:
        return self.path.parent.parent

    @property
    def fold(self) -> str:
        return self.path.parent.name.removeprefix("fold_")

    @property
    def name(self) -> str:
        return f"{self.folder} fold {self.fold}"

    @property
    def labels(self) -> LabelManager:
        return PlansManager(self.plans).get_label_manager(self.dataset_json)

    @property
    def theta_0_sha256(self) -> str | None:
        sha256 = self.record.get("theta_0")
        return sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The network's tensors by canonical name, as maps of the file."""
        return {name: self.stored[name] for name in self.layout.names}

    def body(self) -> dict[str, torch.Tensor]:
        """As `tensors`, without the heads."""
        return {name: tensor for name, tensor in self.tensors().items() if name not in self.layout.heads}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor under all of its names, as nnU-Net loads it."""
        tensors = self.tensors()
        return {name: tensors[self.layout.canonical[name]] for name in self.layout.shapes}

    def theta_0(self) -> dict[str, torch.Tensor] | None:
        """The base this fold was fine-tuned from, by canonical name, where the folder keeps it."""
        if self.theta_0_sha256 is None:
            return None
        path = theta_0_path(self.folder, self.theta_0_sha256)
        return read_theta_0(path, self.theta_0_sha256) if path.exists() else None


@dataclass(frozen=True, kw_only=True)
class TaskVectorModel(TrainedModel):
    """A trained model as a task vector file: theta_0 + tau."""
    header: Header
    base: Network

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def fold(self) -> str:
        return self.header.fold

    @property
    def name(self) -> str:
        return str(self.path)

    def tensors(self) -> dict[str, torch.Tensor]:
        """In memory: theta_0 + tau, and the heads."""
        shapes = {name: self.layout.shapes[name] for name in self.layout.names}
        return apply_task_vector(self.path, self.base, shapes)

    def theta_0(self) -> dict[str, torch.Tensor] | None:
        return dict(self.base)


def open_models(model: Path | str, folds: Sequence[str] | None = None, checkpoint_name: str = CHECKPOINT,
                trust: bool = False, theta_0: Network | None = None) -> list[TrainedModel]:
    """The folds of a trained model folder, the one that a checkpoint inside such a folder belongs to, or a task vector
    file as the model it makes of theta_0.

    folds: as given to -f; by default every numbered fold that has the checkpoint, else fold_all.
    theta_0: the base of task vector files; unless given it is looked for beside the file.
    Raises TransplantError for what is no trained nnU-Net model, or lacks a fold.
    """
    model = Path(model)
    if model.suffix == ".safetensors":
        return [_open_task_vector(model, theta_0, trust)]
    if model.is_file():
        if model.suffix in (".zip", ".model"):
            raise _no_model(model, checkpoint_name)
        return [_open(model, trust)]
    if not model.is_dir():
        raise TransplantError(f"there is no model folder {model}")
    if folds is None:
        found = sorted(path.parent.name.removeprefix("fold_") for path in model.glob(f"fold_*/{checkpoint_name}"))
        folds = [fold for fold in found if fold != "all"] or found
    paths = [model / f"fold_{fold}" / checkpoint_name for fold in folds]
    if not paths or not all(path.is_file() for path in paths):
        raise _no_model(model, checkpoint_name, [path for path in paths if not path.is_file()])
    return [_open(path, trust) for path in paths]


def _no_model(model: Path, checkpoint_name: str, missing: Sequence[Path] = ()) -> TransplantError:
    """What is wrong with something that lacks checkpoints, and what it has instead."""
    if model.suffix == ".zip":
        return TransplantError(f"{model} is an archive: install it with nnUNetv2_install_pretrained_model_from_zip, "
                               "and give the model folder")
    if model.is_file() or (model / "plans.pkl").exists() or any(model.glob("fold_*/*.model")) or any(
            model.glob("all/*.model")):
        return TransplantError(f"{model} is a model of nnU-Net v1: this package works with nnU-Net v2, which cannot "
                               "read it either")
    there = sorted(str(path.relative_to(model)) for path in model.glob("fold_*/*.pth"))
    inside = sorted(path.parent.name for path in model.glob("*/plans.json"))
    what = f"{model} has no {missing[0].relative_to(model)}" if missing else \
        f"{model} is not a trained nnU-Net model folder: it has no fold_X/{checkpoint_name}"
    others = sorted({Path(path).name for path in there} - {checkpoint_name})
    if others and not any(Path(path).name == checkpoint_name for path in there):
        return TransplantError(f"{what}, only {', '.join(there)}: give -chk {others[0]}, or that file")
    if there:
        return TransplantError(f"{what}; it has {', '.join(there)}")
    return TransplantError(what + (f". Give one of the models in it: {', '.join(inside)}" if inside else ""))


def _open(path: Path, trust: bool) -> TrainedModel:
    folder = path.parent.parent
    plans, dataset_json = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    content = checkpoints.read(path, trust)
    configuration, weights = content["init_args"]["configuration"], content["network_weights"]

    def expected(trainer: type[nnUNetTrainer]) -> Layout:
        return _layout(plans, configuration, dataset_json, trainer, folder, trust, len(weights))

    def is_stock() -> bool:
        stock = expected(nnUNetTrainer)
        return stock.shapes == _shapes(_plainly_named(weights, stock))

    trainer = _find_trainer(content["trainer_name"], path, is_stock)
    tensors = expected(trainer)
    weights = _plainly_named(weights, tensors)
    shapes = _shapes(weights)
    if shapes != tensors.shapes:
        odd = sorted(name for name in shapes.keys() | tensors.shapes.keys()
                     if shapes.get(name) != tensors.shapes.get(name))
        raise TransplantError(f"{path} does not fit the network of its plans.json: {odd[0]} is "
                              f"{shapes.get(odd[0], 'missing')}, expected {tensors.shapes.get(odd[0], 'none')}")
    record = content.get(RECORD)
    return TrainedModel(path, plans, dataset_json, configuration, trainer, content["inference_allowed_mirroring_axes"],
                        record if isinstance(record, dict) else {}, tensors, weights)


def _find_trainer(name: str, path: Path, is_stock: Callable[[], bool]) -> type[nnUNetTrainer]:
    """The trainer; the stock one in place of one that nobody else has, as many public models name it, where the model
    has exactly the tensors of the plans' stock network."""
    try:
        return find_trainer(name)
    except TransplantError:
        if not is_stock():
            raise
    where = path if path.suffix == ".safetensors" else path.parent.parent  # said once of all folds
    note(f"nnU-Net does not find the trainer {name} of {where}; its tensors are those of the stock network, so it "
         "counts as a model of nnUNetTrainer")
    return nnUNetTrainer


def _shapes(weights: Network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _plainly_named(weights: dict[str, torch.Tensor], tensors: Layout) -> dict[str, torch.Tensor]:
    """Without the prefixes of names that DDP and torch.compile leave in checkpoints, where all names then fit."""
    plain = {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in weights.items()}
    return plain if len(plain) == len(weights) and plain.keys() == tensors.shapes.keys() else weights


def _layout(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], trainer: type[nnUNetTrainer],
            described_in: Path, trust: bool, tensors: int) -> Layout:
    """The layout of a model that nobody has checked. tensors: how many of them its file holds."""
    check_dataset_json(dataset_json, f"the dataset.json of {described_in}", RECORD)
    try:
        if not trust:
            check_plans(plans, configuration)
        return layout(plans, configuration, dataset_json, trainer, tensors)
    except TransplantError as error:
        raise TransplantError(f"{described_in}: {error}") from error
    except Exception as error:  # nnU-Net meets missing keys and nonsense with any exception
        raise TransplantError(f"nnU-Net cannot build the network that the plans of {described_in} describe "
                              f"({type(error).__name__}: {shortened(error)})") from error


def _open_task_vector(path: Path, theta_0: Network | None, trust: bool) -> TaskVectorModel:
    header = read_header(path)
    if theta_0 is None:
        beside = theta_0_path(path.parent, header.theta_0)
        if not beside.is_file():
            raise TransplantError(f"{path} is a task vector: give the base it is to be added to with -base")
        theta_0 = read_theta_0(beside, header.theta_0)
    if checkpoints.tensors_sha256(theta_0) != header.theta_0:
        raise TransplantError(f"{path} is a task vector of another base than the one given by -base (it wants theta_0 "
                              f"with SHA-256 {header.theta_0[:16]}...)")

    def expected(trainer: type[nnUNetTrainer]) -> Layout:
        return _layout(header.plans, header.configuration, header.dataset_json, trainer, path, trust, len(theta_0))

    def is_stock() -> bool:
        stock = expected(nnUNetTrainer)
        return {name: stock.shapes[name] for name in stock.body} == _shapes(theta_0)

    trainer = _find_trainer(header.trainer_name, path, is_stock)
    tensors = expected(trainer)
    axes = tuple(header.mirroring_axes) if header.mirroring_axes else None
    return TaskVectorModel(path, header.plans, header.dataset_json, header.configuration, trainer, axes,
                           {"theta_0": header.theta_0}, tensors, header=header, base=theta_0)


def model_labels(models: Iterable[Path | str], files: Sequence[str] = ()) -> list[str]:
    """A short, unique name for each model, which may become a folder beside these files.

    .../Dataset901_Liver/nnUNetTrainer__nnUNetPlans__3d_fullres gives Dataset901_Liver__nnUNetTrainer, any other folder
    and a task vector file, its own name. A checkpoint adds its fold: it is alone. Equal names get _2, _3, ...
    """
    labels: list[str] = []
    for model in models:
        path = Path(os.path.abspath(model))
        if path.suffix == ".safetensors":  # a task vector file
            path = path.with_suffix("")
        folder = path.parent.parent if path.is_file() else path
        label = folder.name
        if folder.parent.name.startswith("Dataset") and label.count("__") == 2:
            label = f"{folder.parent.name}__{label.partition('__')[0]}"
        if path.is_file():
            label += f"__{path.parent.name}"
        # some file systems ignore case
        taken = {other.lower() for other in (*labels, *files)}
        candidates = (label, *(f"{label}_{i}" for i in range(2, len(taken) + 3)))
        labels.append(next(candidate for candidate in candidates if candidate.lower() not in taken))
    return labels


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TransplantError(f"{path.parent} is not a trained nnU-Net model folder: it has no {path.name}")
    return files.read_json(path)


def open_theta_0(base: Path | str, checkpoint_name: str = CHECKPOINT, trust: bool = False) -> dict[str, torch.Tensor]:
    """The base given as -base, by canonical names and without heads: a model folder with one fold, a checkpoint in
    one, or a theta_0 file of a model folder."""
    base = Path(base)
    if base.suffix == ".safetensors":
        return read_theta_0(base)
    models = open_models(base, None, checkpoint_name, trust)
    if len(models) > 1:
        raise TransplantError(f"{base} has {len(models)} folds: give the checkpoint of the one that is the base, "
                              f"such as {models[0].path}")
    return models[0].body()


def shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
