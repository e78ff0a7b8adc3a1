"""What merge.json records of a merge, and recipe files: to repeat a merge, with a task more or less."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import file_sha256, read_json
from nnunet_transplant.merged_model import RECORD_FILE
from nnunet_transplant.recipe import Recipe


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
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise TransplantError(f"{folder} is no merged model: it has no {RECORD_FILE}")
    return _recorded(read_json(path), path)


def _recorded(content: dict[str, Any], path: Path) -> Earlier:
    """path: of the file with this content."""
    if "folds" not in content and "models" in content:
        raise TransplantError(f"{path} is of several models side by side: name the folder of one of them")
    try:
        folds = list(content["folds"].values())
        rows = [row for fold in folds for row in fold["inputs"]]
        inputs = [_input([row for row in rows if row["group"] == group], len(folds))
                  for group in dict.fromkeys(row["group"] for row in rows)]
        return Earlier(inputs, Recipe.from_json(folds[0]["recipe"], str(path)),
                       Path(folds[0]["base"]) if folds[0]["base"] else None, [str(fold) for fold in content["folds"]])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, TransplantError):
            raise
        raise TransplantError(f"{path} is not the record of a merge") from error


def _input(rows: list[dict[str, Any]], folds: int) -> Input:
    return Input({Path(row["path"]): str(row["sha256"]) for row in rows},
                 sum(float(row["weight"]) for row in rows) / folds, [str(name) for name in rows[0]["structures"]])


@dataclass(frozen=True)
class RecipeFile:
    """A recipe, and where the file names them, the models that it is for and their base."""
    recipe: Recipe
    models: Sequence[Path] = ()
    base: Path | None = None


def read_recipe(path: Path | str) -> RecipeFile:
    """A recipe file: JSON with the keys of `Recipe.to_json`, what is not there as by default; it may name `models` and
    `base`, as paths from its own folder. A merge.json will do: of it the recipe, without its inputs.

    Raises TransplantError for what is no recipe.
    """
    path = Path(path)
    content = read_json(path)
    if path.name == RECORD_FILE or "folds" in content:
        return RecipeFile(_recorded(content, path).recipe)
    models, base = content.pop("models", []), content.pop("base", None)
    if not (isinstance(models, list) and all(isinstance(model, str) for model in models)):
        raise TransplantError(f"{path} is no recipe: 'models' is no list of paths")
    if not isinstance(base, str | None):
        raise TransplantError(f"{path} is no recipe: 'base' is no path")
    recipe = Recipe.from_json(content, str(path))
    return RecipeFile(recipe, [path.parent / model for model in models], None if base is None else path.parent / base)


def recipe_file(recipe: Recipe, models: Sequence[Path], base: Path | None) -> Mapping[str, Any]:
    """The content of a recipe file that names its models, by absolute paths."""
    return recipe.to_json() | {"models": [str(Path(model).resolve()) for model in models],
                               "base": None if base is None else str(Path(base).resolve())}
