"""What is written for several models and their task vectors."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fork_command
from factory import base_network, small_plans, write_model, write_volumes

from nnunet_transplant.analysis.curvature import Hessian, fisher_diagonal, top_eigenvalues
from nnunet_transplant.analysis.flatness import flatness, table
from nnunet_transplant.analysis.risk import open_risk
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extraction import extract
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.volumes import Volumes

LABELS = {"background": 0, "A": 1, "B": 2}
PLANS = small_plans(dim=2, patch=8)


@pytest.fixture
def models(tmp_path: Path, nnunet_folders: None) -> dict[str, Path]:
    """A base, another model, and two models fine-tuned from the base."""
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(10, 12, 12))
    network = base_network(LABELS, PLANS)
    base = write_model(tmp_path / "base", LABELS, plans=PLANS, change=network.state_dict())
    tasks = {name: write_model(tmp_path / name, {"background": 0, name: 1}, plans=PLANS, base=network, seed=i)
             for i, name in enumerate("AB")}
    return {"base": base, "other": write_model(tmp_path / "other", LABELS, plans=PLANS, seed=7)} | tasks


def test_what_is_written_is_what_was_measured(tmp_path: Path, models: dict[str, Path]) -> None:
    volumes = Volumes([501], 2)
    result = flatness([models["base"], models["other"]], 501, "all", output=tmp_path / "out", n_patches=2,
                      n_eigenvalues=2, n_probes=3, tasks=[models["A"], models["B"]], device="cpu")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["flatness.json", "flatness.png", "table.txt"]
    assert json.loads((tmp_path / "out" / "flatness.json").read_text()) == result
    assert (tmp_path / "out" / "table.txt").read_text() == table(result) + "\n"
    assert list(result["models"]) == ["base__fold_0", "other__fold_0"] and list(result["tasks"]) == ["A__fold_0",
                                                                                                   "B__fold_0"]
    for name in ("base", "other"):
        opened = open_models(models[name])[0]
        risk = open_risk(opened, volumes, 2)
        found = result["models"][f"{name}__fold_0"]
        fisher = torch.cat([part.flatten() for part in fisher_diagonal(risk).values()])
        assert found["fisher_trace"] == pytest.approx(float(fisher.sum()), rel=1e-4)
        assert found["fisher_largest"] == pytest.approx(np.sort(fisher.numpy())[::-1][:10].tolist())
        assert found["parameters"] == fisher.numel()
        assert found["hessian_eigenvalues"] == pytest.approx(top_eigenvalues(Hessian(risk, 2), 2).tolist(), rel=1e-4)
        assert f"{found['fisher_trace']:.4g}" in table(result)
    for name in "AB":
        task, opened = result["tasks"][f"{name}__fold_0"], open_models(models[name])[0]
        theta_0 = opened.theta_0()
        squares = sum(float((opened.tensors()[tensor] - theta_0[tensor]).double().square().sum()) for tensor in theta_0)
        assert task["base"] == "base__fold_0" and task["norm"] == pytest.approx(squares ** 0.5, rel=1e-6)
        lambda_1 = result["models"]["base__fold_0"]["hessian_eigenvalues"][0]
        assert task["bound"] == pytest.approx(0.5 * lambda_1 * squares)
        assert task["quadratic"] <= task["bound"]


def test_a_model_twice_measures_the_same_whatever_the_batch(tmp_path: Path, models: dict[str, Path]) -> None:
    """The order of the models, and how many patches are differentiated at once, change nothing."""
    options = {"n_patches": 3, "n_eigenvalues": 1, "n_probes": 1, "device": "cpu"}
    one = flatness([models["base"], models["other"]], 501, "all", output=tmp_path / "one", batch_size=1,
                   **options)["models"]
    two = flatness([models["other"], models["base"]], 501, "all", output=tmp_path / "two", batch_size=3,
                   **options)["models"]
    for name, found in one.items():
        assert found["fisher_trace"] == two[name]["fisher_trace"]
        assert found["hessian_eigenvalues"] == pytest.approx(two[name]["hessian_eigenvalues"], rel=1e-3)
        assert found["hessian_trace"] == pytest.approx(two[name]["hessian_trace"], rel=1e-3)
    assert json.loads((tmp_path / "one" / "flatness.json").read_text())["models"]["base__fold_0"][
        "hessian_trace_error"] is None  # of one probe: JSON has no NaN


@pytest.mark.parametrize(("options", "cases"), [
    ({"n_patches": 3}, ["case_0", "case_1", "case_2"]), ({"n_patches": 2}, ["case_0", "case_1"]),
    ({"n_patches": 2, "n_cases": 1}, ["case_0"]), ({"n_patches": 1, "n_cases": 3}, ["case_0", "case_1", "case_2"]),
    ({"n_patches": 2, "cases": "cases.txt"}, ["case_1", "case_2"])])
def test_which_cases_are_looked_at(tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
                                   options: dict, cases: list[str]) -> None:
    """As many as patches, unless told."""
    monkeypatch.chdir(tmp_path)
    Path("cases.txt").write_text("case_2\ncase_1\n")
    found = flatness([models["base"]], 501, "all", output=tmp_path / "out", n_eigenvalues=0, device="cpu", **options)
    assert found["models"]["base__fold_0"]["cases"] == {"Dataset501_Boxes": cases}


def test_task_vector_files_and_models_that_record_no_base(tmp_path: Path, models: dict[str, Path]) -> None:
    file = tmp_path / "A.safetensors"
    extract(models["A"], file)
    stock = write_model(tmp_path / "stock", {"background": 0, "A": 1}, plans=PLANS, base=base_network(LABELS, PLANS),
                        record_base=False)
    options = {"dataset": 501, "fold": "all", "n_patches": 1, "n_eigenvalues": 1, "n_probes": 0, "device": "cpu"}
    found = flatness([models["base"]], output=tmp_path / "out", tasks=[models["A"], file, stock], **options)
    norms = [task["norm"] for task in found["tasks"].values()]
    assert len(norms) == 3 and norms[0] == pytest.approx(norms[1]) == pytest.approx(norms[2])
    assert "hessian_trace" not in found["models"]["base__fold_0"]
    with pytest.raises(TransplantError, match="does not record its base: give that one alone"):
        flatness([models["base"], models["other"]], output=tmp_path / "no", tasks=[stock], **options)
    with pytest.raises(TransplantError, match="was not fine-tuned from any of the models"):
        flatness([models["other"]], output=tmp_path / "no", tasks=[models["A"]], **options)
    assert not (tmp_path / "no").exists()


def test_the_command(tmp_path: Path, models: dict[str, Path]) -> None:
    done = fork_command("nnunet_transplant_flatness", "-m", models["base"], "-d", 501, "-f", "all", "-n_patches", 2,
                        "-n_eigenvalues", 0, "-device", "cpu", "-o", tmp_path / "out")
    assert "Fisher trace" in done.stdout and "lambda_1" not in done.stdout and "wrote" in done.stdout
    for options, message in (
            (["-n_patches", 0], "-n_patches must be at least 1"), (["-n_eigenvalues", -1], "must not be negative"),
            (["-f", "7"], "-cases val:7"), (["-batch_size", 0], "-batch_size at least 1"),
            (["-n_eigenvalues", 0, "-tasks", models["A"]], "-tasks needs lambda_1"),
            (["-o", models["base"]], "is one of the models"), (["-device", "tpu"], "-device must be")):
        done = fork_command("nnunet_transplant_flatness", "-m", models["base"], "-d", 501, "-f", "all", "-device",
                            "cpu", "-o", tmp_path / "new", *options, expect=1)
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "new").exists()
