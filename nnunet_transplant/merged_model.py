"""A merged model in memory, and written as an ordinary nnU-Net model folder."""
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.environment import versions
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.figures.merge import save_inputs_figure
from nnunet_transplant.files import atomic_path, check_output
from nnunet_transplant.model_folder import CHECKPOINT
from nnunet_transplant.nnunet import nnUNetTrainer

RECORD_FILE = "merge.json"


@dataclass(frozen=True)
class MergedModel:
    """One merged network, with all that nnU-Net needs to predict with it."""
    state_dict: dict[str, torch.Tensor]  # of all names; names of the same tensor hold the same object
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    trainer: type[nnUNetTrainer]
    mirroring_axes: tuple[int, ...] | None
    fingerprint: Path | None          # a dataset_fingerprint.json to copy
    provenance: dict[str, Any]        # enough to repeat the merge
    notes: list[str]                  # what the user should know


@dataclass(frozen=True)
class Merged(Mapping[str, MergedModel]):
    """What a merge makes: merged models by fold, "all" unless fold k was merged with fold k; or, where models share
    only a part, a model for each input by its name, side by side."""
    models: dict[str, MergedModel]
    side_by_side: bool = False

    def __getitem__(self, name: str) -> MergedModel:
        return self.models[name]

    def __iter__(self) -> Any:
        return iter(self.models)

    def __len__(self) -> int:
        return len(self.models)

    @property
    def provenance(self) -> dict[str, Any]:
        """Of the first; the others differ only in their inputs and in what was found."""
        return next(iter(self.models.values())).provenance

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        return list(dict.fromkeys(note for model in self.models.values() for note in model.notes))

    @property
    def structures(self) -> list[str]:
        """Of the merged model, or of all that are side by side."""
        return list(dict.fromkeys(name for model in self.models.values() for name in model.dataset_json["labels"]
                                  if name not in ("background", "ignore")))

    def told(self, provenance: Mapping[str, Any], notes: Sequence[str]) -> "Merged":
        """The same, with more to know."""
        return replace(self, models={
            name: replace(model, provenance={**model.provenance, **provenance}, notes=[*model.notes, *notes])
            for name, model in self.models.items()})

    def save(self, output: Path | str, *, fold: int | None = None, overwrite: bool = False) -> Path:
        """Write an ordinary nnU-Net model folder, or several in one folder: there whole or not at all.

        fold: write fold_N instead of fold_all, for tools that take only numbers. overwrite replaces a folder only if it
        was written so. Raises TransplantError for an existing one otherwise, OSError where the disk says so. Returns
        the folder.
        """
        output = Path(output)
        if self.side_by_side:
            if fold is not None:
                raise TransplantError("-out_fold names the one fold that is written; here are several models")
            write_side_by_side(self.models, output, overwrite)
        else:
            write_merge(self.models if fold is None else {str(fold): self._only(fold)}, output, overwrite)
        return output

    def _only(self, fold: int) -> MergedModel:
        if fold < 0:
            raise TransplantError(f"-out_fold must not be negative, not {fold}")
        if list(self.models) != ["all"]:
            raise TransplantError("-out_fold names the one fold that is written; here are several: "
                                  + " ".join(self.models))
        return self.models["all"]


def write_merge(merged: Mapping[str, MergedModel], output: Path | str, overwrite: bool = False) -> None:
    """Write merged models, by fold, as one model folder. See `Merged.save`."""
    output = Path(output)
    check_merge_output(output, overwrite)
    first = next(iter(merged.values()))
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        _write_json(first.plans, folder / "plans.json")
        _write_json(first.dataset_json, folder / "dataset.json")
        if first.fingerprint is not None:
            shutil.copyfile(first.fingerprint, folder / "dataset_fingerprint.json")
        _write_json({"versions": versions(), "folds": {fold: model.provenance for fold, model in merged.items()}},
                    folder / RECORD_FILE)
        for fold, model in merged.items():
            _write_fold(model, fold, folder / f"fold_{fold}")


def write_side_by_side(models: Mapping[str, MergedModel], output: Path | str, overwrite: bool = False) -> None:
    """Write models that share a part as model folders side by side in one folder: all of them or none."""
    output = Path(output)
    check_merge_output(output, overwrite)
    with atomic_path(output, replace=overwrite) as folder:
        folder.mkdir()
        for name, model in models.items():
            write_merge({"all": model}, folder / name)
        _write_json({"models": list(models)}, folder / RECORD_FILE)


def check_merge_output(output: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise TransplantError unless a merged model may be written here."""
    check_output(output, inputs, overwrite, RECORD_FILE, "a merged model")


def _write_fold(model: MergedModel, fold: str, folder: Path) -> None:
    """checkpoint_final.pth as nnU-Net loads it, and what nnUNetv2_export_model_to_zip wants to find beside it."""
    (folder / "validation").mkdir(parents=True)
    _write_json({"foreground_mean": {}, "mean": {}, "metric_per_case": []}, folder / "validation" / "summary.json")
    save_inputs_figure(model.provenance, folder / "progress.png")
    checkpoints.write({
        "network_weights": model.state_dict,
        "optimizer_state": None, "grad_scaler_state": None, "logging": None, "_best_ema": None, "current_epoch": 0,
        "init_args": {"plans": model.plans, "configuration": model.configuration, "fold": fold,
                      "dataset_json": model.dataset_json},
        "trainer_name": model.trainer.__name__,
        "inference_allowed_mirroring_axes": model.mirroring_axes,
    }, folder / CHECKPOINT)


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
