"""What merge.json says of how a model was merged."""
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.model_folder import read_json
from nnunet_transplant.report_page.facts import Fact, fact, in_words


@dataclass(frozen=True)
class Input:
    """A model that was merged."""
    path: str
    fold: str
    weight: str
    structures: str
    sha256: str


@dataclass(frozen=True)
class Fold:
    name: str
    method: str
    facts: list[Fact]
    inputs: list[Input]


@dataclass(frozen=True)
class Record:
    folds: list[Fold]
    versions: list[Fact]


def read_record(folder: Path) -> Record:
    """merge.json. Raises TransplantError where there is none, or where it is that of several models, and KeyError,
    TypeError, ValueError or AttributeError where something in it is not as a merge writes it."""
    if not folder.is_dir():
        raise TransplantError(f"there is no folder {folder}")
    if not (folder / "merge.json").is_file():
        raise TransplantError(f"{folder} is not a merged model: it has no merge.json")
    record = read_json(folder / "merge.json")
    if isinstance(record.get("models"), list):  # written by -share
        raise TransplantError(f"{folder} holds several models side by side, that share a part: give one of them to -m: "
                              + ", ".join(str(folder / str(name)) for name in record["models"]))
    if not isinstance(record.get("folds"), dict) or not record["folds"]:
        raise TransplantError(f"{folder / 'merge.json'} is not the record of a merge")
    return Record([_read_fold(name, fold) for name, fold in record["folds"].items()],
                  [fact(name, value) for name, value in record.get("versions", {}).items()])


def _read_fold(name: str, fold: Mapping[str, Any]) -> Fold:
    """All that is read from an entry of "folds"."""
    recipe, steps = fold["recipe"], fold["steps"]
    facts = []
    for step in steps:
        facts.append(fact("step", f"{step['name']}: {step['summary']}"))
        facts.append(fact("reference", f"{step['reference']}, {step['url']}"))
        facts += [fact(option.partition(".")[2], value) for option, value in recipe["parameters"].items()
                  if option.partition(".")[0] == step["name"]]
    if recipe["weights"] is not None:
        facts.append(fact("weights given", recipe["weights"]))
    for key, title in (("keep_base_for", "left at theta_0"), ("stage_weights", "weights of the stages"),
                       ("share", "tensors shared")):
        if recipe[key]:
            facts.append(fact(title, recipe[key]))
    if fold.get("base"):
        facts.append(fact("base given", fold["base"]))
    if fold.get("theta_0_sha256"):
        facts.append(Fact("theta_0 (SHA-256)", str(fold["theta_0_sha256"]), digest=True))
    facts += [fact(f"found: {key}", value) for key, value in fold["found"].items()]
    facts += [fact(f"volumes of {dataset}", cases) for dataset, cases in fold["volumes"].items()]
    volumes = recipe["volumes"] or {}
    facts += [fact(title, volumes[key]) for key, title in (("n_cases", "volumes asked for"), ("cases", "chosen from"))
              if volumes.get(key) is not None]
    if fold.get("device"):
        facts.append(fact("looked at on", fold["device"]))
    inputs = [Input(str(each["path"]), in_words(each["fold"]), f"{float(each['weight']):.4g}",
                    in_words(each["structures"]), str(each["sha256"])) for each in fold["inputs"]]
    return Fold(name, " + ".join(str(step["name"]) for step in steps), facts, inputs)
