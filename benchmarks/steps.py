"""What the experiments share: commands run as a user types them, once each, and nnU-Net's plans made small."""
import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from nnunet_transplant.environment import ext_trainer_value

PLANS = "nnUNetPlansSmall"


class Steps:
    """Runs the commands whose result is missing, in an environment of their own, and keeps their wall time."""

    def __init__(self, work: Path) -> None:
        self.work = work.resolve()
        self.raw, self.preprocessed, self.results = (self.work / name for name in ("raw", "preprocessed", "results"))
        self.log = self.work / "seconds.json"
        trainers = Path(__file__).parent.resolve() / "trainers"
        self.environment = os.environ | {
            "nnUNet_raw": str(self.raw), "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results), "nnUNet_n_proc_DA": "2", "nnUNet_def_n_proc": "2",
            "nnUNet_extTrainer": os.pathsep.join([ext_trainer_value(), str(trainers)])}

    def __call__(self, result: Path, command: str) -> None:
        """Run a command (quoted as in a shell) unless `result`, which it makes, is there."""
        if result.exists():
            return
        print(f"$ {command}", flush=True)
        start = time.time()
        execute(shlex.split(command), self.environment)
        seconds = json.loads(self.log.read_text()) if self.log.exists() else {}
        self.log.write_text(json.dumps(seconds | {command: round(time.time() - start)}, indent=1))

    def side_by_side(self, commands: Mapping[Path, str], jobs: int = 2) -> None:
        """Several at a time, each with one thread: on few cores that is faster than one after the other with all."""
        alone = copy.copy(self)
        if len(commands) > 1:
            alone.environment = self.environment | {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "1"}
        with ThreadPool(jobs) as pool:
            pool.starmap(alone, commands.items())

    def into(self, results: str) -> "Steps":
        """The same, but models are trained into another folder of nnU-Net results: a second run of a trainer has no
        other place."""
        other = copy.copy(self)
        other.results = self.work / results
        other.environment = self.environment | {"nnUNet_results": str(other.results)}
        return other

    def model(self, dataset: str, trainer: str, plans: str = PLANS) -> Path:
        return self.results / dataset / f"{trainer}__{plans}__3d_fullres"


def execute(command: Sequence[str], environment: Mapping[str, str]) -> None:
    program, *arguments = command
    subprocess.run([str(Path(sys.executable).with_name(program)), *arguments], env=environment, check=True)


def case_names(raw: Path) -> list[str]:
    """The labelled cases of a raw data set, sorted."""
    return sorted(path.name.removesuffix(".nii.gz") for path in (raw / "labelsTr").iterdir())


def render(run: Steps, label_maps: Path, dataset: str, contrast: str, subjects: str, renders: int) -> None:
    """A raw dataset of brain volumes, see render_brains.py."""
    run(run.raw / dataset / "dataset.json",
        f"python {Path(__file__).with_name('render_brains.py')} {label_maps} {run.raw / dataset} -contrast {contrast} "
        f"-subjects {subjects} -renders {renders}")


def prepare_hippocampus(run: Steps, data: Path, split: Callable[[list[str]], list[dict[str, list[str]]]]
                        ) -> list[dict[str, list[str]]]:
    """Dataset004_Hippocampus planned, preprocessed and split as `split` says of its cases; the splits."""
    raw, preprocessed = (folder / "Dataset004_Hippocampus" for folder in (run.raw, run.preprocessed))
    if not raw.exists():
        shutil.copytree(data, raw)
    run(preprocessed / "nnUNetPlans_3d_fullres", "nnUNetv2_plan_and_preprocess -d 4 -c 3d_fullres -np 2")
    splits = split(case_names(raw))
    write_splits(preprocessed, splits)
    return splits


def write_small_plans(preprocessed: Path, name: str = PLANS, features: int = 16,
                      patch_size: Sequence[int] = (32, 40, 32), stages: int = 4) -> None:
    """nnU-Net's own plans with fewer features, no more than so many stages, a smaller patch and batch 4, on the same
    preprocessed data."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
    plans["plans_name"] = name
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"batch_size": 4, "patch_size": list(patch_size)}
    kwargs = configuration["architecture"]["arch_kwargs"]
    stages = min(stages, kwargs["n_stages"])
    kwargs |= {"n_stages": stages, "features_per_stage": [features * 2 ** i for i in range(stages)],
               "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"][:stages - 1]}
    for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
        kwargs[key] = kwargs[key][:stages]
    (preprocessed / f"{name}.json").write_text(json.dumps(plans, indent=4, sort_keys=False))


def write_splits(preprocessed: Path, splits: Sequence[Mapping[str, Sequence[str]]]) -> None:
    (preprocessed / "splits_final.json").write_text(json.dumps(
        [{part: [str(case) for case in cases] for part, cases in split.items()} for split in splits], indent=4))
