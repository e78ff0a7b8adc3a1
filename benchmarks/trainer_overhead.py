"""What AdamW on tau costs beside AdamW on the weights, in time and memory of one training step.

    python benchmarks/trainer_overhead.py [--patch 64 64 64] [--batch 1] [--device cpu] [--rounds 9]

Four trainers of one network (nnU-Net's default 3d_fullres features: 31 M parameters) on the same batch, one forward
and backward pass a step: (a) nnU-Net's own train_step with torch's AdamW, (b) TaskVectorTrainer, (c) the textbook form
theta_0 + tau as two sets of tensors, with torch.func.functional_call, (d) as (b), in bfloat16. Each lives in a process
of its own, so that its peak memory is its own (resident set on a CPU, torch's allocations on a GPU); they take turns,
one step at a time, so that a busy machine is busy for all of them. On a busy CPU the processor time says more than the
clock on the wall.
"""
import argparse
import contextlib
import multiprocessing
import os
import resource
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_transplant.training import ConstantRate, TaskVectorTrainer

DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "numTraining": 1,
           "file_ending": ".nii.gz"}


class AdamWTrainer(nnUNetTrainer):
    """(a) Stock nnU-Net with another optimiser."""

    def configure_optimizers(self) -> tuple:
        return torch.optim.AdamW(self.network.parameters(), 1e-4, weight_decay=0.1), ConstantRate()


class FunctionalTrainer(nnUNetTrainer):
    """(c) theta = theta_0 + tau before every forward pass; the network's own tensors are theta_0."""

    def configure_optimizers(self) -> tuple:
        self.network.requires_grad_(False)
        self.theta_0 = dict(self.network.named_parameters())
        self.tau = {name: torch.zeros_like(p, requires_grad=True) for name, p in self.theta_0.items()}
        return torch.optim.AdamW(self.tau.values(), 1e-4, weight_decay=0.1), ConstantRate()

    def train_step(self, batch: dict) -> dict:
        self.optimizer.zero_grad(set_to_none=True)
        scaled = self.grad_scaler.scale if self.grad_scaler is not None else lambda loss: loss
        with torch.autocast("cuda") if self.device.type == "cuda" else contextlib.nullcontext():
            theta = {name: self.theta_0[name] + tau for name, tau in self.tau.items()}
            loss = self.loss(torch.func.functional_call(self.network, theta, batch["data"]), batch["target"])
        scaled(loss).backward()
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.tau.values(), 12)
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return {"loss": loss.detach().cpu().numpy()}


class OneStepTaskVectorTrainer(TaskVectorTrainer):
    """(b) As it trains behind the epochs for the heads alone."""
    epochs = 1


class BFloat16Trainer(OneStepTaskVectorTrainer):
    """(d)"""
    bfloat16 = True


TRAINERS = {"(a) AdamW on the weights": AdamWTrainer, "(b) TaskVectorTrainer": OneStepTaskVectorTrainer,
            "(c) theta_0 + tau, functional_call": FunctionalTrainer,
            "(d) TaskVectorTrainer, bfloat16": BFloat16Trainer}


def plans(features: list[int], patch: list[int], batch: int) -> dict:
    stages = len(features)
    norm = {"norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True}}
    architecture = {
        "n_stages": stages, "features_per_stage": features, "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3] * 3] * stages, "strides": [[1] * 3] + [[2] * 3] * (stages - 1), "conv_bias": True,
        "n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1), **norm,
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True}}
    configuration = {
        "data_identifier": "data", "batch_size": batch, "patch_size": patch, "spacing": [1.0] * 3, "batch_dice": False,
        "architecture": {"network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                         "arch_kwargs": architecture,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}}
    return {"dataset_name": "Dataset001_Overhead", "plans_name": "plans", "label_manager": "LabelManager",
            "configurations": {"3d_fullres": configuration}, "continue_training": False}


def ready_trainer(kind: type[nnUNetTrainer], args: argparse.Namespace, base: Path) -> nnUNetTrainer:
    """A trainer that is about to take its first step, with the weights of `base`."""
    trainer = type(kind.__name__, (kind,), {
        "effective_batch_size": args.batch, "get_dataloaders": lambda self: (None, None),
        "plot_network_architecture": lambda self: None})(
            plans(args.features, args.patch, args.batch), "3d_fullres", 0, DATASET, torch.device(args.device))
    torch.manual_seed(0)
    trainer.initialize()
    if not base.exists():
        torch.save({"network_weights": {k: v * 1.5 for k, v in trainer.network.state_dict().items()}}, base)
    load_pretrained_weights(trainer.network, base)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def random_batch(trainer: nnUNetTrainer, args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    target = torch.randint(2, (args.batch, 1, *args.patch), device=trainer.device)
    steps = [[slice(None, None, round(1 / s)) for s in scale] for scale in trainer._get_deep_supervision_scales()]
    return {"data": torch.randn((args.batch, 1, *args.patch), device=trainer.device),
            "target": [target[(..., *step)] for step in steps]}


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def serve(pipe: Connection, kind: type[nnUNetTrainer], args: argparse.Namespace, base: Path) -> None:
    """One step, timed on the wall and in processor time, for every True received; then the peak memory and the size of
    the weights."""
    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        trainer = ready_trainer(kind, args, base)
        batch = random_batch(trainer, args)
        pipe.send("ready")
        while pipe.recv():
            start, busy = time.perf_counter(), time.process_time()
            trainer.train_step(batch)
            if args.device == "cuda":
                torch.cuda.synchronize()
            pipe.send((time.perf_counter() - start, time.process_time() - busy))
        pipe.send((peak_bytes(args.device), sum(p.numel() * p.element_size() for p in trainer.network.parameters())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[32, 64, 128, 256, 320, 320])
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after 3 of warming up")
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "preprocessed" / "Dataset001_Overhead"
        (data / "data").mkdir(parents=True)
        (data / "data" / "case.b2nd").touch()
        (data / "dataset_fingerprint.json").write_text("{}")
        os.environ |= {f"nnUNet_{name}": f"{folder}/{name}" for name in ("raw", "preprocessed", "results")}
        os.environ["nnUNet_compile"] = "false"
        pipes, processes = {}, []
        for name, kind in TRAINERS.items():
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, kind, args, Path(folder) / "base.pth")))
            processes[-1].start()
            theirs.close()
            pipes[name].recv()
        seconds = {name: [] for name in TRAINERS}
        order = list(TRAINERS)
        for _ in range(3 + args.rounds):
            for name in order:
                pipes[name].send(True)
                seconds[name].append(pipes[name].recv())
            order = order[1:] + order[:1]  # nobody always comes first
        memory = {}
        for name, pipe in pipes.items():
            pipe.send(False)
            memory[name], weights = pipe.recv()
        for process in processes:
            process.join()
    print_table({name: times[3:] for name, times in seconds.items()}, memory, weights)


def print_table(seconds: dict[str, list[tuple[float, float]]], memory: dict[str, int], weights: int) -> None:
    """Ratios are medians of the ratios within a round: what slows a round down slows all of them."""
    first = next(iter(seconds))
    print(f"weights: {weights / 1e6:.0f} MB\n")
    print("| | s/step | time / (a) | quartiles | CPU s/step | CPU time / (a) | peak MB | above (a), in copies of the "
          "weights |")
    print("|---|---|---|---|---|---|---|---|")
    for name, steps in seconds.items():
        wall, busy = zip(*steps, strict=True)
        ratio, cpu_ratio = ([step[clock] / step_a[clock] for step, step_a in zip(steps, seconds[first], strict=True)]
                            for clock in (0, 1))
        low, _, high = quantiles(ratio, n=4)
        copies = (memory[name] - memory[first]) / weights
        print(f"| {name} | {median(wall):.2f} | {median(ratio):.3f} | {low:.3f} to {high:.3f} | {median(busy):.2f} "
              f"| {median(cpu_ratio):.3f} | {memory[name] / 1e6:.0f} | {copies:+.2f} |")


if __name__ == "__main__":
    main()
