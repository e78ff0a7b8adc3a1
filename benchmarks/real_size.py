"""What looking at volumes costs at the size that users have: networks of 31 M (patch 128x128x128) or 102 M parameters
(ResEnc L, 160x192x192), CT volumes of 512x512x150 voxels with 24 structures.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/real_size.py WORK [--parts head fisher ...] [--patches 4] [--large]

Writes synthetic volumes and random models to WORK (nnU-Net's folders), once. Every part runs in a process of its own:
it reads volumes, makes plain forward passes of the same patches, and does the step; it prints seconds of the clock and
in brackets of the processors, their ratio, and the peak of the process's memory. Where other programs keep the cores
busy, processor seconds say more.

head, fisher, regmean, activations: beside one forward pass of each model over each patch (and one of the merged network
    for head). polish: a step beside the teacher's forward passes and a plain training step of the same batch.
matching: five models, activations given.
"""
import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from merge_speed import Seconds
from merge_speed import plans as speed_plans

from nnunet_transplant.alignment.aligners import _activations, _spec
from nnunet_transplant.alignment.dual import match, matcher, zipper
from nnunet_transplant.architecture import build_network
from nnunet_transplant.ensemble import Teacher
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.descent import gradients
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Volumes

DATASET, STRUCTURES = "Dataset800_CT", 24
SIZE, SPACING = (150, 512, 512), (2.0, 0.8, 0.8)  # z, y, x
VOLUMES_MADE, MODELS = 3, 5
STEP = 0.02  # size of a task vector, as a share of the spread of the weights of each tensor
RESAMPLING = {f"resampling_fn_{what}": value for what, order in (("data", 3), ("seg", 1), ("probabilities", 1))
              for what, value in ((what, "resample_data_or_seg_to_shape"), (f"{what}_kwargs", {
                  "is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the volumes and the models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--patches", type=int, default=4, help="that the steps look at")
    parser.add_argument("--models", type=int, default=MODELS)
    parser.add_argument("--large", action="store_true", help="networks of 102 M parameters")
    args = parser.parse_args()
    os.environ |= {f"nnUNet_{what}": str(args.work / what) for what in ("raw", "preprocessed", "results")}
    write_volumes(args.work / "raw" / DATASET)
    folders = write_models(args.work / "results", args.large)[:args.models]
    print("| | plain passes (s) | step (s) | ratio | peak memory (GB) | reading (s) |\n|" + " --- |" * 6)
    for part in args.parts:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            print(pool.submit(run, part, folders, args.patches).result(), flush=True)


def run(part: str, folders: list[Path], patches: int) -> str:
    return PARTS[part](part, folders, patches)


# ---------------------------------------------------------------------------------------------------------------------
# What a user has

def write_volumes(folder: Path) -> None:
    """Bodies with ellipsoids of other densities in them, in Hounsfield units."""
    if (folder / "dataset.json").is_file():
        return
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    z, y, x = np.ogrid[tuple(slice(-1, 1, 1j * length) for length in SIZE)]
    for case in range(VOLUMES_MADE):
        image = np.where(x ** 2 / 0.7 + y ** 2 / 0.4 < 1, 40.0, -1000.0).astype(np.float32) + 0 * z.astype(np.float32)
        labels = np.zeros(SIZE, np.uint8)
        for value in range(1, STRUCTURES + 1):
            middle, radii = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.08, 0.2, 3)
            inside = sum(((axis - m) / r) ** 2 for axis, m, r in zip((z, y, x), middle, radii, strict=True)) < 1
            labels[inside], image[inside] = value, rng.uniform(-50, 300)
        image += rng.normal(0, 20, SIZE).astype(np.float32)
        for array, name in ((image.astype(np.int16), f"imagesTr/case_{case}_0000.nii.gz"),
                            (labels, f"labelsTr/case_{case}.nii.gz")):
            written = SimpleITK.GetImageFromArray(array)
            written.SetSpacing(SPACING[::-1])
            SimpleITK.WriteImage(written, folder / name)
    names = {"background": 0} | {f"structure {value}": value for value in range(1, STRUCTURES + 1)}
    (folder / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "labels": names, "numTraining": VOLUMES_MADE, "file_ending": ".nii.gz"}))


def plans(large: bool) -> dict[str, Any]:
    """As nnU-Net plans such volumes at 1.5 mm."""
    made = speed_plans(residual=large)
    made["configurations"]["3d_fullres"] |= RESAMPLING | {
        "spacing": [1.5] * 3, "patch_size": [160, 192, 192] if large else [128] * 3,
        "normalization_schemes": ["CTNormalization"]}
    intensities = {"mean": 60.0, "std": 90.0, "percentile_00_5": -800.0, "percentile_99_5": 350.0}
    return made | {"foreground_intensity_properties_per_channel": {"0": intensities}}


def write_models(results: Path, large: bool) -> list[Path]:
    """Tasks of one base, a share of the structures each: random weights near to each other."""
    parts = np.array_split(np.arange(1, STRUCTURES + 1), MODELS)
    folders = [results / f"Dataset{810 + index}_Task" / f"nnUNetTrainer__{'Large' if large else 'Default'}__3d_fullres"
               for index in range(MODELS)]
    planned = plans(large)
    for seed, (folder, part) in enumerate(zip(folders, parts, strict=True)):
        if (folder / "fold_0" / "checkpoint_final.pth").is_file():
            continue
        (folder / "fold_0").mkdir(parents=True, exist_ok=True)
        dataset = {"channel_names": {"0": "CT"}, "numTraining": VOLUMES_MADE, "file_ending": ".nii.gz", "labels": {
            "background": 0} | {f"structure {value}": row for row, value in enumerate(part.tolist(), start=1)}}
        torch.manual_seed(0)
        network = build_network(planned, "3d_fullres", dataset)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in {id(tensor): tensor for tensor in network.parameters()}.values():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor += STEP * (tensor.std(correction=0) + 0.1) * noise
        (folder / "plans.json").write_text(json.dumps(planned))
        (folder / "dataset.json").write_text(json.dumps(dataset))
        torch.save({"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer",
                    "inference_allowed_mirroring_axes": (0, 1, 2), "init_args": {
                        "configuration": "3d_fullres", "fold": "0", "plans": planned, "dataset_json": dataset}},
                   folder / "fold_0" / "checkpoint_final.pth")
    return folders


# ---------------------------------------------------------------------------------------------------------------------
# Parts

def seconds(work: Callable[[], Any]) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return Seconds(time.perf_counter() - wall, time.process_time() - processor)


def times(each: Seconds, count: float) -> Seconds:
    return Seconds(each.wall * count, each.processor * count)


def opened(recipe: Recipe, folders: list[Path], patches: int) -> tuple[Merger, Seconds]:
    """And how long reading the volumes took."""
    groups = [open_models(folder) for folder in folders]
    made: list[Merger] = []
    with_volumes = Recipe(recipe.method, align=recipe.align, fit=recipe.fit, parameters=recipe.parameters,
                          volumes=Volumes([DATASET], n_patches=patches))
    taken = seconds(lambda: made.append(Merger(groups, with_volumes)))
    return made[0], taken


def passes(experts: Experts) -> Seconds:
    """Of one network over all patches."""
    network = experts.network(0)
    with torch.no_grad():
        network(experts.images(experts.patches[:1]))
        return seconds(lambda: [network(experts.images([patch])) for patch in experts.patches])


def row(name: str, plain: Seconds, step: Seconds, reading: Seconds | None = None) -> str:
    ratio = step / plain
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return (f"| {name} | {plain} | {step} | {ratio.wall:.2f} ({ratio.processor:.2f}) | {memory:.1f} | "
            f"{'' if reading is None else reading} |")


def beside_plain_passes(recipe: Recipe, more: int, part: str, folders: list[Path], patches: int) -> str:
    """more: passes over the patches beside those of the models."""
    merger, reading = opened(recipe, folders, patches)
    plain = passes(merger._experts)
    step = seconds(merger.tensors)
    again = passes(merger._experts)
    both = Seconds((plain.wall + again.wall) / 2, (plain.processor + again.processor) / 2)
    return row(f"{part}, {len(folders)} models, {patches} patches", times(both, len(folders) + more), step, reading)


def activations(part: str, folders: list[Path], patches: int) -> str:
    merger, reading = opened(Recipe(align="activation"), folders, patches)
    experts = merger._unaligned
    spec = _spec(experts)
    plain = passes(experts)
    step = seconds(lambda: _activations(experts, spec))
    return row(f"{part}, {len(folders)} models, {patches} patches", times(plain, len(folders)), step, reading)


def polish(part: str, folders: list[Path], patches: int) -> str:
    """One step of a batch as the plans have it: two patches."""
    merger, reading = opened(Recipe(fit=["polish"], parameters={"steps": 2}), folders, patches)
    experts = merger._experts
    batch = experts.patches[:experts.configuration.batch_size]
    merged = Merger([[model] for model in merger.models]).tensors()
    student = experts.merged_network(merged).requires_grad_(True)

    def plain_step() -> None:
        student.zero_grad()
        student(experts.images(batch)).square().mean().backward()
    teacher = Teacher(experts, 0)

    def teach() -> None:
        with torch.no_grad():
            for network in teacher.networks:
                network(experts.images(batch))
    plain = [seconds(teach), seconds(plain_step)]
    step = seconds(partial(gradients, experts, student, teacher, batch, len(batch)))
    return row(f"{part}, {len(folders)} models, a step of {len(batch)} patches",
               Seconds(*(sum(each) for each in zip(*plain, strict=True))), step, reading)


def matching(part: str, folders: list[Path], patches: int) -> str:
    merger, _ = opened(Recipe(align="activation"), folders, 1)
    experts = merger._unaligned
    spec = _spec(experts)
    of_groups = {name: values.numpy() for name, values in _activations(experts, spec).items()}
    heads = frozenset(experts.models[0].layout.heads)  # of different structures
    lines = []
    for name, solver in (("mudsc", matcher(False)), ("mudsc -to mean", matcher(True)),
                         ("mudsc -units zip -budget 0.125", zipper(0.5, 0.125))):
        taken = seconds(partial(match, spec, experts.tensors, solver, 0.5, of_groups, skip=heads))
        lines.append(f"| {part}, {len(folders)} models, {name} | | {taken} | | | |")
    return "\n".join(lines)


PARTS: dict[str, Callable[[str, list[Path], int], str]] = {
    "head": partial(beside_plain_passes, Recipe(fit=["head"]), 1),
    "fisher": partial(beside_plain_passes, Recipe("fisher"), 0),
    "regmean": partial(beside_plain_passes, Recipe("regmean"), 0),
    "activations": activations,
    "polish": polish,
    "matching": matching,
}


if __name__ == "__main__":
    main()
