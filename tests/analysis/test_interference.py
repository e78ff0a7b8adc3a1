"""Interference of task vectors: every number against its definition, and the command."""
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from factory import base_network, small_plans, write_model

from nnunet_transplant import vectors as blocks_of
from nnunet_transplant.analysis import interference as module
from nnunet_transplant.analysis.interference import WHOLE, Interference, interference, measure, save_figure, table
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extraction import extract
from nnunet_transplant.files import file_sha256
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.vectors import TaskVectors, kept

Network = dict[str, torch.Tensor]

SHAPES = {"decoder.encoder.stem.convs.0.conv.weight": (4, 1, 3, 3, 3), "decoder.encoder.stages.0.a.weight": (7,),
          "decoder.encoder.stages.1.a.weight": (8, 4, 3, 3), "decoder.stages.0.a.weight": (5, 6),
          "decoder.transpconvs.0.weight": (6, 5, 2), "decoder.stages.1.a.weight": (40,), "tokens": (3, 9)}
STAGES = {"encoder 0": [0, 1], "encoder 1": [2], "decoder 0": [3, 4], "decoder 1": [5], "other": [6],
          WHOLE: list(range(7))}


def networks(count: int, dtype: torch.dtype = torch.float32, related: float = 0.7, seed: int = 0
             ) -> tuple[Network, list[Network]]:
    """theta_0 and models near it whose task vectors have something in common, and entries of all sizes."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Network:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    theta_0, common = draw(), draw()
    thetas = [{name: (theta_0[name] + 0.1 * (related * common[name] + noise) ** 3).to(dtype)
               for name, noise in draw().items()} for _ in range(count)]
    return {name: tensor.to(dtype) for name, tensor in theta_0.items()}, thetas


def measured(theta_0: Network, thetas: list[Network], density: float = 0.2) -> Interference:
    return measure(TaskVectors(theta_0, thetas, [1.0] * len(thetas)), [f"task {t}" for t in range(len(thetas))],
                   density)


def parts(theta_0: Network, theta: Network, stage: str) -> np.ndarray:
    """The entries of a task vector in a stage, subtracted in float32, as float64."""
    names = [list(SHAPES)[index] for index in STAGES[stage]]
    return np.concatenate([(theta[name].float() - theta_0[name].float()).double().numpy().ravel() for name in names])


def trimmed(theta_0: Network, theta: Network, stage: str, density: float) -> np.ndarray:
    whole = parts(theta_0, theta, WHOLE)
    smallest = 0.0 if density == 1 else np.sort(abs(whole))[::-1][max(1, round(density * whole.size)) - 1]
    tau = parts(theta_0, theta, stage)
    return np.where(abs(tau) >= smallest, tau, 0.0)


def assert_same(one: Interference, other: Interference, **tolerance: float) -> None:
    assert one.tasks == other.tasks and one.stages == other.stages
    for field in ("entries", "norm", "energy", "kept", "cosine", "conflict", "conflict_of_all", "overlap"):
        np.testing.assert_allclose(getattr(one, field), getattr(other, field), err_msg=field, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("block", [1 << 18, 50])
def test_every_number_is_what_it_is_defined_as(monkeypatch: pytest.MonkeyPatch, count: int, density: float,
                                               dtype: torch.dtype, block: int) -> None:
    monkeypatch.setattr(blocks_of, "BLOCK", block)  # small: tensors of several blocks, blocks of several parts
    monkeypatch.setattr(module, "_COLUMNS", min(block // 3, module._COLUMNS))
    theta_0, thetas = networks(count, dtype)
    result = measured(theta_0, thetas, density)
    assert result.stages == list(STAGES) and result.density == density
    for s, stage in enumerate(STAGES):
        taus = [parts(theta_0, theta, stage) for theta in thetas]
        large = [trimmed(theta_0, theta, stage, density) for theta in thetas]
        assert result.entries[s] == taus[0].size
        for t, theta in enumerate(thetas):
            norm = np.sqrt((taus[t] ** 2).sum())
            assert result.norm[s, t] == pytest.approx(norm, rel=1e-12)
            assert result.energy[s, t] == pytest.approx((norm / np.linalg.norm(parts(theta_0, theta, WHOLE))) ** 2)
            assert result.kept[s, t] == np.count_nonzero(large[t]) / taus[t].size
        for a, b in combinations(range(count), 2):
            cosine = taus[a] @ taus[b] / np.linalg.norm(taus[a]) / np.linalg.norm(taus[b])
            assert result.cosine[s, a, b] == pytest.approx(cosine, rel=1e-12, abs=1e-12)
            both = [(x, y) for x, y in zip(large[a], large[b], strict=True) if x and y]
            either = [(x, y) for x, y in zip(large[a], large[b], strict=True) if x or y]
            conflict = sum(x * y < 0 for x, y in both) / len(both) if both else np.nan
            np.testing.assert_equal(result.conflict[s, a, b], conflict)
            np.testing.assert_equal(result.overlap[s, a, b], len(both) / len(either) if either else np.nan)
            p, q = result.kept[s, a], result.kept[s, b]
            if p or q:
                assert result.overlap_by_chance[s, a, b] == pytest.approx(p * q / (p + q - p * q))
        shared = [[x for x in entries if x] for entries in zip(*large, strict=True) if np.count_nonzero(entries) >= 2]
        torn = sum(min(entries) < 0 < max(entries) for entries in shared)
        np.testing.assert_equal(result.conflict_of_all[s], torn / len(shared) if shared else np.nan)
    for matrix in (result.cosine, result.conflict, result.overlap):
        np.testing.assert_allclose(matrix, matrix.swapaxes(1, 2))
    np.testing.assert_allclose(result.energy[:-1].sum(0), 1)
    if density < 1 and dtype == torch.float32:  # no two magnitudes are equal
        assert (result.kept[-1] == kept(density, result.entries[-1]) / result.entries[-1]).all()
        exact = result.kept[-1, 0]
        np.testing.assert_allclose(result.overlap_by_chance[-1], exact / (2 - exact))


def test_equal_and_opposite_task_vectors() -> None:
    theta_0, (theta,) = networks(1)
    zero = {name: torch.zeros_like(tensor) for name, tensor in theta_0.items()}
    opposite = {name: -tensor for name, tensor in theta.items()}
    result = measured(zero, [theta, theta, opposite])
    np.testing.assert_allclose(result.cosine[:, 0, 1], 1, rtol=1e-12)
    np.testing.assert_allclose(result.cosine[:, 0, 2], -1, rtol=1e-12)
    assert (result.conflict[:, 0, 1] == 0).all() and (result.overlap[:, 0, 1] == 1).all()
    assert (result.conflict[:, 0, 2] == 1).all() and (result.overlap[:, 0, 2] == 1).all()
    assert (result.conflict_of_all == 1).all()


def test_independent_task_vectors_meet_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    name = "encoder.stages.0.a"
    theta_0, *thetas = ({name: torch.randn(400_000, generator=generator)} for _ in range(3))
    result = measured({name: torch.zeros(400_000)}, [theta_0, thetas[0]])
    assert result.overlap[-1, 0, 1] == pytest.approx(0.2 / 1.8, abs=0.002)
    assert result.conflict[-1, 0, 1] == pytest.approx(0.5, abs=0.02)
    assert result.cosine[-1, 0, 1] == pytest.approx(0, abs=0.01)


def test_the_order_of_the_tasks_only_permutes() -> None:
    theta_0, thetas = networks(4)
    order = [2, 0, 3, 1]
    one, other = measured(theta_0, thetas), measured(theta_0, [thetas[t] for t in order])
    for field in ("norm", "energy", "kept"):
        np.testing.assert_allclose(getattr(other, field), getattr(one, field)[:, order], rtol=1e-12)
    for field in ("cosine", "conflict", "overlap"):
        np.testing.assert_allclose(getattr(other, field), getattr(one, field)[:, order][:, :, order], rtol=1e-12)
    np.testing.assert_array_equal(other.conflict_of_all, one.conflict_of_all)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_of, "BLOCK", 40)
    theta_0, thetas = networks(3)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(measured(theta_0, thetas))
    assert_same(results[0], results[1], rtol=0)
    assert_same(results[0], results[2], rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_cosines_know_no_scale(scale: float) -> None:
    """Squares of such entries are beyond float32."""
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    _, thetas = networks(3)
    plain, scaled = (measured(zero, [{name: factor * tensor for name, tensor in theta.items()} for theta in thetas])
                     for factor in (1.0, scale))
    np.testing.assert_allclose(scaled.cosine, plain.cosine, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(scaled.overlap, plain.overlap)


@pytest.mark.parametrize(("count", "everything"), [(2, False), (5, True)])
def test_task_vectors_of_zero_are_not_defined_but_shown(tmp_path: Path, count: int, everything: bool) -> None:
    theta_0, thetas = networks(count)
    result = measured(theta_0, [theta_0] * count if everything else [theta_0, *thetas[1:]])
    assert (result.norm[:, 0] == 0).all() and (result.kept[:, 0] == 0).all()
    assert np.isnan(result.energy[:, 0]).all() and np.isnan(result.cosine[:, 0, 1]).all()
    assert np.isnan(result.conflict[:, 0, 1]).all()
    assert np.isnan(result.overlap[-1, 0, 1]) if everything else result.overlap[-1, 0, 1] == 0
    assert "nan" not in table(result)
    assert '"cosine": null' in json.dumps(module._content(result), allow_nan=False)
    save_figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("count", [4, 15])
def test_the_figure_of_few_and_many_tasks(tmp_path: Path, count: int) -> None:
    save_figure(measured(*networks(count)), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figure.png").stat().st_size > 30_000


# ---------------------------------------------------------------------------------------------------------------------
# Models

@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base_network().state_dict())


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    network = base_network()
    return [write_model(tmp_path / name, {"background": 0, name: 1, "more": 2}, base=network, seed=i)
            for i, name in enumerate("AB")]


def test_what_is_written(tmp_path: Path, models: list[Path]) -> None:
    output = tmp_path / "out"
    result = interference(models, output=output, density=0.3)
    assert sorted(path.name for path in output.iterdir()) == [
        "interference.csv", "interference.json", "interference.png", "table.txt"]
    assert result.tasks == ["A", "B"] and result.stages == [
        "encoder 0", "encoder 1", "encoder 2", "decoder 0", "decoder 1", WHOLE]
    opened = [open_models(path)[0] for path in models]
    assert result.entries[-1] == sum(opened[0].tensors()[name].numel() for name in opened[0].layout.body)
    theta_0 = opened[0].theta_0()
    taus = [torch.cat([(model.tensors()[name] - theta_0[name]).double().ravel() for name in model.layout.body])
            for model in opened]
    np.testing.assert_allclose(result.norm[-1], [float(tau.norm()) for tau in taus], rtol=1e-6)

    content = json.loads((output / "interference.json").read_text())
    assert content["density"] == 0.3 and content["tasks"] == ["A", "B"] and content["base"] is None
    assert content["theta_0_sha256"] == opened[0].theta_0_sha256
    assert content["inputs"] == [
        {"task": name, "path": str(model.path), "sha256": file_sha256(model.path), "fold": "0",
         "structures": [name, "more"]} for name, model in zip("AB", opened, strict=True)]
    assert set(content["versions"]) == {"nnunet_transplant", "nnunetv2", "torch"}
    assert [stage["stage"] for stage in content["stages"]] == result.stages[:-1]
    for s, stage in enumerate([*content["stages"], content["whole_network"]]):
        assert stage["entries"] == result.entries[s] and stage["sign_conflict"] == result.conflict_of_all[s]
        assert stage["tasks"] == [{"task": task, "norm": result.norm[s, t], "energy": result.energy[s, t],
                                   "kept": result.kept[s, t]} for t, task in enumerate("AB")]
        assert stage["pairs"] == [{"task": "A", "other": "B", "cosine": result.cosine[s, 0, 1],
                                   "sign_conflict": result.conflict[s, 0, 1], "overlap": result.overlap[s, 0, 1],
                                   "overlap_by_chance": result.overlap_by_chance[s, 0, 1]}]
    pd.testing.assert_frame_equal(pd.read_csv(output / "interference.csv"), result.frame())
    assert len(result.frame()) == 6 * (2 + 1 + 1)
    assert (output / "table.txt").read_text() == table(result) + "\n"
    assert (output / "interference.png").stat().st_size > 30_000


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the rest."""
    monkeypatch.setattr(module, "save_figure", lambda result, path: None)


@pytest.mark.usefixtures("no_figure")
def test_folds_files_and_bases(tmp_path: Path, base: Path, models: list[Path]) -> None:
    """Each fold is a task vector; a file is the same one as its model; a given base the same as a recorded one."""
    write_model(models[0], {"background": 0, "A": 1, "more": 2}, base=base_network(), seed=7, fold="1")
    result = interference(models, output=tmp_path / "folds")
    assert result.tasks == ["A__fold_0", "A__fold_1", "B"]
    first = interference(models, folds=["0"], output=tmp_path / "first")
    assert first.tasks == ["A", "B"]
    np.testing.assert_array_equal(first.cosine[:, 0, 1], result.cosine[:, 0, 2])
    files = [tmp_path / "shared" / "liver.v2.safetensors", tmp_path / "shared" / "kidney.safetensors"]
    files[0].parent.mkdir()
    for model, file in zip(models, files, strict=True):
        extract(model, file, fold="0")
    of_files = interference(files, base=base, output=tmp_path / "files")
    assert of_files.tasks == ["liver.v2", "kidney"]
    np.testing.assert_array_equal(of_files.cosine, first.cosine)
    content = json.loads((tmp_path / "files" / "interference.json").read_text())
    assert content["base"] == str(base) and content["inputs"][1]["sha256"] == file_sha256(files[1])
    assert content["theta_0_sha256"] == json.loads((tmp_path / "first" / "interference.json").read_text())[
        "theta_0_sha256"]
    stock = [write_model(tmp_path / f"stock_{i}", base=base_network(), seed=i, record_base=False) for i in range(2)]
    of_stock = interference(stock, base=base, output=tmp_path / "of_stock")
    np.testing.assert_array_equal(of_stock.cosine, first.cosine)  # the same seeds; labels and heads do not matter


@pytest.mark.usefixtures("no_figure")
def test_integers_have_no_part(tmp_path: Path) -> None:
    plans = small_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(
        norm_op="torch.nn.modules.batchnorm.BatchNorm3d")
    folders = [write_model(tmp_path / name, plans=plans, seed=i) for i, name in enumerate(("base", "A", "B"))]
    result = interference(folders[1:], base=folders[0], output=tmp_path / "out")
    tensors = open_models(folders[0])[0].tensors()
    body = [tensors[name] for name in open_models(folders[0])[0].layout.body]
    assert any(not tensor.is_floating_point() for tensor in body)
    assert result.entries[-1] == sum(tensor.numel() for tensor in body if tensor.is_floating_point())


@pytest.mark.usefixtures("no_figure")
def test_the_command_prints_the_table_and_what_it_wrote(tmp_path: Path, models: list[Path], run: Callable) -> None:
    output = tmp_path / "out"
    status, out, err = run("interference", "-m", *models, "-o", output)
    assert (status, err) == (0, "")
    assert (output / "table.txt").read_text() in out and f"wrote {output}: table.txt, interference.png" in out
    before = (output / "interference.json").read_bytes()
    status, _, err = run("interference", "-m", *models, "-o", output, "-density", 0.5)
    assert status == 1 and "exists already" in err and (output / "interference.json").read_bytes() == before
    status, _, _ = run("interference", "-m", *models, "-o", output, "-density", 0.5, "--overwrite")
    assert status == 0 and json.loads((output / "interference.json").read_text())["density"] == 0.5


def test_bad_input_gives_one_line_and_no_output(tmp_path: Path, base: Path, models: list[Path], run: Callable) -> None:
    stock = write_model(tmp_path / "stock", base=base_network(), record_base=False)
    other = write_model(tmp_path / "other", seed=5)
    residual = write_model(tmp_path / "residual", plans=small_plans(residual=True))
    extract(models[0], tmp_path / "A.safetensors")
    lonely = tmp_path / "elsewhere" / "A.safetensors"
    lonely.parent.mkdir()
    (tmp_path / "A.safetensors").rename(lonely)
    name = open_models(base)[0].layout.body[0]
    broken = write_model(tmp_path / "broken", base=base_network(),
                         change={name: torch.full_like(base_network().state_dict()[name], torch.nan)})
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "notes.txt").write_text("mine")
    there = sorted(tmp_path.rglob("*"))
    for arguments, message in (
            (["-m", models[0]], "two or more"),
            (["-m", *models, "-density", 0], "-density must be above 0"),
            (["-m", *models, "-density", 1.5], "-density"),
            (["-m", *models, "-density", "nan"], "-density"),
            (["-m", models[0], stock], "does not record the base"),
            (["-m", stock, stock], "give it with -base"),
            (["-m", *models, "-base", other], "is not the one these models were fine-tuned from"),
            (["-m", stock, stock, "-base", residual], "another network"),
            (["-m", lonely, models[1]], "with -base"),
            (["-m", models[0], tmp_path / "nowhere"], "there is no model folder"),
            (["-m", *models, "-f", 3], "has no fold_3/checkpoint_final.pth"),
            (["-m", models[0], broken, "-base", base], "holds NaN or Inf in"),
            (["-m", *models, "-base", broken], "is not the one"),
            (["-m", stock, stock, "-base", broken], "the base holds NaN or Inf in"),
            (["-m", *models, "-o", models[0], "--overwrite"], "is one of the models"),
            (["-m", *models, "-base", base, "-o", base, "--overwrite"], "is one of the models"),
            (["-m", *models, "-o", strange, "--overwrite"], "is not an earlier analysis of interference")):
        status, out, err = run("interference", "-o", tmp_path / "out", *arguments)
        assert (status, out) == (1, ""), arguments
        assert message in err and err.count("\n") == 1 and "Traceback" not in err, err
        assert sorted(tmp_path.rglob("*")) == there
    status, _, err = run("interference", "-o", tmp_path / "out", "-m", models[0], residual, "-base", base)
    # with merging's table
    assert status == 1 and "cannot merge; they differ in" in err and "Traceback" not in err
    foreign = write_model(tmp_path / "foreign", base=base_network(seed=3))
    with pytest.raises(TransplantError, match=r"theta_0 \(SHA-256\)"):
        interference([models[0], foreign], output=tmp_path / "out")
