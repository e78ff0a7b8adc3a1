"""What the trainers are made of: accumulation, schedules, dropout by hooks, AdamW on tau.

The regimes are those of U-Net Transplant (Lumetti et al., MICCAI 2025): Table 1 and section 3, "Training". Everything
else (plans, patch size, loss, augmentation, deep supervision, validation) stays nnU-Net's.
"""
import math
import random
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import Layout, bare, canonical_names, changes_network, layout
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.nnunet import nnUNetTrainer
from nnunet_transplant.task_vector import RECORD, read_theta_0, theta_0_path, write_theta_0

TASK_EPOCHS, TASK_HEAD_EPOCHS = 10, 2


def micro_batches(effective_batch_size: int, planned_batch_size: int, world_size: int = 1) -> tuple[int, int]:
    """(size of one micro-batch, how many of them) on each of `world_size` processes.

    The largest micro-batch that is no larger than what the plan's memory allows and divides the effective batch:
    plan 3, effective 8 gives (2, 4). Raises TransplantError where the processes cannot share the batch evenly.
    """
    share, rest = divmod(effective_batch_size, world_size)
    if rest:
        raise TransplantError(f"an effective batch of {effective_batch_size} cannot be shared by {world_size} GPUs: "
                              f"use a number of GPUs that divides it")
    limit = max(1, planned_batch_size // world_size)
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= limit)
    return size, share // size


class CosineAnnealing:
    """lr_g(epoch) = initial_lr_g (1 + cos(pi epoch / epochs)) / 2 for every parameter group g, from absolute epochs as
    nnU-Net calls it: torch's own schedulers warn at `step(epoch)`, nnU-Net's sets one rate for all groups."""

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: int) -> None:
        self.optimizer, self.epochs = optimizer, epochs
        self.initial = [group["lr"] for group in optimizer.param_groups]

    def step(self, epoch: int) -> None:
        factor = (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        for group, initial in zip(self.optimizer.param_groups, self.initial, strict=True):
            group["lr"] = initial * factor


class ConstantRate:
    """The rates of the optimiser's groups stay what they are."""

    def step(self, epoch: int) -> None:
        pass


def add_channel_dropout(network: nn.Module, p: float) -> int:
    """Drop whole channels behind the normalisation of every convolution block, in training only; returns how many
    blocks.

    By forward hook: a dropout module would rename tensors (`all_modules.1` becomes `.2`) and the checkpoint would no
    longer load in a stock trainer. Behind the normalisation, because an instance norm undoes the rescaling in front of
    it. The residual encoders' skip projections stay whole.
    """
    def drop(norm: nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.feature_dropout(output, p, norm.training)

    norms = [block.norm for name, block in network.named_modules()
             if isinstance(block, ConvDropoutNormReLU) and hasattr(block, "norm") and ".skip." not in f".{name}."]
    for norm in norms:
        norm.register_forward_hook(drop)
    return len(norms)


class AdamWOnTau(torch.optim.AdamW):
    """AdamW on tau where theta = theta_0 + tau, theta_0 frozen: groups with a `tau_decay` decay tau, not theta.

    AdamW on tau is tau <- (1 - lr decay) tau - lr Adam(gradient), and the gradient by tau is the gradient by theta. In
    terms of theta the first factor is a linear interpolation towards theta_0, so no second network is needed. As part
    of `step` it happens only where a step is taken: a GradScaler that skips one skips both.
    """
    theta_0: dict[nn.Parameter, torch.Tensor]

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters and "tau_decay" in group:
                torch._foreach_lerp_(parameters, [self.theta_0[p] for p in parameters],
                                     group["lr"] * group["tau_decay"])
        return super().step(closure)


def head_only_epochs(epochs: int) -> int:
    """Epochs at the start in which only the heads train: 2 of 10, scaled for shorter runs, never all of them."""
    return min(round(TASK_HEAD_EPOCHS * min(epochs, TASK_EPOCHS) / TASK_EPOCHS), epochs - 1)


def segmentation_layers(network: nn.Module) -> list[nn.Module]:
    """The heads of a convolutional U-Net, lowest resolution first. Raises TransplantError for other networks."""
    layers = getattr(getattr(bare(network), "decoder", None), "seg_layers", None)
    if layers is None:
        raise TransplantError(f"these trainers train nnU-Net's convolutional U-Nets: {type(bare(network)).__name__} "
                              "has no decoder with segmentation layers")
    return list(layers)


def untrained_heads(network: nn.Module, deep_supervision: bool) -> list[nn.Parameter]:
    """The heads that the loss gives no gradient: the lowest one under deep supervision, else all but the highest."""
    heads = segmentation_layers(network)
    unused = heads[:1] if deep_supervision else heads[:-1]
    return [p for head in unused[:len(heads) - 1] for p in head.parameters()]


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator of this process, in types that a safe unpickler reads."""
    state_of_numpy: Any = np.random.get_state(legacy=True)  # the tuple of old
    kind, keys, *rest = state_of_numpy
    state = {"torch": torch.get_rng_state(), "python": random.getstate(),
             "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest)}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


class TransplantTrainer(nnUNetTrainer):
    """What the three trainers share: an effective batch whatever the plan's batch size, AdamW, gradient clipping at
    1.0, and checkpoints of the stock network that resume exactly.

    A checkpoint says `trainer_name` nnUNetTrainer, so that nnU-Net without this package predicts with it; the real
    trainer is in the key `nnunet_transplant`.
    """
    effective_batch_size = 8
    epochs = 100
    learning_rate = 1e-4
    dropout = 0.0
    gradient_clip = 1.0
    iterations_per_epoch: int | None = None  # None: nnU-Net's 250 (and 50 for validation)
    mirroring = True
    bfloat16 = False

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device("cuda")):  # noqa: B008 - nnU-Net's own signature
        # nnU-Net copies dataset.json into checkpoints and model folders: leave the paths of patient images out
        dataset_json = {key: value for key, value in dataset_json.items() if key != "dataset"}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs
        self.initial_lr = self.learning_rate
        self.weight_decay = 0.1
        # nnU-Net rounds its oversampling per batch (a micro-batch of 1 would give none): draw it per sample
        self.probabilistic_oversampling = True
        if self.iterations_per_epoch is not None:
            self.num_iterations_per_epoch = self.iterations_per_epoch
            self.num_val_iterations_per_epoch = max(1, self.iterations_per_epoch // 5)
        self.save_every = min(50, max(1, self.num_epochs // 20))
        self._resumed_random_state: dict[str, Any] | None = None

    def _set_batch_size_and_oversample(self) -> None:
        world_size = dist.get_world_size() if self.is_ddp else 1
        self.batch_size, self.num_micro_batches = micro_batches(
            self.effective_batch_size, self.configuration_manager.batch_size, world_size)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802
        *rest, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return *rest, mirror_axes

    def initialize(self) -> None:
        super().initialize()
        segmentation_layers(self.network)
        if self.dropout and not add_channel_dropout(bare(self.network), self.dropout):
            raise TransplantError(f"{type(self).__name__} needs a network with normalised convolution blocks: "
                                  "its dropout goes there")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, CosineAnnealing(optimizer, self.num_epochs)

    def on_train_start(self) -> None:
        super().on_train_start()
        # last, after everything that draws numbers at the start; not on further GPUs, which draw other batches
        if self._resumed_random_state is not None and self.local_rank == 0:
            set_random_state(self._resumed_random_state, self.device)

    def train_step(self, batch: dict) -> dict:
        """One optimiser step on `num_micro_batches` batches: the given one and as many more as it takes."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for i in range(self.num_micro_batches):
            batch = batch if i == 0 else next(self.dataloader_train)
            last = i == self.num_micro_batches - 1
            local = isinstance(self.network, DistributedDataParallel) and not last
            with self.network.no_sync() if local else nullcontext():  # GPUs exchange gradients once a step
                losses.append(self._backward(batch))
        self.before_step()
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.gradient_clip)
        if self.grad_scaler is not None:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            self.optimizer.step()
        return {"loss": torch.stack(losses).sum().cpu().numpy()}

    def _backward(self, batch: dict) -> torch.Tensor:
        """Add the gradient of one micro-batch, weighted as its share of the effective batch."""
        data = batch["data"].to(self.device, non_blocking=True)
        target = batch["target"]
        target = [t.to(self.device, non_blocking=True) for t in target] if isinstance(target, list) \
            else target.to(self.device, non_blocking=True)
        with self._autocast():
            output = self.network(data)
            if self.bfloat16:  # the loss in full precision: a CPU's autocast leaves its sums as they are
                output = [o.float() for o in output] if isinstance(output, list) else output.float()
            loss = self.loss(output, target) / self.num_micro_batches
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager:
        if self.bfloat16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return torch.autocast("cuda") if self.device.type == "cuda" else nullcontext()

    def before_step(self) -> None:
        """Called with the gradients of the whole effective batch, before they are clipped."""

    def record(self) -> dict[str, Any]:
        """What the checkpoint's own key says of this training."""
        return {"trainer": type(self).__name__}

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0:
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        stock = nnUNetTrainer if not changes_network(type(self)) else type(self)
        checkpoints.write({
            "network_weights": bare(self.network).state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": stock.__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            RECORD: self.record() | {"random_state": random_state(self.device)},
        }, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        own = checkpoints.read(Path(filename_or_checkpoint)).get(RECORD, {})
        if "random_state" not in own:
            raise TransplantError(f"{filename_or_checkpoint} was not written by {type(self).__name__}: "
                                  "training cannot continue from it")
        if not self.was_initialized:
            self.initialize()
        self.resume_from(own)  # first: it says what is wrong where torch would fail on the optimiser's state
        self._resumed_random_state = own["random_state"]
        super().load_checkpoint(filename_or_checkpoint)

    def resume_from(self, record: dict[str, Any]) -> None:
        """Called with our own key of the checkpoint that training continues from."""


class TaskVectorTrainer(TransplantTrainer):
    """Fine-tunes tau = theta - theta_0 from frozen theta_0, the weights given by -pretrained_weights.

    New segmentation heads at lr 1e-3 with AdamW's default decay 0.01, the rest at lr 1e-4 with decay 0.1 on tau; only
    the heads for the first 2 of 10 epochs; no dropout, whatever the base had; no learning-rate decay.
    """
    epochs = TASK_EPOCHS
    head_learning_rate = 1e-3
    theta_0_sha256: str | None = None

    def initialize(self) -> None:
        if self.is_cascaded and RECORD in self.dataset_json:
            raise TransplantError(
                "a cascade's second stage takes the labels of its dataset as input channels: a task's network has "
                "others than its base. Fine-tune 3d_fullres or 3d_lowres instead")
        super().initialize()
        # nnU-Net loads -pretrained_weights behind this, and does not tell: remember what random weights look like
        self._random_sha256 = checkpoints.tensors_sha256(self.body_tensors())

    def body_tensors(self) -> dict[str, torch.Tensor]:
        """Everything but the heads, each tensor under its canonical name, as they are now (on the training device)."""
        state = bare(self.network).state_dict()
        return {name: state[name] for name in self._layout().body}

    def _layout(self) -> Layout:
        return layout(self.plans_manager.plans, self.configuration_name, self.dataset_json, type(self))

    def configure_optimizers(self) -> tuple[AdamWOnTau, Any]:
        for p in untrained_heads(self.network, self.enable_deep_supervision):
            # nnU-Net's loss gives it a tiny weight under DDP: outside the optimiser its gradient would only pile up
            p.requires_grad_(False)
        heads = self._layout().heads
        canonical = canonical_names(self.network)
        named = [(canonical[name], p) for name, p in bare(self.network).named_parameters()]
        body = [p for name, p in named if name not in heads]
        new = [p for name, p in named if name in heads and p.requires_grad]
        optimizer = AdamWOnTau([
            {"params": body, "lr": self.initial_lr, "weight_decay": 0.0, "tau_decay": self.weight_decay},
            {"params": new, "lr": self.head_learning_rate, "weight_decay": 0.01}])
        return optimizer, ConstantRate()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        if self.theta_0_sha256 is None:  # not resumed: what the network holds now is theta_0
            self._take_theta_0()
        super().on_train_start()

    def _take_theta_0(self) -> None:
        theta_0 = {name: tensor.detach().cpu() for name, tensor in self.body_tensors().items()}
        self.theta_0_sha256 = checkpoints.tensors_sha256(theta_0)
        if self.theta_0_sha256 == self._random_sha256:
            raise TransplantError(
                f"{type(self).__name__} fine-tunes a base, but the weights are still random: start it with "
                "-pretrained_weights CHECKPOINT (--c continues only where a checkpoint of this trainer exists)")
        path = theta_0_path(Path(self.output_folder_base), self.theta_0_sha256)
        if self.local_rank == 0 and not self.disable_checkpointing and not path.exists():
            write_theta_0(theta_0, path)
        self._freeze(theta_0)

    def _freeze(self, theta_0: dict[str, torch.Tensor]) -> None:
        """Give the optimiser its one copy of theta_0, on the training device."""
        canonical = canonical_names(self.network)
        self.optimizer.theta_0 = {
            p: theta_0[canonical[name]].to(p, copy=True) for name, p in bare(self.network).named_parameters()
            if canonical[name] in theta_0}

    def resume_from(self, record: dict[str, Any]) -> None:
        sha256 = record.get("theta_0")
        if sha256 is None:
            raise TransplantError(f"this checkpoint was not written by {type(self).__name__}: it names no theta_0")
        self.theta_0_sha256 = sha256
        self._freeze(read_theta_0(theta_0_path(Path(self.output_folder_base), sha256)))

    def before_step(self) -> None:
        if self.current_epoch < head_only_epochs(self.num_epochs):
            # not requires_grad: under DDP it must not change once the network is wrapped
            for p in self.optimizer.param_groups[0]["params"]:
                p.grad = None

    def record(self) -> dict[str, Any]:
        return super().record() | {"theta_0": self.theta_0_sha256}


_VARIANT = re.compile(r"(?:_(?P<epochs>[1-9]\d*)epochs?)?(?:_(?P<iterations>[1-9]\d*)iterations?)?"
                      r"(?P<mirroring>_NoMirroring)?(?P<bfloat16>_BFloat16)?")


def variants_of(trainer: type[TransplantTrainer]) -> Callable[[str], type[TransplantTrainer]]:
    """A module-level `__getattr__` (PEP 562) that makes trainers of any length on demand.

    nnU-Net looks trainers up with `hasattr(module, name)`: NAME_20epochs, NAME_20epochs_100iterations (optimiser steps
    an epoch instead of 250), NAME_20epochs_NoMirroring and NAME_20epochs_BFloat16 all exist for every N.
    """
    def find(name: str) -> type[TransplantTrainer]:
        match = _VARIANT.fullmatch(name.removeprefix(trainer.__name__)) if name.startswith(trainer.__name__) else None
        if match is None or name == trainer.__name__:
            raise AttributeError(name)
        changes = {"epochs": int(match["epochs"] or trainer.epochs),
                   "mirroring": trainer.mirroring and not match["mirroring"],
                   "bfloat16": trainer.bfloat16 or bool(match["bfloat16"])}
        if match["iterations"]:
            changes["iterations_per_epoch"] = int(match["iterations"])
        return type(name, (trainer,), changes | {"__module__": trainer.__module__, "__doc__": trainer.__doc__})
    return find


