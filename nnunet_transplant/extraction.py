"""A trained model as a task vector file."""
from pathlib import Path

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import file_sha256
from nnunet_transplant.mergeable import check_base
from nnunet_transplant.model_folder import CHECKPOINT, open_models, open_theta_0
from nnunet_transplant.task_vector import DTYPES, Header, write_task_vector


def extract(model: Path | str, output: Path | str, *, fold: str | int | None = None,
            checkpoint_name: str = CHECKPOINT, base: Path | str | None = None, dtype: str = "float32",
            density: float = 1.0, trust: bool = False, overwrite: bool = False) -> Header:
    """Write tau = theta - theta_0 and the heads of one trained fold as .safetensors; returns what the file says.

    base: theta_0 where the model does not record it. Where it does, it must be that one.
    dtype: of the stored tau. float32 with density 1 is lossless: the file and theta_0 give theta bit for bit.
    density: share of tau's entries to store, the largest in magnitude.
    overwrite: an existing file.
    Raises TransplantError for a model of several folds, an unknown or another base, a wrong density or file name, and
    an existing file.
    """
    output = Path(output)
    use_our_trainers()
    if output.exists() and not overwrite:
        raise TransplantError(f"{output} exists already; give another -o, or --overwrite to replace it")
    if output.suffix != ".safetensors":
        raise TransplantError(f"-o must end in .safetensors, not {output.name}")
    if dtype not in DTYPES:
        raise TransplantError(f"-dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if not 0 < density <= 1:
        raise TransplantError(f"-density must be above 0 and at most 1, not {density:g}")
    models = open_models(model, None if fold is None else [str(fold)], checkpoint_name, trust)
    if len(models) > 1:
        raise TransplantError(f"{model} has the folds {' '.join(each.fold for each in models)}: choose one with -f")
    trained = models[0]
    theta_0 = trained.theta_0() if base is None else open_theta_0(base, checkpoint_name, trust)
    if theta_0 is None:
        raise TransplantError(f"{trained.name} does not keep the base it was fine-tuned from: give it with -base")
    check_base(theta_0, trained)
    sha256 = checkpoints.tensors_sha256(theta_0)
    if trained.theta_0_sha256 not in (None, sha256):
        raise TransplantError(f"the base given by -base is not the one {trained.name} was fine-tuned from")
    header = Header(
        theta_0=sha256, plans=trained.plans,
        dataset_json={key: value for key, value in trained.dataset_json.items() if key != "dataset"},
        configuration=trained.configuration, trainer_name=trained.trainer.__name__,
        mirroring_axes=None if trained.mirroring_axes is None else list(trained.mirroring_axes), fold=trained.fold,
        source={"path": str(trained.path.resolve()), "sha256": file_sha256(trained.path)},
        dtype=dtype, density=density)
    write_task_vector(trained.tensors(), theta_0, trained.layout.heads, header, output)
    return header
