"""The trainers, found by nnU-Net's own search, run by nnU-Net's own loop, on batches that the test chooses."""
import copy
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from factory import dataset_json, random_network, small_plans
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import build_network, layout
from nnunet_transplant.environment import ext_trainer_value
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.task_vector import RECORD, read_theta_0, theta_0_path
from nnunet_transplant.training import (
    CosineAnnealing,
    TransplantTrainer,
    add_channel_dropout,
    head_only_epochs,
    micro_batches,
    random_state,
    set_random_state,
)

NAMES = ("nnUNetTrainerStable", "nnUNetTrainerPlastic", "nnUNetTrainerTaskVector")
DATASET = "Dataset700_Small"
LABELS = {"background": 0, "one": 1, "two": 2}
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nnunet_folders: None) -> Path:
    """nnU-Net's folders with a planned dataset that has no images; trainers get their batches from `batch`."""
    monkeypatch.setenv("nnUNet_extTrainer", ext_trainer_value())
    write_dataset(tmp_path)
    monkeypatch.setattr(TransplantTrainer, "get_dataloaders", injected_dataloaders)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *_: None)
    return tmp_path


def write_dataset(root: Path, plans: dict | None = None, labels: dict | None = None, **more: object) -> None:
    folder = root / "preprocessed" / DATASET
    (folder / "nnUNetPlans_3d_fullres").mkdir(parents=True, exist_ok=True)
    (folder / "nnUNetPlans_3d_fullres" / "case.b2nd").touch()
    (folder / "dataset_fingerprint.json").write_text("{}")
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans or small_plans(patch=8)))
    (folder / "dataset.json").write_text(json.dumps(dataset_json(labels or LABELS, **more)))


def batch(trainer: nnUNetTrainer, number: int, size: int | None = None, dtype: torch.dtype = torch.float32) -> dict:
    """Random images and labels, the same for the same number."""
    generator = torch.Generator().manual_seed(1000 + number)
    size = size or trainer.batch_size
    patch = trainer.configuration_manager.patch_size
    classes = trainer.label_manager.num_segmentation_heads
    target = torch.randint(classes, (size, 1, *patch), generator=generator)
    steps = [[round(1 / s) for s in scale] for scale in trainer._get_deep_supervision_scales()]
    return {"data": torch.randn((size, 1, *patch), generator=generator, dtype=dtype),
            "target": [target[(..., *(slice(None, None, n) for n in step))] for step in steps]}


def injected_dataloaders(trainer: TransplantTrainer) -> tuple[Iterator[dict], Iterator[dict]]:
    """What an uninterrupted run would see from this epoch on."""
    first = trainer.current_epoch * trainer.num_iterations_per_epoch * trainer.num_micro_batches
    return map(partial(batch, trainer), itertools.count(first)), map(partial(batch, trainer), itertools.repeat(-1))


def new_trainer(name: str, fold: int = 0, resume: bool = False, pretrained: Path | None = None,
                configuration: str = "3d_fullres") -> TransplantTrainer:
    """A trainer as nnUNetv2_train builds it, up to run_training()."""
    trainer = get_trainer_from_args(DATASET, configuration, fold, name, "nnUNetPlans", resume, CPU)
    maybe_load_checkpoint(trainer, resume, False, None if pretrained is None else str(pretrained))
    return trainer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pre-trained base with other labels."""
    content = dataset_json({"background": 0, "all": 1})
    path = tmp_path / "base.pth"
    torch.save({"network_weights": random_network(small_plans(), content, 99).state_dict()}, path)
    return path


def weights(trainer: nnUNetTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# ---------------------------------------------------------------------------------------------- the small parts

@pytest.mark.parametrize(("effective", "planned", "world_size", "expected"), [
    (8, 2, 1, (2, 4)), (8, 3, 1, (2, 4)), (4, 9, 1, (4, 1)), (4, 3, 1, (2, 2)), (8, 1, 1, (1, 8)), (8, 8, 1, (8, 1)),
    (8, 2, 2, (1, 4)), (8, 6, 2, (2, 2)), (8, 16, 8, (1, 1)), (8, 2, 4, (1, 2)), (4, 4, 4, (1, 1))])
def test_micro_batches_fit_into_the_plan_and_make_up_the_batch(effective, planned, world_size, expected) -> None:
    size, count = micro_batches(effective, planned, world_size)
    assert (size, count) == expected
    assert size * count * world_size == effective


@pytest.mark.parametrize(("effective", "world_size"), [(8, 3), (4, 8)])
def test_a_batch_that_the_gpus_cannot_share_is_an_error(effective: int, world_size: int) -> None:
    with pytest.raises(TransplantError, match=f"cannot be shared by {world_size} GPUs"):
        micro_batches(effective, 8, world_size)


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning", "ignore:Detected call of:UserWarning")
def test_cosine_annealing_is_torchs_closed_form_for_every_group() -> None:
    def optimiser() -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": nn.Parameter(torch.zeros(1)), "lr": lr} for lr in (1e-3, 0.2)])

    ours, theirs = optimiser(), optimiser()
    schedule, reference = CosineAnnealing(ours, 7), torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 7)
    for epoch in (0, 1, 2, 3, 4, 5, 6, 3):  # also backwards: the epoch counts, not the calls
        schedule.step(epoch)
        reference.step(epoch)
        expected = [group["lr"] for group in theirs.param_groups]
        assert [group["lr"] for group in ours.param_groups] == pytest.approx(expected, rel=1e-12)


def test_epochs_for_the_heads_alone() -> None:
    counts = {n: head_only_epochs(n) for n in range(1, 13)}
    assert counts == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 2, 9: 2, 10: 2, 11: 2, 12: 2}
    assert head_only_epochs(1000) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("suffix", "epochs", "iterations", "validation", "mirroring"), [
    ("", None, 250, 50, True), ("_1epoch", 1, 250, 50, True), ("_20epochs", 20, 250, 50, True),
    ("_4321epochs", 4321, 250, 50, True), ("_7epochs_30iterations", 7, 30, 6, True),
    ("_2iterations", None, 2, 1, True), ("_NoMirroring", None, 250, 50, False),
    ("_3epochs_1iteration_NoMirroring", 3, 1, 1, False), ("_1epoch_NoMirroring_BFloat16", 1, 250, 50, False)])
def test_variants(root, name, suffix, epochs, iterations, validation, mirroring) -> None:
    trainer = new_trainer(name + suffix)
    assert type(trainer).__name__ == name + suffix
    assert trainer.num_epochs == (epochs or {"nnUNetTrainerTaskVector": 10}.get(name, 100))
    assert (trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (iterations, validation)
    *_, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes == trainer.inference_allowed_mirroring_axes == ((0, 1, 2) if mirroring else None)
    assert trainer.save_every <= max(1, trainer.num_epochs // 20)
    assert trainer.bfloat16 == suffix.endswith("_BFloat16")


@pytest.mark.parametrize("suffix", ["_0epochs", "_epochs", "_5", "_5epochs_", "_1.5epochs", "_5iterations_5epochs",
                                    "_nomirroring", "_BFloat16_NoMirroring", "_5epochsX", "s", "_-5epochs"])
def test_nonsense_is_no_variant(root: Path, suffix: str) -> None:
    module = __import__("nnunet_transplant.trainers.nnUNetTrainerStable", fromlist=["nnUNetTrainerStable"])
    with pytest.raises(AttributeError):
        getattr(module, f"nnUNetTrainerStable{suffix}")
    with pytest.raises(RuntimeError, match="Could not find requested nnunet trainer"):
        recursive_find_trainer_class_by_name(f"nnUNetTrainerStable{suffix}")


def test_hyperparameters_are_the_papers(root: Path) -> None:
    """U-Net Transplant, Table 1 and section 3."""
    for name, (effective, dropout, rate, epochs) in {
            "nnUNetTrainerStable": (4, 0.5, 1e-3, 100), "nnUNetTrainerPlastic": (8, 0.0, 1e-4, 100),
            "nnUNetTrainerTaskVector": (8, 0.0, 1e-4, 10)}.items():
        trainer = new_trainer(name)
        trainer.initialize()
        assert trainer.batch_size * trainer.num_micro_batches == effective
        assert (trainer.dropout, trainer.num_epochs, trainer.gradient_clip) == (dropout, epochs, 1.0)
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        body = trainer.optimizer.param_groups[0]
        assert body["lr"] == rate
        assert trainer.weight_decay == 0.1
        assert (body["weight_decay"], body.get("tau_decay")) == ((0.0, 0.1) if "Task" in name else (0.1, None))
    heads = trainer.optimizer.param_groups[1]
    assert (heads["lr"], heads["weight_decay"], heads.get("tau_decay")) == (1e-3, 0.01, None)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dim", [2, 3])
def test_dropout_takes_whole_channels_behind_the_norms_and_only_in_training(dim: int, residual: bool) -> None:
    plans, p = small_plans(dim, residual), 0.25
    network = random_network(plans, dataset_json(LABELS), 0)
    names = list(network.state_dict())
    outputs: dict[str, torch.Tensor] = {}
    norms = {name: module for name, module in network.named_modules()
             if type(module).__name__.startswith("InstanceNorm") and name.endswith(".norm")}
    for name, module in norms.items():  # in front of the dropout: what the norm gives
        module.register_forward_hook(
            lambda _, __, output, name=name: outputs.update({f"{name} before": output.clone()}))
    count = add_channel_dropout(network, p)
    for name, module in norms.items():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output.clone()}))

    skips = [name for name in norms if ".skip." in name]
    assert bool(skips) == residual
    assert count == len(norms) - len(skips)
    assert list(network.state_dict()) == names
    torch.manual_seed(0)
    x = torch.randn(8, 1, *[16] * dim)
    network.train()
    network(x)
    dropped = kept = 0
    for name in norms:
        before, after = outputs[f"{name} before"].flatten(2), outputs[name].flatten(2)
        gone = (after == 0).all(2)
        if name in skips:
            assert torch.equal(before, after)
            continue
        torch.testing.assert_close(after[~gone], before[~gone] / (1 - p))
        dropped, kept = dropped + int(gone.sum()), kept + int((~gone).sum())
    assert dropped / (dropped + kept) == pytest.approx(p, abs=0.05)
    network.eval()
    network(x)
    assert all(torch.equal(outputs[name], outputs[f"{name} before"]) for name in norms)


def test_dropout_acts_under_compile_and_names_gain_no_prefix(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net does not compile on a CPU: let it, with a backend that only traces."""
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
    compile_network = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_network(network, backend="eager"))
    trainer = new_trainer("nnUNetTrainerStable_1epochs_1iterations")
    trainer.initialize()
    assert isinstance(trainer.network, torch._dynamo.OptimizedModule)
    x = batch(trainer, 0)["data"]
    trainer.network.train()
    with torch.no_grad():
        assert not torch.equal(trainer.network(x)[0], trainer.network(x)[0])
        trainer.network.eval()
        assert torch.equal(trainer.network(x)[0], trainer.network(x)[0])

    trainer.run_training()
    path = Path(trainer.output_folder) / "checkpoint_final.pth"
    stock = build_network(small_plans(), "3d_fullres", dataset_json(LABELS))
    stock.load_state_dict(checkpoints.read(path)["network_weights"], strict=True)
    again = new_trainer("nnUNetTrainerStable_1epochs_1iterations", resume=True)
    assert_equal(weights(again), weights(trainer))

    task = new_trainer("nnUNetTrainerTaskVector_1epochs_1iterations", pretrained=path)
    task.run_training()
    assert [name for name in checkpoints.read(Path(task.output_folder) / "checkpoint_final.pth")["network_weights"]
            if name not in stock.state_dict()] == []


@pytest.mark.slow
@pytest.mark.parametrize("residual", [False, True])
def test_dropout_acts_in_what_inductor_makes(residual: bool) -> None:
    """nnU-Net compiles so on CUDA. Whole channels are dropped, others each time, and what is not is scaled by
    1 / (1 - p); none are when the network predicts."""
    network = build_network(small_plans(2, residual), "2d", dataset_json(LABELS), deep_supervision=False)
    first = network.encoder.stem if residual else network.encoder.stages[0]
    plain = copy.deepcopy(first)
    assert add_channel_dropout(first, 0.5) >= 1
    compiled = torch.compile(first)
    images = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled.train(), plain.train()
        before = plain(images)
        one, other = compiled(images), compiled(images)
        dropped = (one == 0).flatten(2).all(2)
        assert dropped.float().mean() == pytest.approx(0.5, abs=0.15)
        torch.testing.assert_close(one[~dropped], 2 * before[~dropped], rtol=1e-4, atol=1e-5)
        assert not torch.equal(dropped, (other == 0).flatten(2).all(2))
        compiled.eval(), plain.eval()
        torch.testing.assert_close(compiled(images), plain(images), rtol=1e-4, atol=1e-5)


def test_random_state_round_trip_through_a_safe_file(tmp_path: Path) -> None:
    def draw() -> tuple:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.normal(), random.random(), random.gauss()

    draw()  # an odd number of normals: the second of the pair is part of the state
    torch.save(random_state(CPU), tmp_path / "state.pt")
    expected = draw()
    draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True), CPU)
    assert draw() == expected


# ------------------------------------------------------------------------------------------------ steps

def mean_loss(trainer: nnUNetTrainer) -> DeepSupervisionWrapper:
    """Cross entropy at the deep supervision's weights, large enough for gradients to be clipped. nnU-Net's own loss
    sums in float32, whatever its input."""
    return DeepSupervisionWrapper(lambda output, target: 100 * nn.functional.cross_entropy(output, target[:, 0]),
                                  trainer.loss.weight_factors)


def in_double(trainer: TransplantTrainer) -> TransplantTrainer:
    """The trainer ready for train_step(), in float64 and with batches in float64."""
    trainer.network.double()
    trainer.loss = mean_loss(trainer)
    trainer.on_train_start()
    trainer.dataloader_train = (batch(trainer, i, dtype=torch.float64) for i in itertools.count(1))
    trainer.network.train()
    return trainer


def run_steps(trainer: TransplantTrainer, steps: int) -> None:
    for step in range(steps):
        trainer.current_epoch = step // trainer.num_iterations_per_epoch
        trainer.lr_scheduler.step(trainer.current_epoch)
        first = batch(trainer, 0, dtype=torch.float64) if step == 0 else next(trainer.dataloader_train)
        trainer.train_step(first)


def adamw_on_explicit_tau(trainer: TransplantTrainer, steps: int, heads_only: int) -> dict[str, torch.Tensor]:
    """The definition: theta = theta_0 + tau, theta_0 constant, AdamW on tau; by the names of the network's state."""
    network = build_network(trainer.plans_manager.plans, "3d_fullres", trainer.dataset_json).double()
    network.load_state_dict(weights(trainer))
    is_head = {name: ".seg_layers." in name for name, _ in network.named_parameters()}
    theta_0 = {name: p.detach().clone() for name, p in network.named_parameters() if not is_head[name]}
    tau = {name: torch.zeros_like(value, requires_grad=True) for name, value in theta_0.items()}
    heads = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters() if is_head[name]}
    optimizer = torch.optim.AdamW([{"params": list(tau.values()), "lr": 1e-4, "weight_decay": 0.1},
                                   {"params": list(heads.values()), "lr": 1e-3, "weight_decay": 0.01}])
    for step in range(steps):
        parts = [batch(trainer, number, dtype=torch.float64) for number in range(4 * step, 4 * step + 4)]
        data = torch.cat([part["data"] for part in parts])
        target = [torch.cat(scale) for scale in zip(*(part["target"] for part in parts), strict=True)]
        optimizer.zero_grad()
        theta = {name: theta_0[name] + tau[name] for name in tau} | heads
        trainer.loss(torch.func.functional_call(network, theta, data), target).backward()
        if step < heads_only:
            for value in tau.values():
                value.grad = None
        nn.utils.clip_grad_norm_([*tau.values(), *heads.values()], 1.0)
        optimizer.step()
    with torch.no_grad():
        return {name: theta_0[name] + tau[name] for name in tau} | heads


@pytest.mark.parametrize(("epochs", "iterations", "heads_only"), [(1, 20, 0), (4, 5, 5)])
def test_task_vector_is_adamw_on_an_explicit_tau(root: Path, base: Path, epochs, iterations, heads_only) -> None:
    trainer = in_double(new_trainer(f"nnUNetTrainerTaskVector_{epochs}epochs_{iterations}iterations", pretrained=base))
    assert (trainer.batch_size, trainer.num_micro_batches) == (2, 4)
    before = weights(trainer)
    expected = adamw_on_explicit_tau(trainer, 20, heads_only)
    run_steps(trainer, 20)
    actual = dict(trainer.network.named_parameters())
    assert actual.keys() == expected.keys()
    moved = max((actual[name] - before[name]).abs().max().item() for name in actual if ".seg_layers." not in name)
    assert moved > 1e-4
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() < 1e-11, name


def test_body_waits_for_the_heads(root: Path, base: Path) -> None:
    trainer = in_double(new_trainer("nnUNetTrainerTaskVector_4epochs_2iterations", pretrained=base))
    before = weights(trainer)
    run_steps(trainer, 2)
    body = layout(small_plans(), "3d_fullres", dataset_json(LABELS)).body
    after = trainer.network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in body)
    assert not torch.equal(after["decoder.seg_layers.1.weight"], before["decoder.seg_layers.1.weight"])
    run_steps(trainer, 8)
    assert any(not torch.equal(after[name], before[name]) for name in body)


def accumulated_gradient(root: Path, planned: int, batch_dice: bool, labels: dict,
                         variant: str = "") -> dict[str, torch.Tensor]:
    """The gradient of one step of nnUNetTrainerPlastic on the same 8 samples, by nnU-Net's own loss."""
    plans = small_plans()
    plans["configurations"]["3d_fullres"] |= {"batch_size": planned, "batch_dice": batch_dice}
    write_dataset(root, plans, labels)
    torch.manual_seed(0)
    trainer = new_trainer(f"nnUNetTrainerPlastic{variant}")
    trainer.initialize()
    assert (trainer.batch_size, trainer.num_micro_batches) == (planned, 8 // planned)
    whole = batch(trainer, 0, size=8)
    for i in range(8):  # samples differ in how much foreground and ignore label they hold
        for target in whole["target"]:
            target[i][target[i] > i % 3] = max(labels.values()) if "ignore" in labels else 0
    parts = [{"data": whole["data"][i:i + planned], "target": [t[i:i + planned] for t in whole["target"]]}
             for i in range(0, 8, planned)]
    gradients = {}
    trainer.before_step = lambda: gradients.update(
        {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None})
    trainer.dataloader_train = iter(parts[1:])
    trainer.train_step(parts[0])
    assert next(trainer.dataloader_train, None) is None
    return gradients


@pytest.mark.parametrize(("batch_dice", "labels", "equal"), [
    (False, LABELS, True), (True, LABELS, False), (False, LABELS | {"ignore": 3}, False)])
def test_accumulation_is_the_large_batch_where_the_loss_is_a_mean_over_samples(root, batch_dice, labels, equal) -> None:
    large, small = (accumulated_gradient(root, planned, batch_dice, labels) for planned in (8, 2))
    relative = relative_difference(small, large)
    assert (relative < 1e-5) if equal else (relative > 1e-3)


def relative_difference(tensors: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    assert tensors.keys() == reference.keys()
    difference = torch.cat([(tensors[name] - reference[name]).flatten() for name in reference]).norm()
    return float(difference / torch.cat([tensor.flatten() for tensor in reference.values()]).norm())


def test_bfloat16_is_in_the_network_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients as rounded as bfloat16 is (8 bits), of a loss in float32, for weights that stay float32."""
    exact = accumulated_gradient(root, 2, False, LABELS)
    seen, build = set(), nnUNetTrainer._build_loss

    def watched(trainer: nnUNetTrainer) -> Callable:
        loss = build(trainer)
        return lambda outputs, target: (seen.update(o.dtype for o in outputs), loss(outputs, target))[1]
    monkeypatch.setattr(nnUNetTrainer, "_build_loss", watched)
    rounded = accumulated_gradient(root, 2, False, LABELS, "_BFloat16")
    assert seen == {torch.float32}
    assert all(gradient.dtype == torch.float32 for gradient in rounded.values())
    assert 1e-4 < relative_difference(rounded, exact) < 0.1


def test_a_step_the_grad_scaler_skips_leaves_every_weight(root: Path, base: Path) -> None:
    trainer = new_trainer("nnUNetTrainerTaskVector_1epochs_3iterations", pretrained=base)
    trainer.on_train_start()
    trainer.network.train()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.train_step(batch(trainer, 0))  # now tau is not zero: decay without a step would show
    before = weights(trainer)
    loss = trainer.loss
    trainer.loss = lambda output, target: loss(output, target) * math.inf
    trainer.train_step(batch(trainer, 1))
    assert_equal(weights(trainer), before)
    assert trainer.grad_scaler.get_scale() == 4.0
    trainer.loss = loss
    trainer.train_step(batch(trainer, 2))
    assert not torch.equal(trainer.network.state_dict()["decoder.stages.0.convs.0.conv.weight"],
                           before["decoder.stages.0.convs.0.conv.weight"])


def test_scaled_steps_are_the_unscaled_steps(root: Path, base: Path) -> None:
    """A power of two as scale changes no digit, so also the clipping saw unscaled gradients."""
    after = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=65536.0)):
        torch.manual_seed(0)
        trainer = new_trainer("nnUNetTrainerTaskVector_1epochs_2iterations", pretrained=base)
        trainer.grad_scaler = scaler
        trainer.on_train_start()
        trainer.network.train()
        for number in range(2):
            trainer.train_step(batch(trainer, number))
        after.append(weights(trainer))
    assert_equal(*after)


# ------------------------------------------------------------------------------------------- runs

class KilledError(Exception):
    pass


def dies_in_epoch(epoch: int) -> Callable:
    def get_dataloaders(trainer: TransplantTrainer) -> tuple[Iterator[dict], Iterator[dict]]:
        train, validation = injected_dataloaders(trainer)
        per_epoch = trainer.num_iterations_per_epoch * trainer.num_micro_batches

        def until_killed() -> Iterator[dict]:
            yield from itertools.islice(train, epoch * per_epoch + 1)
            raise KilledError
        return until_killed(), validation
    return get_dataloaders


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_resumes_to_bit_equal_weights(root: Path, base: Path, monkeypatch, name: str) -> None:
    name += "_4epochs_2iterations"
    pretrained = base if "TaskVector" in name else None
    torch.manual_seed(0)
    whole = new_trainer(name, 0, pretrained=pretrained)
    whole.run_training()

    torch.manual_seed(0)
    monkeypatch.setattr(TransplantTrainer, "get_dataloaders", dies_in_epoch(2))
    with pytest.raises(KilledError):
        new_trainer(name, 1, pretrained=pretrained).run_training()
    monkeypatch.setattr(TransplantTrainer, "get_dataloaders", injected_dataloaders)
    torch.manual_seed(1)  # a new process knows nothing of the old one's random numbers
    resumed = new_trainer(name, 1, resume=True)
    assert resumed.current_epoch == 2
    resumed.run_training()

    assert_equal(weights(resumed), weights(whole))
    files = [checkpoints.read(Path(trainer.output_folder) / "checkpoint_final.pth") for trainer in (whole, resumed)]
    assert files[0]["current_epoch"] == files[1]["current_epoch"] == 4
    assert files[0]["logging"]["train_losses"] == files[1]["logging"]["train_losses"]
    moments = [[value for state in file["optimizer_state"]["state"].values() for value in state.values()]
               for file in files]
    assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True))


def test_resuming_a_finished_run_changes_nothing(root: Path, base: Path) -> None:
    name = "nnUNetTrainerTaskVector_1epochs_1iterations"
    done = new_trainer(name, pretrained=base)
    done.run_training()
    path = Path(done.output_folder) / "checkpoint_final.pth"
    before = path.read_bytes()
    new_trainer(name, resume=True).run_training()
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_is_a_stock_one(root: Path, base: Path, name: str) -> None:
    write_dataset(root, dataset={"case": {"images": ["/secret/of/a/patient.nii.gz"], "label": "/secret/label.nii.gz"}})
    name += "_1epochs_1iterations"
    trainer = new_trainer(name, pretrained=base if "TaskVector" in name else None)
    trainer.run_training()
    folder = Path(trainer.output_folder_base)
    checkpoint = checkpoints.read(folder / "fold_0" / "checkpoint_final.pth")
    stock = build_network(small_plans(), "3d_fullres", dataset_json(LABELS))
    assert list(checkpoint["network_weights"]) == list(stock.state_dict())
    stock.load_state_dict(checkpoint["network_weights"])
    assert_equal(dict(stock.state_dict()), weights(trainer))
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    assert checkpoint[RECORD]["trainer"] == name
    assert checkpoint["init_args"].keys() == {"plans", "configuration", "fold", "dataset_json", "device"}
    assert "dataset" not in json.loads((folder / "dataset.json").read_text())
    assert [path for path in folder.rglob("*") if path.is_file() and b"secret" in path.read_bytes()] == []

    # anyone fine-tunes it with stock nnU-Net
    torch.manual_seed(3)
    fresh = new_trainer("nnUNetTrainer")
    fresh.initialize()
    random_heads = weights(fresh)
    load_pretrained_weights(fresh.network, folder / "fold_0" / "checkpoint_final.pth")
    for tensor_name, tensor in weights(fresh).items():
        source = random_heads if ".seg_layers." in tensor_name else checkpoint["network_weights"]
        assert torch.equal(tensor, source[tensor_name]), tensor_name


def test_disabled_checkpointing_writes_none(root: Path) -> None:
    trainer = new_trainer("nnUNetTrainerPlastic_1epochs_1iterations")
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert list(Path(trainer.output_folder).glob("*.pth")) == []


def test_task_vector_moves_the_body_and_leaves_the_lowest_head(root: Path, base: Path) -> None:
    trainer = new_trainer("nnUNetTrainerTaskVector_1epochs_1iterations", pretrained=base)
    before = weights(trainer)
    trainer.run_training()
    after = weights(trainer)
    for name in layout(small_plans(), "3d_fullres", dataset_json(LABELS)).body:
        assert not torch.equal(after[name], before[name]), name
    for part in ("weight", "bias"):
        assert torch.equal(after[f"decoder.seg_layers.0.{part}"], before[f"decoder.seg_layers.0.{part}"])
        assert not torch.equal(after[f"decoder.seg_layers.1.{part}"], before[f"decoder.seg_layers.1.{part}"])


def test_theta_0_is_kept_once_for_all_folds_of_a_base(root: Path, base: Path, tmp_path: Path) -> None:
    name = "nnUNetTrainerTaskVector_1epochs_1iterations"
    folds = [new_trainer(name, fold, pretrained=base) for fold in (0, 1)]
    for trainer in folds:
        trainer.run_training()
    folder = Path(folds[0].output_folder_base)
    records = [checkpoints.read(folder / f"fold_{fold}" / "checkpoint_final.pth")[RECORD] for fold in (0, 1)]
    assert records[0]["theta_0"] == records[1]["theta_0"]
    path = theta_0_path(folder, records[0]["theta_0"])
    assert list(folder.glob("*.safetensors")) == [path]
    theta_0 = read_theta_0(path)
    assert checkpoints.tensors_sha256(theta_0) == records[0]["theta_0"]
    weights_of_base = torch.load(base, weights_only=True)["network_weights"]
    bodies = {name for name in weights_of_base if ".seg_layers." not in name}
    assert theta_0.keys() <= bodies
    assert_equal(theta_0, {name: weights_of_base[name] for name in theta_0})
    pointers = {weights_of_base[name].data_ptr() for name in bodies}  # every tensor, none twice
    assert len(theta_0) == len(pointers) == len({weights_of_base[name].data_ptr() for name in theta_0})

    other = tmp_path / "other.pth"
    torch.save({"network_weights": random_network(small_plans(), dataset_json(LABELS), 7).state_dict()}, other)
    new_trainer(name, 2, pretrained=other).run_training()
    assert len(list(folder.glob("*.safetensors"))) == 2


# ---------------------------------------------------------------------------------------- what is refused

def test_task_vector_refuses_random_weights(root: Path) -> None:
    for resume in (False, True):
        with pytest.raises(TransplantError, match="weights are still random"):
            new_trainer("nnUNetTrainerTaskVector_1epochs_1iterations", resume=resume).run_training()
    assert list(root.rglob("*.safetensors")) == []


def cascade_plans() -> dict:
    plans = small_plans()
    fullres = plans["configurations"]["3d_fullres"]
    plans["configurations"]["3d_lowres"] = fullres | {"next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    return plans


def test_task_vector_refuses_the_cascade_of_a_task_dataset(root: Path) -> None:
    write_dataset(root, cascade_plans(), **{RECORD: {"parent": "Dataset004_Hippocampus"}})
    trainer = new_trainer("nnUNetTrainerTaskVector", configuration="3d_cascade_fullres")
    with pytest.raises(TransplantError, match="cascade"):
        trainer.initialize()
    new_trainer("nnUNetTrainerTaskVector", configuration="3d_lowres").initialize()
    write_dataset(root, cascade_plans())
    trainer = new_trainer("nnUNetTrainerTaskVector", configuration="3d_cascade_fullres")
    trainer.initialize()
    assert trainer.num_input_channels == 3


def test_resuming_from_another_trainers_checkpoint_is_refused(root: Path, base: Path) -> None:
    stable = new_trainer("nnUNetTrainerStable_1epochs_1iterations")
    stable.run_training()
    stock = torch.load(Path(stable.output_folder) / "checkpoint_final.pth", weights_only=False)
    del stock[RECORD]
    for trainer, source in (("TaskVector", "stable"), ("TaskVector", "stock"), ("Stable", "stock")):
        resumed = get_trainer_from_args(DATASET, "3d_fullres", 1, f"nnUNetTrainer{trainer}", "nnUNetPlans", True, CPU)
        latest = Path(resumed.output_folder) / "checkpoint_latest.pth"
        if source == "stable":
            shutil.copy(Path(stable.output_folder) / "checkpoint_final.pth", latest)
        else:
            torch.save(stock, latest)
        with pytest.raises(TransplantError, match=f"was not written by nnUNetTrainer{trainer}"):
            maybe_load_checkpoint(resumed, True, False)


def test_a_lost_or_changed_theta_0_is_named(root: Path, base: Path) -> None:
    name = "nnUNetTrainerTaskVector_1epochs_1iterations"
    trainer = new_trainer(name, pretrained=base)
    trainer.run_training()
    path = theta_0_path(Path(trainer.output_folder_base), trainer.theta_0_sha256)
    path.unlink()
    with pytest.raises(TransplantError, match=path.name):
        new_trainer(name, resume=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_segmentation_layers_is_refused(root: Path, monkeypatch, name: str) -> None:
    class Other(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.head = nn.Conv3d(1, num_classes, 1)

    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(
        lambda plans_manager, configuration_manager, num_input_channels, num_output_channels,
        enable_deep_supervision=True: Other(num_output_channels)))
    with pytest.raises(TransplantError, match="Other has no decoder with segmentation layers"):
        new_trainer(name).initialize()


def test_stable_refuses_a_network_without_norms(root: Path) -> None:
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= {"norm_op": None, "norm_op_kwargs": None}
    write_dataset(root, plans)
    with pytest.raises(TransplantError, match="normalised convolution blocks"):
        new_trainer("nnUNetTrainerStable").initialize()


# ------------------------------------------------------------------------------------- several GPUs

@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA:UserWarning")
@pytest.mark.parametrize("name", ["nnUNetTrainerStable", "nnUNetTrainerTaskVector"])
def test_under_ddp_gradients_are_exchanged_once_a_step(root, base, monkeypatch, one_process_group, name) -> None:
    """nnU-Net's DDP is for GPUs: its own wrapping, of a network on the CPU, in a group of one process."""
    monkeypatch.setattr("nnunetv2.training.nnUNetTrainer.nnUNetTrainer.DDP",
                        lambda network, device_ids: DistributedDataParallel(network))
    monkeypatch.setattr("nnunetv2.run.load_pretrained_weights.dist", SimpleNamespace(is_initialized=lambda: False))
    torch.manual_seed(0)
    trainer = get_trainer_from_args(DATASET, "3d_fullres", 0, f"{name}_1epochs_2iterations", device=CPU)
    trainer.device, trainer.grad_scaler = CPU, None
    maybe_load_checkpoint(trainer, False, False, None if "Stable" in name else str(base))
    if not trainer.was_initialized:
        trainer.initialize()
    assert isinstance(trainer.network, DistributedDataParallel)
    lowest = next(iter(trainer.network.module.decoder.seg_layers)).weight
    assert lowest.requires_grad == ("Stable" in name)
    exchanged = []

    def exchange(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.is_last():
            exchanged.append(trainer.current_epoch)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    trainer.network.register_comm_hook(None, exchange)
    trainer.run_training()
    assert trainer.num_micro_batches == (2 if "Stable" in name else 4)
    assert len(exchanged) == 2  # optimiser steps
    assert lowest.grad is None or "Stable" in name
    checkpoint = checkpoints.read(Path(trainer.output_folder) / "checkpoint_final.pth")
    stock = build_network(small_plans(), "3d_fullres", dataset_json(LABELS))
    assert list(checkpoint["network_weights"]) == list(stock.state_dict())
