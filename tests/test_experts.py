"""The networks of the models that are merged, and the running statistics of batch norms after a merge."""
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch
from expert_models import experts_of, experts_with, with_merged_heads
from factory import base_network, small_plans, write_model, write_volumes
from permuted import (
    LABELS,
    assert_close,
    canonical,
    image_of,
    logits,
    network_of,
    permuted,
    plans_of,
    spec_of,
    tensors_of,
    write,
)

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.data.cases import Cases
from nnunet_transplant.experts import SLICES, Experts, has_running_statistics, running_statistics
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Patch, Volumes

PLANS = plans_of("batch2d")
FIRST = "decoder.encoder.stages.0.0.convs.0.all_modules"
VOLUMES = Volumes([501], 2)


def looking(tmp_path: Path, dim: int) -> Experts:
    """Two models that see different structures, at patches of 16 voxels an axis."""
    plans = small_plans(dim)
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, plans=plans, seed=seed)
              for seed, name in ((3, "Liver"), (4, "Spleen"))]
    return experts_with(models, [])


def seen_by(experts: Experts, model: int, image: np.ndarray, row: int = 1) -> np.ndarray:
    """Where one structure has the largest score, and if that is nowhere, where it is least behind the largest."""
    with torch.no_grad():
        scores = experts.network(model)(torch.from_numpy(image)[None])[0]
    there = (scores.argmax(0) == row).numpy()
    if not there.any():
        others = [score for index, score in enumerate(scores) if index != row]
        ahead = scores[row] - torch.stack(others).max(0).values
        there = (ahead == ahead.max()).numpy()
    return there


def test_a_look_at_one_patch_is_what_the_models_say_each_in_turn(tmp_path: Path) -> None:
    experts = looking(tmp_path, 3)
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    for number in range(4):
        found = experts.see(number, image)
        assert found.dtype == bool
        np.testing.assert_array_equal(found, seen_by(experts, number % 2, image))
    assert not np.array_equal(experts.see(0, image), experts.see(1, image))


def test_the_structures_of_a_model_have_their_turns(tmp_path: Path) -> None:
    """Two folds of three structures take turns with a task of one: as many looks for the task as for both folds."""
    several = {"background": 0, "Liver": 1, "Spleen": 2, "Kidney": 3}
    models = [write_model(tmp_path / f"m{seed}", labels, plans=small_plans(3), seed=seed)
              for seed, labels in enumerate([several, several, {"background": 0, "Tumour": 1}])]
    experts = experts_with(models, [])
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    expected = [(0, 1), (2, 1), (0, 2), (2, 1), (0, 3), (2, 1), (1, 1), (2, 1), (1, 2), (2, 1), (1, 3), (2, 1), (0, 1)]
    for number, (model, row) in enumerate(expected):
        np.testing.assert_array_equal(experts.see(number, image), seen_by(experts, model, image, row))


def test_where_a_structure_is_nowhere_it_is_the_voxel_that_comes_nearest(tmp_path: Path) -> None:
    experts = looking(tmp_path, 3)
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 12)).astype(np.float32)
    name = "decoder.seg_layers.1.bias"
    experts.tensors[0][name] = experts.tensors[0][name] + torch.tensor([100.0, 0.0])
    found = experts.see(0, image)
    assert found.shape == image.shape[1:] and found.sum() == 1  # not in what the volume was padded with
    padded = np.pad(image, [(0, 0), (0, 0), (0, 0), (0, 4)])
    with torch.no_grad():
        background, liver = experts.network(0)(torch.from_numpy(padded)[None])[0].numpy()[..., :12]
    assert (liver - background)[found] == (liver - background).max()


@pytest.mark.parametrize("regions", [False, True])
def test_regions_are_seen_by_themselves(tmp_path: Path, regions: bool) -> None:
    """A softmax's row counts where it is above the others, a region's where it is above 0."""
    labels = {"background": 0, "whole": [1, 2], "core": 2} if regions else {"background": 0, "whole": 1, "core": 2}
    order = [1, 2] if regions else None
    experts = experts_with([write_model(tmp_path / "m", labels, order, plans=small_plans(3), seed=3)], [])
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    with torch.no_grad():
        scores = experts.network(0)(torch.from_numpy(image)[None])[0].numpy()
    for number in range(2):
        expected = scores[number] > 0 if regions else scores.argmax(0) == number + 1
        assert expected.any()
        np.testing.assert_array_equal(experts.see(number, image), expected)


def test_a_look_at_a_large_volume_is_one_at_the_shrunk_one(tmp_path: Path) -> None:
    """Every voxel twice along each axis: shrunk, it is the volume that it was made of. A small axis stays as it is."""
    experts = looking(tmp_path, 3)
    small = np.random.default_rng(1).normal(size=(1, 16, 12, 16)).astype(np.float32)
    padded = np.pad(small, [(0, 0), (0, 0), (0, 4), (0, 0)])
    expected = seen_by(experts, 0, padded)[:, :12]
    np.testing.assert_array_equal(experts.see(0, small.repeat(2, 1).repeat(2, 3)), expected)


def test_a_2d_model_looks_at_some_slices(tmp_path: Path) -> None:
    """The middle ones of as many parts of the volume."""
    experts = looking(tmp_path, 2)
    volume = np.random.default_rng(2).normal(size=(1, 5 * SLICES, 16, 16)).astype(np.float32)
    found = experts.see(0, volume)
    np.testing.assert_array_equal(found, [seen_by(experts, 0, volume[:, 5 * part + 2]) for part in range(SLICES)])
    few = volume[:, :3]
    np.testing.assert_array_equal(experts.see(0, few), [seen_by(experts, 0, few[:, index]) for index in range(3)])


def test_networks_are_the_models_own(tmp_path: Path, nnunet_folders: None) -> None:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "Liver": 1, "Spleen": 2})
    base = base_network()
    models = [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i)
              for i, name in enumerate(("Liver", "Spleen"))]
    experts = experts_of(models, Volumes([501], 1))
    for index, path in enumerate(models):
        state = torch.load(path / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for name, tensor in experts.network(index).state_dict().items():
            assert torch.equal(tensor, state[name]), name
    assert experts.merged_network(with_merged_heads(experts)).decoder.seg_layers[-1].weight.shape[0] == 3


def test_what_is_kept_is_forgotten_with_other_tensors(tmp_path: Path) -> None:
    """What is looked up once may depend on the tensors; it is another thing for others."""
    experts = experts_with([write_model(tmp_path / "m", {"background": 0, "Liver": 1})], [])
    made = []

    def make() -> int:
        made.append(len(made))
        return made[-1]
    assert [experts.once(key, make) for key in ("a", ("a", 1), "a", ("a", 1))] == [0, 1, 0, 1]
    moved = replace(experts, tensors=[dict(experts.tensors[0])])
    assert moved.once("a", make) == 2 and experts.once("a", make) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Running statistics

def expert_on(folder: Path, images: Sequence[torch.Tensor]) -> Experts:
    return experts_with([folder], [Patch(image, None, Cases("Dataset001_X", {}, {})) for image in images])


def images_of(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 16, 16, generator=generator) * (i + 1) + 3 * i for i in range(count)]


def plain_statistics(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of what a convolution makes of all patches."""
    made = torch.nn.functional.conv2d(inputs.double(), weight.double(), bias.double(), padding=1)
    return made.mean((0, 2, 3)).numpy(), made.var((0, 2, 3)).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m", PLANS, tensors_of(network_of(PLANS), canonical(PLANS)))


@pytest.mark.parametrize("count", [2, 6])
def test_the_first_norm_gets_the_statistics_of_the_patches(folder: Path, count: int) -> None:
    """Of one batch of two they are those of its voxels, of several the mean over the batches, which is what a batch
    norm is to expect of a batch."""
    experts, images = expert_on(folder, images_of(count)), images_of(count)
    tensors = experts.tensors[0]
    network = experts.network(0)
    found = running_statistics(experts, network)
    layer = tensors[f"{FIRST}.0.weight"], tensors[f"{FIRST}.0.bias"]
    batches = [plain_statistics(torch.stack(images[i:i + 2]), *layer) for i in range(0, count, 2)]
    mean, var = (np.mean(each, axis=0) for each in zip(*batches, strict=True))
    np.testing.assert_allclose(mean, plain_statistics(torch.stack(images), *layer)[0])
    np.testing.assert_allclose(found[f"{FIRST}.1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[f"{FIRST}.1.running_var"], var, rtol=1e-4)
    assert set(found) == {name for name in canonical(PLANS).values() if "running" in name}
    assert not network.training
    assert all(torch.equal(tensors[name], tensor) for name, tensor in open_models(folder)[0].tensors().items())


def test_every_norm_gets_the_statistics_of_what_it_meets(folder: Path) -> None:
    """With those of its own batch each makes mean 0 and variance 1 of it."""
    images = images_of(2)
    experts = expert_on(folder, images)
    network = experts.network(0)
    found = running_statistics(experts, network)
    network.load_state_dict({name: (experts.tensors[0] | found)[to] for name, to in canonical(PLANS).items()})
    checked = 0

    def check(norm: torch.nn.BatchNorm2d, inputs: object, output: torch.Tensor) -> None:
        nonlocal checked
        plain = (output - norm.bias[:, None, None]) / norm.weight[:, None, None]
        channels = plain.shape[1]
        # a batch norm in training divides by n where its running variance divides by n - 1: layer by layer they differ
        torch.testing.assert_close(plain.mean((0, 2, 3)), torch.zeros(channels), rtol=0, atol=0.02)
        torch.testing.assert_close(plain.var((0, 2, 3)), torch.ones(channels), rtol=0, atol=0.05)
        checked += 1
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(check)
    with torch.no_grad():
        network(torch.stack(images))
    assert checked == 5


def test_only_batch_norms_have_running_statistics() -> None:
    assert has_running_statistics(list(canonical(PLANS)))
    assert not has_running_statistics(list(canonical(plans_of("plain2d"))))


@pytest.fixture(scope="module")
def models(nnunet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with batch norms and its copy in another order."""
    write_volumes(nnunet / "raw", "Dataset501_Boxes", LABELS, cases=2, shape=(8, 16, 16))
    folder = tmp_path_factory.mktemp("batch")
    tensors = tensors_of(network_of(PLANS), canonical(PLANS))
    return {"original": write(folder / "original", PLANS, tensors),
            "copy": write(folder / "copy", PLANS, permuted(tensors, spec_of(PLANS), 1))}


def merged(models: Sequence[Path], align: str, units: str,
           volumes: Volumes | None = VOLUMES) -> dict[str, torch.Tensor]:
    recipe = Recipe(align=align, parameters={"units": units}, volumes=volumes)
    return merge_folders(models, recipe=recipe)["all"].state_dict


@pytest.mark.parametrize("align", list(ALIGNERS))
@pytest.mark.parametrize("units", ["match", "zip"])
def test_merged_with_its_permuted_copy_a_model_does_what_it_did(models: dict[str, Path], align: str,
                                                                units: str) -> None:
    """With volumes: what it did with the running statistics of these, each model's taken anew before."""
    original = open_models(models["original"])[0]
    state = original.tensors()
    both = merged(list(models.values()), align, units)
    folded = merged([models["original"]] * 2, align, units)
    image = image_of(PLANS)
    assert_close(logits(PLANS, LABELS, both, image), logits(PLANS, LABELS, folded, image))
    for name, tensor in state.items():  # moved or not: the weights of a model merged with itself
        if "running" not in name:
            torch.testing.assert_close(folded[name], tensor)
    assert not torch.equal(folded[f"{FIRST}.1.running_mean"], state[f"{FIRST}.1.running_mean"])
    assert torch.equal(folded[f"{FIRST}.1.num_batches_tracked"], state[f"{FIRST}.1.num_batches_tracked"])


@pytest.mark.parametrize("units", ["match", "zip"])
def test_without_volumes_the_running_statistics_move_with_their_units(models: dict[str, Path], units: str) -> None:
    both = merged(list(models.values()), "rebasin", units, volumes=None)
    image = image_of(PLANS)
    original = open_models(models["original"])[0].stored
    assert_close(logits(PLANS, LABELS, both, image), logits(PLANS, LABELS, original, image))


def test_the_merged_network_gets_statistics_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    """Of models that differ the mean of the statistics fits nothing."""
    other = write(tmp_path / "other", PLANS, tensors_of(network_of(PLANS, seed=5), canonical(PLANS)))
    found = merged([models["original"], other], "activation", "match")
    layer = found[f"{FIRST}.0.weight"], found[f"{FIRST}.0.bias"]
    images = preprocessed(0) + preprocessed(1)
    batches = [plain_statistics(torch.stack(images[i:i + 2]), *layer) for i in range(0, len(images), 2)]
    mean, var = (np.mean(each, axis=0) for each in zip(*batches, strict=True))
    np.testing.assert_allclose(found[f"{FIRST}.1.running_mean"], mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[f"{FIRST}.1.running_var"], var, rtol=1e-3, atol=1e-4)


def preprocessed(case: int) -> list[torch.Tensor]:
    """The slices of a volume as the small plans want them: nothing but z-scored."""
    path = Path(os.environ["nnUNet_raw"]) / "Dataset501_Boxes" / "imagesTr" / f"case_{case}_0000.nii.gz"
    volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).astype(np.float32)
    return list(torch.from_numpy((volume - volume.mean()) / volume.std())[:, None])
