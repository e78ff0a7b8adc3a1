"""Scores against a slow definition, and whole evaluations with networks of random weights."""
import itertools
import multiprocessing
import shutil
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from evaluated import edit_json, random_model, read, run, write_dataset, write_volume
from factory import small_plans
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2, load_summary_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_transplant import evaluation
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.evaluation import evaluate, score
from nnunet_transplant.targets import Target

# Scores

def slow_metrics(reference: np.ndarray, prediction: np.ndarray, target: Target, ignore: int | None) -> dict:
    """Voxel by voxel, as the metrics are defined."""
    counts = {"TP": 0, "FP": 0, "FN": 0, "TN": 0}
    for r, p in zip(reference.flat, prediction.flat, strict=True):
        if ignore is not None and r == ignore:
            continue
        there, said = r in target.reference, p in target.prediction
        counts[("T" if there == said else "F") + ("P" if said else "N")] += 1
    tp, fp, fn = counts["TP"], counts["FP"], counts["FN"]
    return counts | {"n_pred": tp + fp, "n_ref": tp + fn,
                     "Dice": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else np.nan,
                     "IoU": tp / (tp + fp + fn) if tp + fp + fn else np.nan}


@pytest.mark.parametrize("ignore", [None, 4])
def test_metrics_are_those_of_the_definition(ignore: int | None) -> None:
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 5, (1, 4, 5, 6)).astype(np.float32)  # the readers give floats
    prediction = rng.integers(0, 4, (1, 4, 5, 6)).astype(np.float32)
    targets = [Target("label", 1, (1,), (1,), "label"), Target("other value", 2, (2,), (3,), "other value"),
               Target("union", (1, 3), (1, 3), (2,), "union"), Target("region", (1, 2, 3), (1, 2, 3), (1, 3), "region"),
               Target("not predicted", 3, (3,), (9,), "not predicted"), Target("not there", 8, (8,), (3,), "not there"),
               Target("nowhere", 7, (7,), (9,), "nowhere")]
    metrics = score(reference, prediction, targets, ignore)
    assert list(metrics) == [target.key for target in targets]
    for target in targets:
        assert metrics[target.key] == pytest.approx(slow_metrics(reference, prediction, target, ignore), nan_ok=True)
    assert metrics[3]["Dice"] == metrics[8]["Dice"] == 0
    assert np.isnan(metrics[7]["Dice"]) and metrics[7]["TN"] > 0


def test_ignored_voxels_count_for_nothing() -> None:
    reference = np.array([[1, 1, 0, 2, 2]])
    target = [Target("one", 1, (1,), (1,), "one")]
    assert score(reference, np.array([[1, 1, 0, 1, 0]]), target, 2)[1]["Dice"] == 1
    assert np.isnan(score(np.full((1, 4), 2), np.ones((1, 4)), target, 2)[1]["Dice"])


def test_other_shapes_are_refused() -> None:
    with pytest.raises(TransplantError, match="shape"):
        score(np.zeros((1, 2, 3)), np.zeros((1, 3, 2)), [Target("one", 1, (1,), (1,), "one")])


# Whole evaluations, with random weights

@pytest.fixture
def dataset(tmp_path: Path, nnunet_folders: None) -> Path:
    return write_dataset(tmp_path)


def nnunet_summary(dataset: Path, model_folder: Path, predictions: Path, patch: pytest.MonkeyPatch) -> dict:
    """nnU-Net's own evaluation of the same predictions, with threads for its processes, which take seconds to start."""
    patch.setattr(multiprocessing, "get_context", lambda _: SimpleNamespace(Pool=ThreadPool))
    file = predictions.parent / "stock.json"
    references = predictions.parent / "references"
    references.mkdir()
    for path in predictions.iterdir():
        shutil.copy(dataset / "labelsTr" / path.name, references)
    compute_metrics_on_folder2(str(references), str(predictions), str(dataset / "dataset.json"),
                               str(model_folder / "plans.json"), str(file), num_processes=1)
    return load_summary_json(str(file))


@pytest.mark.parametrize(("labels", "order"), [
    ({"background": 0, "one": 1, "two": 2, "three": 3}, None),
    ({"background": 0, "one": 1, "two": 2, "ignore": 3}, None),
    ({"background": 0, "all": [1, 2, 3], "two": [2], "three": 3}, [1, 2, 3]),
    ({"background": 0, "all": [1, 2], "two": [2], "ignore": 3}, [1, 2]),
])
def test_summary_is_nnunets_own(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: dict,
                                order: list | None) -> None:
    edit_json(dataset / "dataset.json", labels=labels, regions_class_order=order)
    folder = random_model(tmp_path / "model", labels, order)
    scores = run([folder], tmp_path / "out")
    ours = load_summary_json(str(tmp_path / "out" / "model" / "summary.json"))
    stock = nnunet_summary(dataset, folder, tmp_path / "out" / "model" / "predictions", monkeypatch)
    names = [name for name in labels if name not in ("background", "ignore")]
    keys = {name: str(tuple(labels[name]) if isinstance(labels[name], list) else labels[name]) for name in names}
    assert ours["structures"] == keys and set(keys.values()) == set(map(str, stock["mean"]))
    for mine, theirs in zip(ours["metric_per_case"], stock["metric_per_case"], strict=True):
        assert mine["metrics"] == theirs["metrics"]
        assert Path(mine["prediction_file"]) == Path(theirs["prediction_file"])
        assert Path(mine["reference_file"]) == dataset / "labelsTr" / Path(mine["prediction_file"]).name
    assert ours["mean"] == stock["mean"] and ours["foreground_mean"] == stock["foreground_mean"]
    assert list(scores["case"].unique()) == ["a", "b"] and list(scores["structure"].unique()) == names
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "evaluation.csv"), scores)


def test_models_evaluated_together_score_as_alone(dataset: Path, tmp_path: Path) -> None:
    """Also where they share preprocessing (the first two) and where one is an ensemble; all cases, by id."""
    labels = {"background": 0, "three": 1, "one": 2}
    models = [random_model(tmp_path / "parent", {"background": 0, "one": 1, "two": 2, "three": 3}),
              random_model(tmp_path / "task", labels, seed=1, axes=(0, 1)),
              random_model(tmp_path / "folds", labels, seed=2, plans=small_plans(spacing=1.5))]
    random_model(models[2], labels, seed=3, fold="1", plans=small_plans(spacing=1.5))
    models.append(models[2] / "fold_1" / "checkpoint_final.pth")
    together = run(models, tmp_path / "out", fold="all")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dice.png", "evaluation.csv", "folds", "folds__fold_1", "overlays.png", "parent", "table.txt", "task"]
    assert len(together) == 3 * (3 + 2 + 2 + 2)
    for path, label in zip(models, together["model"].unique(), strict=True):
        alone = evaluate([path], 700, "all", output=tmp_path / f"alone_{label}", device="cpu", step_size=1.0)
        of_model = together[together["model"] == label].reset_index(drop=True)
        pd.testing.assert_frame_equal(of_model, alone)
    dice = together.set_index(["model", "structure", "case"])["dice"]
    assert dice["folds"].to_dict() != dice["folds__fold_1"].to_dict()


def test_what_the_dataset_does_not_have_is_noted(dataset: Path, tmp_path: Path) -> None:
    models = [random_model(tmp_path / "first", {"background": 0, "one": 1, "heart": 2, "lung": 3}),
              random_model(tmp_path / "second", {"background": 0, "two": 1})]
    scores = run(models, tmp_path / "out")
    assert set(zip(scores["model"], scores["structure"], strict=True)) == {("first", "one"), ("second", "two")}
    text = (tmp_path / "out" / "table.txt").read_text()
    assert text.count("note:") == 1
    assert "note: heart, lung of first not scored: Dataset700_Small has no such label" in text
    assert text.startswith("Dice on Dataset700_Small, fold 0 (2 cases)")
    assert list(load_summary_json(str(tmp_path / "out" / "first" / "summary.json"))["mean"]) == [1]


def test_two_structures_of_the_same_labels_both_have_scores(dataset: Path, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model", {"background": 0, "mine": 1, "yours": 2},
                         nnunet_transplant={"classes": {"mine": ["two"], "yours": ["two"]}})
    scores = run([folder], tmp_path / "out")
    assert list(scores["structure"].unique()) == ["two", "two (yours)"]
    summary = load_summary_json(str(tmp_path / "out" / "model" / "summary.json"))
    assert summary["structures"] == {"mine": "2", "yours": "(2, 2)"} and list(summary["mean"]) == [(2, 2), 2]
    assert summary["mean"][2]["n_ref"] == summary["mean"][2, 2]["n_ref"] > 0
    assert summary["mean"][2]["n_pred"] != summary["mean"][2, 2]["n_pred"]


@pytest.mark.parametrize(("options", "cases"), [
    ({"cases": "train:0"}, ["c"]), ({"cases": "val:0"}, ["a", "b"]), ({"cases": "cases.txt"}, ["b", "c"]),
    ({"cases": "cases.txt", "n_cases": 1}, ["b"]), ({"fold": "all", "n_cases": 2}, ["a", "b"]),
    ({"fold": "0", "n_cases": 9}, ["a", "b"])])
def test_cases_may_be_chosen(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict,
                             cases: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cases.txt").write_text("c\nb\n")
    scores = run([random_model(tmp_path / "model")], tmp_path / "out", **options)
    assert list(scores["case"].unique()) == cases
    assert sorted(path.name for path in (tmp_path / "out" / "model" / "predictions").iterdir()) == [
        f"{case}.nii.gz" for case in cases]


def test_images_by_a_dataset_entry(dataset: Path, tmp_path: Path) -> None:
    """As task datasets have it: images elsewhere, labels beside the dataset.json."""
    (dataset / "imagesTr").rename(tmp_path / "images")
    edit_json(dataset / "dataset.json", dataset={
        case: {"images": [str(tmp_path / "images" / f"{case}_0000.nii.gz")], "label": f"labelsTr/{case}.nii.gz"}
        for case in "abc"})
    scores = run([random_model(tmp_path / "model")], tmp_path / "out", fold="all")
    assert list(scores["case"].unique()) == ["a", "b", "c"]


def test_another_file_ending_of_the_same_reader(dataset: Path, tmp_path: Path) -> None:
    first = run([random_model(tmp_path / "model")], tmp_path / "out")
    for path in dataset.glob("*Tr/*.nii.gz"):
        SimpleITK.WriteImage(SimpleITK.ReadImage(path), path.with_name(path.name.replace(".nii.gz", ".nrrd")))
        path.unlink()
    edit_json(dataset / "dataset.json", file_ending=".nrrd")
    pd.testing.assert_frame_equal(run([tmp_path / "model"], tmp_path / "nrrd"), first)
    assert (tmp_path / "nrrd" / "model" / "predictions" / "a.nrrd").is_file()


# What goes on at the same time

@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """That export and score, whatever the machine has."""
    monkeypatch.setattr(evaluation, "EXPORTERS", 2)
    monkeypatch.setattr(evaluation.os, "cpu_count", lambda: 2)


def watch(patch: pytest.MonkeyPatch, stage: str, before: Callable[[int], object]) -> None:
    """Call before(0), before(1), ... at the start of each call of a stage of the evaluation."""
    work, calls = getattr(evaluation, stage), itertools.count()

    def watched(*arguments: object) -> object:
        before(next(calls))
        return work(*arguments)

    patch.setattr(evaluation, stage, watched)


def happens(event: threading.Event) -> None:
    assert event.wait(30), "it would have waited for ever"


def test_predictions_are_the_files_of_nnunets_own_predictor(dataset: Path, tmp_path: Path) -> None:
    models = [random_model(tmp_path / "parent", seed=5, axes=(0,)),
              random_model(tmp_path / "other", seed=6, plans=small_plans(spacing=1.5))]
    run(models, tmp_path / "out", fold="all")
    for model in models:
        judge = nnUNetPredictor(device=torch.device("cpu"), tile_step_size=1.0, allow_tqdm=False)
        judge.initialize_from_trained_model_folder(str(model), ("0",))
        expected = tmp_path / f"judge_{model.name}"
        expected.mkdir()
        judge.predict_from_files_sequential(str(dataset / "imagesTr"), str(expected))
        for case in "abc":
            assert read(expected / f"{case}.nii.gz").any()
            found = tmp_path / "out" / model.name / "predictions" / f"{case}.nii.gz"
            assert found.read_bytes() == (expected / f"{case}.nii.gz").read_bytes()


def test_the_next_case_is_read_while_one_is_predicted_and_the_last_one_scored_while_the_next_is_predicted(
        dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next_is_read, next_is_predicted = threading.Event(), threading.Event()
    watch(monkeypatch, "_read", lambda call: call == 1 and next_is_read.set())

    def predicting(call: int) -> None:
        if call == 0:
            happens(next_is_read)
        elif call == 1:
            next_is_predicted.set()

    watch(monkeypatch, "_predict", predicting)
    watch(monkeypatch, "_export", lambda call: call == 0 and happens(next_is_predicted))
    run([random_model(tmp_path / "model")], tmp_path / "out")


def test_models_with_the_same_preprocessing_share_one_reading(dataset: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    models = [random_model(tmp_path / "first"), random_model(tmp_path / "other", plans=small_plans(spacing=1.5)),
              random_model(tmp_path / "second", seed=1)]
    read_for = []
    work = evaluation._read

    def reading(what: evaluation._Reading) -> evaluation._Input:
        read_for.append((what.case, *(contender.label for contender in what.contenders)))
        return work(what)

    monkeypatch.setattr(evaluation, "_read", reading)
    run(models, tmp_path / "out")
    assert read_for == [("a", "first", "second"), ("a", "other"), ("b", "first", "second"), ("b", "other")]


def test_cases_keep_their_order_whichever_is_scored_first(dataset: Path, tmp_path: Path, two_threads: None,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tmp_path / "model")
    expected = run([model], tmp_path / "expected", fold="all")
    assert expected["dice"].nunique() > 3
    first_is_next = threading.Event()
    finished = []
    work = evaluation._export

    def export(prediction: evaluation._Prediction, *where: object) -> np.ndarray:
        case = prediction.given.what.case
        if case == "a":
            happens(first_is_next)
        label_map = work(prediction, *where)
        finished.append(case)
        if case == "b":
            first_is_next.set()
        return label_map

    monkeypatch.setattr(evaluation, "_export", export)
    pd.testing.assert_frame_equal(run([model], tmp_path / "out", fold="all"), expected)
    assert finished.index("b") < finished.index("a")
    entries = load_summary_json(str(tmp_path / "out" / "model" / "summary.json"))["metric_per_case"]
    assert [Path(entry["prediction_file"]).name for entry in entries] == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]


def test_few_predictions_are_in_memory(dataset: Path, tmp_path: Path, two_threads: None,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """However long an export takes: of nine those that two threads have, one that waits and one that is made."""
    there: weakref.WeakSet = weakref.WeakSet()
    most = []
    too_many = threading.Event()

    def predict(contender: object, image: np.ndarray) -> torch.Tensor:
        logits = torch.zeros(3, *image.shape[1:], dtype=torch.half)
        there.add(logits)
        most.append(len(there))
        if most[-1] > 4:
            too_many.set()
        return logits

    monkeypatch.setattr(evaluation, "_predict", predict)
    watch(monkeypatch, "_export", lambda _: too_many.wait(0.5))
    run([random_model(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two", "three"))],
        tmp_path / "out", fold="all")
    assert len(most) == 9 and max(most) <= 4


def test_what_nnunet_prints_on_any_thread_is_not_shown(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture) -> None:
    said = []
    for stage in ("_read", "_predict", "_export"):
        watch(monkeypatch, stage, lambda _: (print("nnU-Net talks"), said.append(threading.current_thread())))
    run([random_model(tmp_path / "model")], tmp_path / "out")
    assert len(said) == 6 and len(set(said)) > 2
    print("we talk")
    assert capsys.readouterr().out == "we talk\n"


# What goes wrong

def write_two_channels(dataset: Path) -> None:
    for path in (dataset / "imagesTr").iterdir():
        shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))


def crop_label(dataset: Path) -> None:
    write_volume(dataset / "labelsTr" / "b.nii.gz", np.zeros((11, 18, 20), np.uint8))


ERRORS = {
    "unknown id": (lambda d: None, {"dataset": "77"}, "-d 77: Could not find a dataset with the ID 77"),
    "no id": (lambda d: None, {"dataset": "Liver"}, "-d Liver: "),
    "unknown name": (lambda d: None, {"dataset": "Dataset077_No"}, "nnUNet_raw has no dataset Dataset077_No"),
    "no images": (lambda d: shutil.rmtree(d / "imagesTr"), {}, "has no imagesTr"),
    "empty": (lambda d: [path.unlink() for path in (d / "imagesTr").iterdir()], {"fold": "all"}, "no case to evaluate"),
    "no label": (lambda d: (d / "labelsTr" / "b.nii.gz").unlink(), {}, "case b of Dataset700_Small: there is no file"),
    "no splits": (lambda d: shutil.rmtree(d.parents[1] / "preprocessed"), {}, "Use -f all"),
    "fold": (lambda d: None, {"fold": "3"}, "has no fold 3: its splits_final.json holds folds 0 to 2"),
    "no fold": (lambda d: None, {"fold": "-1"}, "-f must be the number of a fold or all, not -1"),
    "empty fold": (lambda d: None, {"fold": "1"}, "no case to evaluate"),
    "unknown case": (lambda d: None, {"fold": "2"}, "case z has no images in Dataset700_Small"),
    "channels": (write_two_channels, {}, "takes 1 channel, but case a of Dataset700_Small has 2"),
    "structures": (lambda d: edit_json(d / "dataset.json", labels={"background": 0, "x": 1}), {}, "has no structure"),
    "chosen case": (lambda d: (d.parents[1] / "cases.txt").write_text("a\nz"), {"cases": "cases.txt"},
                    "1 of the chosen cases are not in the dataset: z"),
    "no cases": (lambda d: None, {"n_cases": 0}, "-n_cases must be at least 1, not 0"),
    "device": (lambda d: None, {"device": "tpu"}, "-device must be"),
    "step": (lambda d: None, {"step_size": 0.0}, "-step_size must be above 0"),
    "checkpoint": (lambda d: None, {"checkpoint_name": "checkpoint_best.pth"}, "no fold_X/checkpoint_best.pth"),
    "shape": (crop_label, {}, r"case b of Dataset700_Small: the reference has the shape \(1, 11, 18, 20\)"),
    "damaged label": (lambda d: (d / "labelsTr" / "b.nii.gz").write_bytes(b"no image"), {},
                      "nnU-Net cannot read and preprocess case b for model "),
    "damaged": (lambda d: (d / "imagesTr" / "b_0000.nii.gz").write_bytes(b"no image"), {},
                "SimpleITKIO cannot read .*b_0000.nii.gz"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_clear_and_leave_nothing(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            name: str) -> None:
    monkeypatch.chdir(tmp_path)
    spoil, options, message = ERRORS[name]
    spoil(dataset)
    folder = random_model(tmp_path / "model")
    before = set(tmp_path.rglob("*"))
    options = {"dataset": "Dataset700_Small", "device": "cpu", "step_size": 1.0, **options}
    with pytest.raises(TransplantError, match=message) as caught:
        evaluate([folder], output=tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_unset_variables(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable)
    folder = random_model(tmp_path / "model")
    with pytest.raises(TransplantError, match=f"the environment variable {variable} is not set"):
        run([folder], tmp_path / "out")


def test_a_model_that_cannot_read_the_files(dataset: Path, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model")
    edit_json(folder / "plans.json", image_reader_writer="Tiff3DIO")
    with pytest.raises(TransplantError, match=r"reads images with Tiff3DIO, which cannot read the \.nii\.gz files"):
        run([folder], tmp_path / "out")


def test_a_second_stage_is_refused(dataset: Path, tmp_path: Path) -> None:
    plans = small_plans()
    first = plans["configurations"]["3d_fullres"]
    plans["configurations"] = {"3d_fullres": first | {"previous_stage": "3d_lowres"},
                               "3d_lowres": first | {"next_stage": "3d_fullres"}}
    random_model(tmp_path / "cascade", plans=plans)
    with pytest.raises(TransplantError, match="cascade is the second stage of a cascade"):
        run([tmp_path / "cascade"], tmp_path / "out")


def test_an_output_is_replaced_only_if_it_is_an_evaluation(dataset: Path, tmp_path: Path) -> None:
    folder, output = random_model(tmp_path / "model"), tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("keep")
    with pytest.raises(TransplantError, match="exists already"):
        run([folder], output)
    with pytest.raises(TransplantError, match="not an earlier evaluation"):
        run([folder], output, overwrite=True)
    assert (output / "notes.txt").read_text() == "keep"
    (output / "notes.txt").unlink()
    run([folder], output)  # an empty folder may be written to
    (output / "evaluation.csv").write_text("old")
    with pytest.raises(TransplantError, match="exists already"):
        run([folder], output)
    run([folder], output, overwrite=True)
    assert (output / "evaluation.csv").read_text() != "old"
    for inside in (folder, tmp_path):
        with pytest.raises(TransplantError, match="is one of the models, or holds one"):
            run([folder], inside, overwrite=True)


def test_an_interrupted_evaluation_leaves_the_earlier_one(dataset: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output = random_model(tmp_path / "model"), tmp_path / "out"
    run([folder], output)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    calls = itertools.count()
    predict = evaluation._predict

    def interrupted(*args: object) -> np.ndarray:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return predict(*args)

    monkeypatch.setattr(evaluation, "_predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([folder], output, overwrite=True)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, TransplantError])
def test_no_thread_writes_once_an_evaluation_has_ended(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       error: type[BaseException]) -> None:
    """The first case is being exported when the second one ends it."""
    folder = random_model(tmp_path / "model")
    before, threads = set(tmp_path.rglob("*")), threading.active_count()
    exporting, ended = threading.Event(), threading.Event()
    written = []

    def end(call: int) -> None:
        if call == 1:
            happens(exporting)
            ended.set()
            raise error

    work = evaluation._export

    def export(*arguments: object) -> np.ndarray:
        exporting.set()
        happens(ended)
        time.sleep(0.2)
        label_map = work(*arguments)
        written.append(arguments)
        return label_map

    watch(monkeypatch, "_predict", end)
    monkeypatch.setattr(evaluation, "_export", export)
    with pytest.raises(error):
        run([folder], tmp_path / "out", fold="all")
    assert len(written) == 1 and threading.active_count() == threads
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("error", "message"), [
    (RuntimeError("sitk::ERROR:\n no space"),
     r"^nnU-Net cannot write what model says of case b \(RuntimeError: sitk::ERROR: no space\)$"),
    (MemoryError("no more"), "^no more$")])
def test_a_prediction_that_cannot_be_written_is_named(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      error: Exception, message: str) -> None:
    """But memory that ran out is what it is: commands say what helps."""
    folder = random_model(tmp_path / "model")
    before = set(tmp_path.rglob("*"))
    work = evaluation.export_prediction_from_logits

    def export(*arguments: object, **options: object) -> None:
        if str(arguments[5]).endswith("b"):
            raise error
        work(*arguments, **options)

    monkeypatch.setattr(evaluation, "export_prediction_from_logits", export)
    with pytest.raises(MemoryError if isinstance(error, MemoryError) else TransplantError, match=message):
        run([folder], tmp_path / "out", fold="all")
    assert set(tmp_path.rglob("*")) == before


def test_overflow_is_explained(dataset: Path, tmp_path: Path) -> None:
    folder = random_model(tmp_path / "model")
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    for name, tensor in content["network_weights"].items():
        if "seg_layers" in name:
            tensor.fill_(1e6)
    torch.save(content, checkpoint)
    with pytest.raises(TransplantError, match="half precision"):
        run([folder], tmp_path / "out")
