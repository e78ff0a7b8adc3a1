"""How fast merging is: beside the least it could take, and beside mergekit and fusion_bench.

    python benchmarks/merge_speed.py [--sections average methods] [--models 2 4 8 16] [--repeats 5] [--work FOLDER]

average: merging model folders on disk from end to end, beside the floor: every network's weights read once (by mmap,
each tensor summed) and one network written once with the same fsync. For nnU-Net's default network (31 M parameters)
and its ResEnc L (102 M); the checkpoints hold the optimiser's momentum as nnU-Net writes it. "Merge" reads checkpoints,
merges and writes one; "folders" is merge_folders and save with all they check, build and write beside that;
"SHA-256" is the same with the hashes of the input files that merge.json records. Memory is the peak of the anonymous
resident set (the mapped files are not in it) of the last above what was there before, in a process of its own, in
multiples of one network's weights.

methods: every method without data on four task vectors of 31 M parameters in memory on all cores, beside the same
merge by the other packages' own code where they are installed (see rivals.py).

Contenders take turns, and the fastest turn of each counts: seconds, and in brackets seconds of processor time on all
cores together. Prints Markdown. Where other programs keep the cores busy, the latter say more, and set
OMP_WAIT_POLICY=PASSIVE: threads of torch that spin while they wait then slow down what they wait for, and those that
leave it to torch to use several cores suffer for it.
"""
import argparse
import gc
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import rivals
import torch

from nnunet_transplant import checkpoint
from nnunet_transplant.architecture import build_network, layout
from nnunet_transplant.files import file_sha256
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.methods import METHODS
from nnunet_transplant.methods.apply import merge_tensors
from nnunet_transplant.recipe import Recipe

Network = dict[str, torch.Tensor]

DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1}, "numTraining": 8,
           "file_ending": ".nii.gz"}
CHECKPOINT = Path("fold_0") / "checkpoint_final.pth"
STEP = 0.03         # size of a task vector, as a share of the spread of the weights of each tensor
COMMON = 0.5        # cosine between two task vectors
SLOW = 120.0        # seconds after which a contender takes no further turn
AGREES = 1e-3       # entries agree that differ by less than this share of the root mean square change
ROWS = {            # method and settings of each row; the others have the method's own defaults
    "average": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "ties, trimmed over the vector": ("ties", {"trim": "vector"}),
    "ties, trimmed by tensor": ("ties", {"trim": "tensor"}),
    "dare, then linear": ("dare", {"combine": "linear"}),
    "dare, then ties": ("dare", {"combine": "ties"}),
    "della": ("della", {}),
    "breadcrumbs": ("breadcrumbs", {}),
    "consensus": ("consensus", {}),
    "magmax": ("magmax", {}),
    "pcb": ("pcb", {}),
    "slerp": ("slerp", {}),
    "karcher": ("karcher", {}),
    "model_stock": ("model_stock", {}),
    "tsv_m": ("tsv_m", {}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
}


def main() -> None:
    sections = {"average": average_section, "methods": methods_section}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the section methods")
    parser.add_argument("--models", nargs="+", type=int, default=[2, 4, 8, 16], help="of the section average")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="folder for the models, 14 GB for 16 of the larger ones")
    args = parser.parse_args()
    print(machine())
    for name in args.sections:
        sections[name](args)


def machine() -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    versions = {"torch": torch.__version__, **rivals.installed()}
    load = Path("/proc/loadavg").read_text().split()[0]
    return (f"{torch.get_num_threads()} cores, {names[0]}; "
            + ", ".join(f"{name} {number}" for name, number in versions.items()) + f"; load {load} at the start\n")


def plans(residual: bool = False, features: Sequence[int] = (32, 64, 128, 256, 320, 320)) -> dict:
    """nnU-Net's default 3d_fullres network (31 M parameters), or its ResEnc L (102 M); tiny with few features."""
    stages = len(features)
    blocks = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6][:stages], "n_conv_per_stage_decoder": [1] * (stages - 1)} \
        if residual else {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    architecture = {
        "n_stages": stages, "features_per_stage": list(features), "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3] * 3] * stages, "strides": [[1] * 3] + [[2] * 3] * (stages - 1), "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True}, **blocks}
    network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [64] * 3, "spacing": [1.0] * 3, "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False], "batch_dice": False,
        "architecture": {"network_class_name": f"dynamic_network_architectures.architectures.unet.{network}",
                         "arch_kwargs": architecture,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}}
    return {"dataset_name": "Dataset700_Speed", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
            "configurations": {"3d_fullres": configuration}}


class Seconds(NamedTuple):
    """On the clock on the wall, and of processor time on all cores together."""
    wall: float = float("inf")
    processor: float = float("inf")

    def __str__(self) -> str:
        return f"{self.wall:.2f} ({self.processor:.2f})"

    def __truediv__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall / other.wall, self.processor / other.processor)


def race(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Seconds], dict[str, Any]]:
    """Each contender's least seconds, and what its first turn returned. They take turns; one that used up SLOW seconds
    takes no more."""
    best, used, results = dict.fromkeys(contenders, Seconds()), dict.fromkeys(contenders, 0.0), {}
    for _ in range(repeats):
        for name, run in contenders.items():
            if used[name] > SLOW:
                continue
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            result = run()
            seconds = Seconds(time.perf_counter() - wall, time.process_time() - processor)
            best[name], used[name] = Seconds(*map(min, best[name], seconds)), used[name] + seconds.wall
            results.setdefault(name, result)
            del result
    return best, results


# average, from folder to folder


def average_section(args: argparse.Namespace) -> None:
    print("| network | models | floor (s) | merge (s) | x floor | folders (s) | x floor | SHA-256 (s) | x floor "
          "| memory (x weights) |\n|---|---|---|---|---|---|---|---|---|---|")
    for residual in (False, True):
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            folders, parameters = write_models(Path(work), plans(residual), max(args.models))
            for number in args.models:
                chosen, output = folders[:number], Path(work) / "merged"
                seconds, _ = race({"floor": partial(floor, chosen, output), "merge": partial(merge, chosen, output),
                                   "folders": partial(merge_all, chosen, output, hashed=False),
                                   "hashed": partial(merge_all, chosen, output, hashed=True)}, args.repeats)
                memory = in_own_process(peak_memory, chosen, output) / (4 * parameters)
                print(f"| {parameters / 1e6:.0f} M | {number} | {seconds['floor']} | "
                      + "".join(f"{seconds[name]} | {seconds[name] / seconds['floor']} | "
                                for name in ("merge", "folders", "hashed")) + f"{memory:.2f} |", flush=True)
    print()


def write_models(work: Path, network_plans: dict, number: int) -> tuple[list[Path], int]:
    """Model folders that differ from each other as fine-tuned siblings do, and the number of their parameters."""
    state = random_state(network_plans)
    unique = distinct(state)
    content = {
        "network_weights": state, "grad_scaler_state": None, "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": None,
        "init_args": {"configuration": "3d_fullres", "fold": 0, "plans": network_plans, "dataset_json": DATASET},
        "optimizer_state": {
            "state": {i: {"momentum_buffer": torch.zeros_like(tensor)} for i, tensor in enumerate(unique.values())},
            "param_groups": [{"lr": 1e-4, "momentum": 0.99, "params": list(range(len(unique)))}]}}
    folders = [work / str(index) for index in range(number)]
    for folder in folders:
        (folder / CHECKPOINT).parent.mkdir(parents=True)
        (folder / "plans.json").write_text(json.dumps(network_plans))
        (folder / "dataset.json").write_text(json.dumps(DATASET))
        for tensor in unique.values():
            tensor.add_(STEP * spread(tensor) * torch.randn(tensor.shape))
        torch.save(content, folder / CHECKPOINT)
    return folders, sum(tensor.numel() for tensor in unique.values())


def random_state(network_plans: dict) -> Network:
    torch.manual_seed(0)
    state = build_network(network_plans, "3d_fullres", DATASET).state_dict()
    for tensor in distinct(state).values():  # norms start as the identity and biases at zero: make every tensor count
        tensor.add_(0.05 * torch.randn(tensor.shape))
    return state


def spread(tensor: torch.Tensor) -> float:
    return float(tensor.std()) if tensor.numel() > 1 else float(tensor.abs())


def distinct(state_dict: Network) -> Network:
    """Each tensor once: nnU-Net's state dicts name most of them three times."""
    first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in state_dict.items():
        first.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(first.values())


def floor(folders: Sequence[Path], output: Path) -> None:
    for folder in folders:
        weights = checkpoint.read(folder / CHECKPOINT)["network_weights"]
        for tensor in distinct(weights).values():
            tensor.sum()
    shutil.rmtree(output, ignore_errors=True)
    checkpoint.write({"network_weights": weights}, output / CHECKPOINT)


def merge(folders: Sequence[Path], output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    thetas = [distinct(checkpoint.read(folder / CHECKPOINT)["network_weights"]) for folder in folders]
    average = METHODS["average"]
    merged = merge_tensors(average, {}, average.weights(None, len(thetas)), None, thetas).result
    checkpoint.write({"network_weights": merged}, output / CHECKPOINT)


def merge_all(folders: Sequence[Path], output: Path, hashed: bool) -> None:
    shutil.rmtree(output, ignore_errors=True)
    with patch("nnunet_transplant.merger.file_sha256", file_sha256 if hashed else lambda path: "0" * 64):
        merge_folders(folders).save(output)


def peak_memory(folders: Sequence[Path], output: Path) -> int:
    """Bytes of anonymous memory that a merge needs at its peak above what was there before it."""
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())
    watcher = threading.Thread(target=watch)
    watcher.start()
    merge_all(folders, output, hashed=True)
    done.set()
    watcher.join()
    return peak - before


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def in_own_process(function: Callable[..., int], *arguments: object) -> int:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=send, args=(there, function, *arguments))
    process.start()
    result = here.recv()
    process.join()
    return result


def send(connection: Connection, function: Callable[..., int], *arguments: object) -> None:
    connection.send(function(*arguments))


# methods without data, in memory


def methods_section(args: argparse.Namespace) -> None:
    packages = list(rivals.installed())
    print("| method | nnunet_transplant (s) | " + "".join(f"{package} (s) | " for package in packages)
          + ("ours / fastest other | agreement |" if packages else "") + "\n|---|---|"
          + "---|" * (len(packages) + 2 * bool(packages)))
    tiny, networks = fine_tuned(plans(features=[4, 8, 16]), 4), fine_tuned(plans(), 4)
    for row in args.rows:
        if ROWS[row][0] in METHODS:
            with torch.no_grad(), rivals.quiet():
                for run in contenders(row, *tiny).values():  # what is imported on the way is imported now
                    run()
                seconds, results = race(contenders(row, *networks), args.repeats)
            others = [seconds[package] for package in packages if package in seconds]
            cells = [str(seconds["ours"]), *(str(seconds.get(package, "-")) for package in packages)]
            if packages:
                fastest = Seconds(*map(min, zip(*others, strict=True))) if others else None
                cells += [str(seconds["ours"] / fastest) if others else "-", compare(row, networks[0], results)]
            print(f"| {row} | " + " | ".join(cells) + " |", flush=True)
    print()


def fine_tuned(network_plans: dict, number: int) -> tuple[Network, list[Network]]:
    """theta_0 and `number` networks whose task vectors have something in common, as fine-tuned siblings' have."""
    state = random_state(network_plans)
    theta_0 = {name: state[name].clone() for name in layout(network_plans, "3d_fullres", DATASET).body}
    generator = torch.Generator().manual_seed(0)

    def noise(share: float) -> Network:
        return {name: STEP * share ** 0.5 * spread(tensor) * torch.randn(tensor.shape, generator=generator)
                for name, tensor in theta_0.items()}
    common, own = noise(COMMON), [noise(1 - COMMON) for _ in range(number)]
    return theta_0, [{name: theta_0[name] + common[name] + tau[name] for name in theta_0} for tau in own]


def contenders(row: str, theta_0: Network, thetas: Sequence[Network]) -> dict[str, Callable[[], Network]]:
    """What merges these networks for a row of the table: ours, and each package that is there and can."""
    method = METHODS[ROWS[row][0]]
    thetas = list(thetas[:method.max_models])
    settings = Recipe(method.name, parameters=ROWS[row][1]).settings()[method.name]
    weights, base = method.weights(None, len(thetas)), theta_0 if method.needs_base else None
    runs = {"ours": lambda: merge_tensors(method, settings, weights, base, thetas).result}
    for rival in rivals.RIVALS.get(row, []):
        if rival.package in rivals.installed():
            runs[rival.package] = lambda merge=rival.merge: merge(theta_0, thetas, weight=weights[0], **settings)
    return runs


def compare(row: str, theta_0: Network, results: Mapping[str, Network]) -> str:
    """In words how far the others' results are from ours."""
    def change(network: Network) -> torch.Tensor:
        return torch.cat([(network[name] - tensor).reshape(-1) for name, tensor in theta_0.items()])
    ours, notes = change(results["ours"]), []
    scale = root_mean_square(ours)
    for rival in rivals.RIVALS.get(row, []):
        if rival.package in results:
            theirs = change(results[rival.package])
            if rival.differs.startswith("random"):
                found = f"change of {root_mean_square(theirs) / scale:.3f} x our size"
            else:
                found = f"{float(((theirs - ours).abs() > AGREES * scale).float().mean()):.2%} of entries differ"
            notes.append(f"{rival.package}: {found}" + (f" ({rival.differs})" if rival.differs else ""))
    return "; ".join(notes)


def root_mean_square(vector: torch.Tensor) -> float:
    return float(vector.square().mean().sqrt())


if __name__ == "__main__":
    main()
