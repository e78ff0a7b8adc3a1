"""Steps of other packages: a method, an aligner and a fit with one function each, from outside."""
import json
import subprocess
from pathlib import Path

import pytest
import SimpleITK
import torch
from commands import fork_command
from factory import run_command, write_model, write_volumes

from nnunet_transplant.model_folder import TrainedModel, open_models

LABELS = {"background": 0, "one": 1, "two": 2}
GROUPS = ("aligners", "methods", "fits")

STRANGER = '''
from typing import Annotated, Literal

import nnunet_transplant as nt


@nt.aligner("mine_align", "model i moved by i steps", reference="a stranger, 2026", url="https://stranger.example/a",
            needs=("volumes",))
def mine_align(experts: nt.Experts, mine_step: Annotated[float, "how far", nt.Range(0.0, 1.0)] = 0.5):
    tensors = [{name: tensor + mine_step * i if tensor.is_floating_point() else tensor
                for name, tensor in network.items()} for i, network in enumerate(experts.tensors)]
    return nt.Found(tensors, {"patches seen": len(experts.patches)})


@nt.method("mine", "from the first of two models towards the other", reference="a stranger, 2026",
           url="https://stranger.example/m", weights=nt.SUM_TO_ONE, max_models=2)
def mine(tensors: nt.Tensors,
         mine_option: Annotated[float, "how far to go", nt.Range(0.0, 1.0)] = 0.5,
         mine_side: Annotated[Literal["there", "back"], "which way"] = "there"):
    one, other = tensors.thetas if mine_side == "there" else tensors.thetas[::-1]
    return (1 - mine_option) * one + mine_option * other


@nt.fit("mine_fit", "everything raised by the brightest voxel", reference="a stranger, 2026",
        url="https://stranger.example/f")
def mine_fit(merged, experts: nt.Experts, mine_times: Annotated[int, "how often", nt.Range(0, 9)] = 1):
    push = float(experts.images(experts.patches).max())
    return {name: tensor + mine_times * push if tensor.is_floating_point() else tensor
            for name, tensor in merged.items()}
'''


def install(folder: Path, name: str, code: str, entry_points: str) -> None:
    """A package as pip leaves it behind."""
    about = folder / f"{name}-0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text(entry_points)
    (folder / f"{name}.py").write_text(code)


@pytest.fixture(scope="module")
def raw(nnunet: Path) -> Path:
    return write_volumes(nnunet / "raw", "Dataset501_Boxes", LABELS, cases=2, shape=(16, 16, 16))


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / name, LABELS, seed=seed) for seed, name in enumerate("ab")]


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"aligners": "mine_align", "methods": "mine", "fits": "mine_fit"}
    install(tmp_path / "packages", "stranger", STRANGER, "\n".join(
        f"[nnunet_transplant.{group}]\n{step} = stranger:{step}" for group, step in steps.items()))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


def words(done: subprocess.CompletedProcess) -> str:
    return " ".join(done.stdout.split())


def test_commands_list_the_steps_of_a_stranger(stranger: None) -> None:
    for command in ("merge", "predict", "sweep"):
        said = words(fork_command(f"nnunet_transplant_{command}", "-h"))
        assert "mine_align model i moved by i steps [needs unlabelled volumes]" in said
        assert "mine from the first of two models towards the other" in said
        assert "mine_fit everything raised by the brightest voxel [needs unlabelled volumes]" in said
    said = words(fork_command("nnunet_transplant_merge", "-method", "mine", "-h"))
    assert said.startswith("-method mine: from the first of two models towards the other from a stranger, 2026 "
                           "https://stranger.example/m -weights: sum to 1, default 1/T options: ")
    assert "-mine_option how far to go (0 to 1; default 0.5)" in said
    assert "-mine_side which way (there|back; default there)" in said and "mine_step" not in said
    said = words(fork_command("nnunet_transplant_merge", "-align", "mine_align", "-fit", "mine_fit", "-h"))
    assert "needs unlabelled volumes (-d DATASET) options: -mine_step how far (0 to 1; default 0.5)" in said
    assert "-mine_times how often (0 to 9; default 1)" in said


def expected(models: list[TrainedModel], raw: Path, step: float, option: float, times: int) -> dict[str, torch.Tensor]:
    """As the functions above say; heads of the same structures are averaged whatever the method."""
    images = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)) for path in (raw / "imagesTr").iterdir()]
    push = max(float((image.max() - image.mean()) / image.std()) for image in images)
    one, other = (model.state_dict() for model in models)
    result = {}
    for name, tensor in one.items():
        share = 0.5 if "seg_layers" in name else option
        result[name] = (1 - share) * tensor + share * (other[name] + step) + times * push
    return result


def test_a_merge_by_a_stranger(tmp_path: Path, models: list[Path], raw: Path, stranger: None) -> None:
    """By the real command; it says what it did, and does it again."""
    command = "nnunet_transplant_merge"
    given = ["-align", "mine_align", "-method", "mine", "-fit", "mine_fit", "-mine_option", 0.3,
             "-mine_align.mine_step", 0.125, "-mine_times", 2, "-d", 501, "-device", "cpu"]
    done = run_command(command, "-m", *models, *given, "-o", tmp_path / "merged")
    assert done.stderr == "" and "merged 2 models by mine_align + mine + mine_fit" in done.stdout
    found = open_models(tmp_path / "merged")[0].state_dict()
    for name, tensor in expected([open_models(model)[0] for model in models], raw, 0.125, 0.3, 2).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())["folds"]["all"]
    recipe = record["recipe"]
    assert (recipe["align"], recipe["method"], recipe["fit"]) == ("mine_align", "mine", ["mine_fit"])
    assert recipe["parameters"] == {"mine_align.mine_step": 0.125, "mine.mine_option": 0.3, "mine.mine_side": "there",
                                    "mine_fit.mine_times": 2}
    assert record["steps"][1] == {
        "name": "mine", "summary": "from the first of two models towards the other", "reference": "a stranger, 2026",
        "url": "https://stranger.example/m"}
    assert record["found"] == {"patches seen": 2}
    fork_command(command, "-from", tmp_path / "merged", "-device", "cpu", "-o", tmp_path / "again")
    for path in (path for path in (tmp_path / "merged").rglob("*") if path.is_file()):
        assert (tmp_path / "again" / path.relative_to(tmp_path / "merged")).read_bytes() == path.read_bytes()
    # they are checked as ours are, and stand beside them
    fork_command(command, "-m", *models, "-method", "mine", "-mine_side", "back", "-o", tmp_path / "back")
    back = open_models(tmp_path / "back")[0].state_dict()
    one, other = (open_models(model)[0].state_dict() for model in models)
    assert all(torch.allclose(back[name], (one[name] + other[name]) / 2, atol=1e-6) for name in one)
    for arguments, message in (
            (["-method", "mine", "-mine_option", 2], "-mine_option must lie between 0 and 1, not 2"),
            (["-method", "mien"], "there is no merging method 'mien' (did you mean mine?)"),
            (["-method", "mine", "-weights", 1, 1], "must sum to 1"),
            (["-method", "average", "-mine_option", 0.5],
             "average has no -mine_option: there are no options; mine has it"),
            (["-align", "mine_align", "-method", "mine"], "mine_align needs volumes to look at")):
        error = fork_command(command, "-m", *models, "-o", tmp_path / "none", *arguments, expect=1).stderr
        assert message in error and error.count("\n") == 1


def test_without_its_package_a_merge_is_not_repeated(tmp_path: Path, models: list[Path], stranger: None,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    fork_command("nnunet_transplant_merge", "-m", *models, "-method", "mine", "-o", tmp_path / "merged")
    monkeypatch.delenv("PYTHONPATH")
    done = fork_command("nnunet_transplant_merge", "-from", tmp_path / "merged", "-o", tmp_path / "no", expect=1)
    error = done.stderr
    assert "merge.json is no recipe: there is no merging method 'mine'" in error and error.count("\n") == 1
    fork_command("nnunet_transplant_merge", "-m", tmp_path / "merged", models[0], "-o", tmp_path / "yes")


BROKEN = {
    "an import that fails": ("raise RuntimeError('no\\n  luck')", "(RuntimeError: no luck)"),
    "a package that is not there": ("import nowhere_at_all", "(ModuleNotFoundError: No module named 'nowhere_at_all')"),
    "no such function": ("", "(AttributeError: module 'broken' has no attribute 'broken')"),
    "inputs that nobody gives": ("""
import nnunet_transplant as nt
@nt.method("broken", "of nothing", reference="a stranger", url="https://stranger.example", weights=nt.RATIOS)
def broken(models): pass
""", "(ValueError: merging method broken takes models: it may take tensors, or vectors, or vectors and experts)"),
    "an option that says nothing": ("""
from typing import Annotated
import nnunet_transplant as nt
@nt.method("broken", "of nothing", reference="a stranger", url="https://stranger.example", weights=nt.RATIOS)
def broken(tensors, much: Annotated[float, "how much"] = 1.0): pass
""", "(TypeError: broken: much needs a default, a text that says what it is, and "),
    "a name that is taken": ("""
import nnunet_transplant as nt
@nt.method("ties", "of nothing", reference="a stranger", url="https://stranger.example", weights=nt.RATIOS)
def broken(tensors): pass
""", "(ValueError: there is a merging method ties already)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_package_is_a_note(tmp_path: Path, models: list[Path], stranger: None, name: str) -> None:
    """One line; everything else is there, the steps of other packages too."""
    code, message = BROKEN[name]
    install(tmp_path / "packages", "broken", code, "[nnunet_transplant.methods]\nbroken = broken:broken\n")
    done = fork_command("nnunet_transplant_merge", "-m", *models, "-method", "mine", "-o", tmp_path / "merged")
    assert done.stderr.startswith("note: the merging method broken of broken:broken cannot be loaded " + message)
    assert done.stderr.count("\n") == 1 and "wrote" in done.stdout
    assert (tmp_path / "merged" / "merge.json").is_file()


def test_a_broken_package_is_a_note_in_every_command(tmp_path: Path, models: list[Path],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """By real commands: for each kind of its steps one note, and help, errors and results are what they were."""
    install(tmp_path / "packages", "broken", "raise RuntimeError('no luck')", "\n".join(
        f"[nnunet_transplant.{group}]\nbroken = broken:broken" for group in GROUPS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    notes = [f"note: the {what} broken of broken:broken cannot be loaded (RuntimeError: no luck)"
             for what in ("aligner", "merging method", "fit")]
    done = run_command("nnunet_transplant_merge", "-m", *models, "-method", "ties", "-h")
    assert done.stderr.splitlines() == notes and done.stdout.startswith("-method ties: ")
    done = fork_command("nnunet_transplant_merge", "-m", *models, "-o", tmp_path / "merged")
    assert done.stderr.splitlines() == notes and "wrote" in done.stdout
    *said, error = fork_command("nnunet_transplant_merge", "-m", *models, "-method", "broken", "-o", tmp_path / "none",
                                expect=1).stderr.splitlines()
    assert said == notes and "there is no merging method 'broken'" in error
    done = fork_command("nnunet_transplant_spec", "-m", models[0])
    assert done.stderr == ""  # it merges nothing
