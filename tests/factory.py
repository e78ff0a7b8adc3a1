"""Small nnU-Net models made on the spot: the real plans format, real networks, random weights."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK
import torch
from commands import fork_command

from nnunet_transplant.architecture import build_network, layout
from nnunet_transplant.checkpoint import tensors_sha256
from nnunet_transplant.data.phantom import write_phantom_dataset
from nnunet_transplant.task_vector import theta_0_path, write_theta_0

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def small_plans(dim: int = 3, residual: bool = False, patch: int = 16, spacing: float = 1.0) -> dict:
    """nnU-Net plans with one configuration, a two- or three-stage network of few features."""
    stages = 3
    arch = {"n_stages": stages, "features_per_stage": [4, 8, 16], "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": [[3] * dim] * stages, "strides": [[1] * dim, [2] * dim, [2] * dim],
            "n_conv_per_stage_decoder": [1] * (stages - 1), "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}}
    arch["n_blocks_per_stage" if residual else "n_conv_per_stage"] = [1] * stages
    resampling = {"resampling_fn_data": "resample_data_or_seg_to_shape",
                  "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
                  "resampling_fn_seg": "resample_data_or_seg_to_shape",
                  "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
                  "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                  "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0,
                                                         "force_separate_z": None}}
    name = {2: "2d", 3: "3d_fullres"}[dim]
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}", "preprocessor_name": "DefaultPreprocessor", "batch_size": 2,
        "patch_size": [patch] * dim, "median_image_size_in_voxels": [float(patch)] * dim, "spacing": [spacing] * dim,
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False], **resampling,
        "architecture": {"network_class_name": RESIDUAL if residual else PLAIN, "arch_kwargs": arch,
                         "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
        "batch_dice": dim == 2}
    return {"dataset_name": "Dataset700_Small", "plans_name": "nnUNetPlans",
            "original_median_spacing_after_transp": [spacing] * 3, "original_median_shape_after_transp": [patch] * 3,
            "image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
            "configurations": {name: configuration}, "experiment_planner_used": "ExperimentPlanner",
            "label_manager": "LabelManager", "foreground_intensity_properties_per_channel": {"0": {}}}


def dataset_json(labels: dict, regions_class_order: list[int] | None = None, **more: object) -> dict:
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 8, "file_ending": ".nii.gz", **more}
    return content | ({} if regions_class_order is None else {"regions_class_order": regions_class_order})


def random_network(plans: dict, dataset: dict, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    configuration = next(iter(plans["configurations"]))
    network = build_network(plans, configuration, dataset)
    with torch.no_grad():  # norms start as the identity and biases at zero: make every tensor count
        for tensor in network.parameters():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return network


def write_model(folder: Path, labels: dict | None = None, order: list[int] | None = None, seed: int = 0,
                fold: str = "0", plans: dict | None = None, base: torch.nn.Module | None = None, step: float = 0.05,
                record_base: bool = True, axes: tuple[int, ...] | None = None, change: dict | None = None,
                **dataset: object) -> Path:
    """A trained model folder. With `base` the body is the base's plus a random tau of size `step`, and theta_0 is
    recorded as nnUNetTrainerTaskVector does. `change` replaces tensors of the state dict by name."""
    plans = small_plans() if plans is None else copy.deepcopy(plans)
    content = dataset_json(labels or {"background": 0, "one": 1, "two": 2}, order, **dataset)
    configuration = next(iter(plans["configurations"]))
    network = random_network(plans, content, seed)
    record = {}
    if base is not None:
        names = layout(plans, configuration, content).body
        theta_0 = {name: tensor.clone() for name, tensor in base.state_dict().items() if name in names}
        state = network.state_dict()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name in names:
                state[name].copy_(theta_0[name] + step * torch.randn(theta_0[name].shape, generator=generator))
        if record_base:
            (folder / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
            sha256 = tensors_sha256(theta_0)
            write_theta_0(theta_0, theta_0_path(folder, sha256))
            record = {"nnunet_transplant": {"trainer": "nnUNetTrainerTaskVector", "theta_0": sha256}}
    path = folder / f"fold_{fold}" / "checkpoint_final.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(content))
    (folder / "dataset_fingerprint.json").write_text("{}")
    torch.save({"network_weights": network.state_dict() | (change or {}), "optimizer_state": {}, "logging": {},
                "grad_scaler_state": None, "_best_ema": 0.5, "current_epoch": 1,
                "init_args": {"configuration": configuration, "fold": fold, "plans": plans, "dataset_json": content},
                "trainer_name": "nnUNetTrainer", "inference_allowed_mirroring_axes": axes, **record}, path)
    return folder


def write_volumes(raw: Path, name: str, labels: dict, cases: int = 3, shape: tuple[int, ...] = (20, 18, 22)) -> Path:
    """A raw dataset of random images and random boxes of every label."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (raw / name / part).mkdir(parents=True)
    values = sorted({value for label in labels.values() for value in (label if isinstance(label, list) else [label])})
    for case in range(cases):
        segmentation = np.zeros(shape, np.uint8)
        for value in values[1:]:
            corner = [rng.integers(0, size - 6) for size in shape]
            segmentation[tuple(slice(start, start + 6) for start in corner)] = value
        image = (segmentation + rng.normal(0, 0.3, shape)).astype(np.float32)
        for array, path in ((image, f"imagesTr/case_{case}_0000.nii.gz"),
                            (segmentation, f"labelsTr/case_{case}.nii.gz")):
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), raw / name / path)
    (raw / name / "dataset.json").write_text(json.dumps(dataset_json(labels) | {"numTraining": cases}))
    return raw / name


def base_network(labels: dict | None = None, plans: dict | None = None, seed: int = 99) -> torch.nn.Module:
    return random_network(plans or small_plans(), dataset_json(labels or {"background": 0, "all": 1}), seed)


def write_planned_phantom(root: Path, number: int, kind: str = "plain", cases: int = 5) -> str:
    """A raw phantom dataset, preprocessed by nnU-Net's command and planned narrow; returns its name."""
    name = f"Dataset{number}_Phantom"
    write_phantom_dataset(root / "raw" / name, cases, "A", seed=number, labels=kind, shape=(24, 28, 36))
    fork_command("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres", "-npfp", 1, "-np", 1)
    write_narrow_plans(root / "preprocessed" / name / "nnUNetPlans.json", "3d_fullres")
    return name


def write_narrow_plans(path: Path, *configurations: str, residual: bool = False) -> None:
    """nnU-Net's own plans with a tiny network, patch and batch."""
    plans = json.loads(path.read_text())
    for configuration in configurations:
        narrow = small_plans(2 if configuration == "2d" else 3, residual)["configurations"][configuration]
        plans["configurations"][configuration] |= {key: narrow[key] for key in (
            "architecture", "patch_size", "batch_size")}
    path.write_text(json.dumps(plans))


def dice_frame(rows: list[tuple]) -> pd.DataFrame:
    """As `evaluate` returns it."""
    return pd.DataFrame(rows, columns=["model", "structure", "case", "dice"])


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def run_command(name: str, *args: object, expect: int = 0) -> subprocess.CompletedProcess:
    """An installed command of nnU-Net or of ours, as a user runs it. Checks its exit status."""
    program = Path(sys.executable).with_name(name)
    done = subprocess.run([program, *map(str, args)], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == expect, f"{name} {args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done
