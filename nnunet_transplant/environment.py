"""nnU-Net's environment variables, as far as this package sets them, and the versions that results record."""
import importlib.util
import os
from importlib.metadata import version
from pathlib import Path


def trainers_folder() -> Path:
    """The installed folder of our trainers: works for regular and editable installs, without importing them."""
    spec = importlib.util.find_spec("nnunet_transplant.trainers")
    if spec is None or spec.submodule_search_locations is None:
        # the checkout itself is on the path: the folder lies beside the package
        return Path(__file__).resolve().parents[1] / "trainers"
    return Path(next(iter(spec.submodule_search_locations))).resolve()


def ext_trainer_value() -> str:
    """The value for nnUNet_extTrainer: our folder, joined to what the variable already holds."""
    ours = str(trainers_folder())
    others = [path for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path and path != ours]
    return os.pathsep.join([ours, *others])


def use_our_trainers() -> None:
    """Let nnU-Net, in this process and those it starts, find our trainers beside any others."""
    os.environ["nnUNet_extTrainer"] = ext_trainer_value()


def versions(*more: str) -> dict[str, str]:
    """By package: this one, those whose behaviour any result depends on, and more."""
    return {name: version(name) for name in sorted(("nnunet_transplant", "nnunetv2", "torch", *more))}
