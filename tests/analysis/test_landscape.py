"""The plane through models, the mixtures in it, and what is measured and kept of them."""
import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fork_command
from factory import base_network, small_plans, write_model, write_volumes

from nnunet_transplant.analysis import landscape as module
from nnunet_transplant.analysis.landscape import (
    Losses,
    barriers,
    grid,
    inner_products,
    landscape,
    lines,
    principal_plane,
)
from nnunet_transplant.analysis.risk import open_risk
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.volumes import Volumes

LABELS = {"background": 0, "A": 1, "B": 2}
PLANS = small_plans(dim=2, patch=8)
SMALL = {"n_patches": 2, "points": 3, "line_points": 3, "device": "cpu"}


@pytest.fixture
def models(tmp_path: Path, nnunet_folders: None) -> dict[str, Path]:
    """A base, two experts fine-tuned from it, and two folds of the base's labels."""
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(10, 12, 12))
    network = base_network(LABELS, PLANS)
    folders = {"base": write_model(tmp_path / "base", LABELS, plans=PLANS, change=network.state_dict())}
    folders |= {name: write_model(tmp_path / name, {"background": 0, name: 1}, plans=PLANS, base=network, seed=i)
                for i, name in enumerate("AB")}
    return folders | {f"fold{i}": write_model(tmp_path / f"fold{i}", LABELS, plans=PLANS, seed=i) for i in (1, 2)}


@pytest.mark.parametrize("count", [3, 5])
def test_the_plane_is_that_of_the_principal_components(count: int) -> None:
    """Against the singular value decomposition of the centred vectors themselves."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, 40)) + 5
    plane = principal_plane(vectors @ vectors.T)
    mean = vectors.mean(0)
    _, values, components = np.linalg.svd(vectors - mean, full_matrices=False)
    coordinates = (vectors - mean) @ components[:2].T
    np.testing.assert_allclose(np.abs(plane.coordinates), np.abs(coordinates), atol=1e-9)
    assert plane.explained == pytest.approx((values[:2] ** 2).sum() / (values ** 2).sum())
    assert (plane.explained == pytest.approx(1)) == (count == 3)
    for x, y in ((0, 0), (1.5, -0.5), *plane.coordinates):
        mixture = plane.mixture(x, y)
        assert mixture.sum() == pytest.approx(1)
        point = mixture @ vectors - mean
        signs = np.sign((plane.coordinates * coordinates).sum(0))
        np.testing.assert_allclose(point, (x * signs[0]) * components[0] + (y * signs[1]) * components[1], atol=1e-9)


def test_models_on_a_line_and_in_one_place() -> None:
    vectors = np.outer([0.0, 1.0, 3.0], np.ones(4))
    plane = principal_plane(vectors @ vectors.T)
    assert plane.explained == pytest.approx(1) and np.isfinite(plane.mixing).all()
    np.testing.assert_allclose(np.abs(np.diff(plane.coordinates[:, 0])), [2, 4])
    same = principal_plane(np.ones((3, 3)))
    np.testing.assert_allclose(same.mixture(1, 1), 1 / 3)


def test_inner_products_give_the_distances_of_whole_networks() -> None:
    generator = torch.Generator().manual_seed(0)
    networks = [{"a": 1e3 + torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator).half()}
                for _ in range(3)]
    gram = inner_products(networks)
    flat = [torch.cat([tensor.double().flatten() for tensor in network.values()]) for network in networks]
    for i, j in itertools.product(range(3), repeat=2):
        assert gram[i, i] + gram[j, j] - 2 * gram[i, j] == pytest.approx(
            float((flat[i] - flat[j]).square().sum()), rel=1e-9, abs=1e-9)


def test_the_loss_of_a_mixture_is_that_of_the_merged_network(tmp_path: Path, models: dict[str, Path]) -> None:
    """At the ends that of the models themselves; half way that of the network that averaging makes."""
    opened = [open_models(models[name])[0] for name in ("fold1", "fold2")]
    names = [name for name in opened[0].layout.names if opened[0].tensors()[name].is_floating_point()]
    risk = open_risk(opened[0], Volumes([501], 2), 2)
    losses = Losses([{name: model.tensors()[name] for name in names} for model in opened], {"loss": risk})
    write_merge(merge_folders([models["fold1"], models["fold2"]]), tmp_path / "merged")
    for mixture, path in (((1, 0), models["fold1"]), ((0, 1), models["fold2"]), ((0.5, 0.5), tmp_path / "merged")):
        own = open_risk(open_models(path)[0], Volumes([501], 2), 2)
        with torch.no_grad():
            assert losses.at(np.array(mixture))["loss"] == pytest.approx(float(own.loss(own.patches)), rel=1e-5)


def test_the_grid_goes_from_coarse_to_fine_around_the_models() -> None:
    vectors = np.random.default_rng(1).normal(size=(4, 10))
    plane = principal_plane(vectors @ vectors.T)
    for points in (3, 4, 9):
        places = [place[1:] for place in grid(plane, points)]
        assert len(set(places)) == points ** 2
        x, y = np.array(places).T
        for axis, values in enumerate((x, y)):
            assert values.min() < plane.coordinates[:, axis].min() <= plane.coordinates[:, axis].max() < values.max()
    axis = sorted(set(x.tolist()))
    where = [(axis.index(a), b) for a, b in places]
    corners = sorted({i for i, _ in where[:9]})
    assert corners == [0, 4, 8]  # the first points lie as far from each other as they can
    assert sorted({i for i, _ in where[:25]}) == [0, 2, 4, 6, 8]


def test_barriers_are_above_the_straight_line() -> None:
    known = {("0-1", 0.0, 0.0): {"t": 1.0, "u": 2.0}, ("0-1", 0.5, 0.0): {"t": 5.0, "u": 1.0},
             ("0-1", 1.0, 0.0): {"t": 2.0, "u": 2.0}, ("plane", 0.0, 0.0): {"t": 9.0, "u": 9.0}}
    assert barriers(known, ["a", "b"]) == {"a - b": {"t": 3.5, "u": 0.0}}
    found = lines(3, 4, 5)
    assert len(found) == 15 and all(mixture[3] == 0 and mixture.sum() == 1 for mixture in found.values())


def test_tasks_keep_their_own_heads_and_losses(tmp_path: Path, models: dict[str, Path]) -> None:
    result = landscape([models["A"], models["B"]], 501, "all", output=tmp_path / "out", also=[models["base"]],
                       **SMALL)
    assert result["setup"]["tasks"] == ["A", "B"] and list(result["plane"]["models"]) == [
        "A__fold_0", "B__fold_0", "base__fold_0"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "landscape.csv", "landscape.json", "lines.png", "plane.png"]
    with (tmp_path / "out" / "landscape.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["where", "x", "y", "A", "B"] and len(rows) == 1 + 3 + 9
    for index, name in enumerate("AB"):
        own = open_risk(open_models(models[name])[0], Volumes([501], 2), 2)
        end, = [row for row in rows if row[:2] == ["0-1", str(float(index))]]
        with torch.no_grad():
            assert float(end[3 + index]) == pytest.approx(float(own.loss(own.patches)), rel=1e-5)


def test_an_interrupted_run_goes_on_and_another_is_refused(tmp_path: Path, models: dict[str, Path],
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    paths, output = [models["fold1"], models["fold2"]], tmp_path / "out"
    calls = []
    measure_one = Losses.at

    def counted(self: Losses, mixture: object) -> dict[str, float]:
        calls.append(mixture)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure_one(self, mixture)
    monkeypatch.setattr(module.Losses, "at", counted)
    options = {"dataset": 501, "fold": "all", "n_patches": 1, "points": 0, "line_points": 5, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        landscape(paths, output=output, **options)
    (output / "landscape.csv").write_text((output / "landscape.csv").read_text() + "0-1,0.5")  # killed within a line
    result = landscape(paths, output=output, **options)
    assert len(calls) == 3 + 3 and result["plane"] is None
    assert landscape(paths, output=output, **options) == result and len(calls) == 6  # all is there
    whole = landscape(paths, output=tmp_path / "whole", **options)
    assert whole["barriers"] == result["barriers"]
    with pytest.raises(TransplantError, match="a landscape of other models or settings"):
        landscape(paths, output=output, **options | {"seed": 1})
    for other in ({"n_cases": 2}, {"cases": str(tmp_path / "cases.txt")}):
        (tmp_path / "cases.txt").write_text("case_1")
        with pytest.raises(TransplantError, match="a landscape of other models or settings"):
            landscape(paths, output=output, **options | other)
    again = landscape(paths, output=output, overwrite=True, **options | {"seed": 1})
    assert again["setup"]["seed"] == 1 and len(list(csv.reader((output / "landscape.csv").open()))) == 6
    assert json.loads((output / "landscape.json").read_text()) == again
    with pytest.raises(TransplantError, match="is no landscape"):
        landscape(paths, output=models["base"], overwrite=True, **options)


def test_the_command(tmp_path: Path, models: dict[str, Path]) -> None:
    arguments = ["-m", models["fold1"], models["fold2"], "-d", 501, "-f", "all", "-n_patches", 1, "-points", 0,
                 "-line_points", 3, "-device", "cpu", "-o", tmp_path / "out"]
    done = fork_command("nnunet_transplant_landscape", *arguments)
    assert done.stdout.startswith("barrier fold1__fold_0 - fold2__fold_0: loss ") and "wrote" in done.stdout
    other = write_model(tmp_path / "3d", LABELS)
    for options, message in ((["-points", -1], "-points must not be negative"), (["-line_points", 1], "at least 2"),
                             (["-m", models["fold1"]], "at least two"), (["-m", models["fold1"], other], "differ in"),
                             (["-f", 7], "-cases val:7"), (["-n_patches", 0], "-n_patches must be at least 1")):
        done = fork_command("nnunet_transplant_landscape", *arguments[:-1], tmp_path / "new", *options, expect=1)
        assert message in done.stderr and "Traceback" not in done.stderr
