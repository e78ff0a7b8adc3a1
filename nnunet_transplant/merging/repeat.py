"""Read merge.json: repeat a merge, with a task more or less."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import file_sha256
from nnunet_transplant.merging.calibration import Volumes
from nnunet_transplant.merging.merge import Recipe
from nnunet_transplant.model_folder import read_json


@dataclass(frozen=True)
class Input:
    """What shares one weight in a merge: the folds of one model."""
    files: dict[Path, str]   # checkpoints or task vector files, and their SHA-256
    weight: float            # of all of them together
    structures: list[str]

    @property
    def names(self) -> set[str]:
        """What it may be called: its path, the name of its dataset, its structure if it has only one."""
        first = next(iter(self.files))
        model = first if first.suffix == ".safetensors" else first.parent.parent
        names = {str(model), model.name, model.stem, *map(str, self.files)}
        if model.parent.name.startswith("Dataset"):
            names.add(model.parent.name)
        return names | set(self.structures if len(self.structures) == 1 else ())

    def check(self) -> None:
        """Raise TransplantError where a file has gone or changed since the merge."""
        for path, sha256 in self.files.items():
            if not path.is_file():
                raise TransplantError(f"{path}, which was merged, is not there any more")
            if file_sha256(path) != sha256:
                raise TransplantError(f"{path} has changed since it was merged")


@dataclass(frozen=True)
class Earlier:
    """A merge as its merge.json records it."""
    inputs: list[Input]
    recipe: Recipe
    base: Path | None
    folds: Sequence[str] = ("all",)  # that were written; several where fold k was merged with fold k

    @property
    def per_fold(self) -> bool:
        return len(self.folds) > 1

    def without(self, names: Sequence[str]) -> "Earlier":
        """The same with some of its models dropped. Raises TransplantError for a name that is none of theirs."""
        kept = list(self.inputs)
        for name in names:
            meant = [each for each in kept if name in each.names or str(Path(name).resolve()) in each.names]
            if not meant:
                known = sorted(min(each.names, key=len) for each in kept)
                raise TransplantError(f"-drop {name}: the merge has no such model (it has {', '.join(known)})")
            kept = [each for each in kept if each not in meant]
        return replace(self, inputs=kept)


def read_merge(folder: Path | str) -> Earlier:
    """The merge that wrote this model folder. Raises TransplantError where its merge.json is missing or damaged."""
    folder = Path(folder)
    content = read_json(folder / "merge.json")
    try:
        folds = list(content["folds"].values())
        rows = [row for fold in folds for row in fold["inputs"]]
        inputs = [_input([row for row in rows if row["group"] == group], len(folds))
                  for group in dict.fromkeys(row["group"] for row in rows)]
        return Earlier(inputs, _recipe(folds[0]), Path(folds[0]["base"]) if folds[0]["base"] else None,
                       [str(fold) for fold in content["folds"]])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise TransplantError(f"{folder / 'merge.json'} is not the record of a merge") from error


def _input(rows: list[dict[str, Any]], folds: int) -> Input:
    return Input({Path(row["path"]): str(row["sha256"]) for row in rows},
                 sum(float(row["weight"]) for row in rows) / folds, [str(name) for name in rows[0]["structures"]])


def _recipe(record: dict[str, Any]) -> Recipe:
    volumes, stages = record["volumes"], record["stage_weights"]
    return Recipe(
        method=str(record["method"]),
        weights=None if record["weights"] is None else [float(weight) for weight in record["weights"]],
        parameters=dict(record["parameters"]),
        keep_base_for=[str(pattern) for pattern in record["keep_base_for"]],
        stage_weights=None if stages is None else [float(weight) for weight in stages],
        volumes=None if volumes is None else Volumes(
            list(volumes["datasets"]), int(volumes["n_cases"]), volumes["cases"], str(volumes["device"])),
        fit_head=bool(record.get("fit_head", False)), polish=int(record.get("polish", 0)),
        polish_lr=float(record.get("polish_lr", 1e-3)),
        share=[str(pattern) for pattern in record.get("share", [])],
        same_channels=bool(record.get("same_channels", False)))
