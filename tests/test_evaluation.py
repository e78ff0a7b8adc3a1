"""Scores against a slow definition, structures found by name, and whole evaluations with networks of random weights."""
import itertools
import json
import multiprocessing
import shutil
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from factory import dice_frame, small_plans, write_model
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2, load_summary_json

from nnunet_transplant import evaluation
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.evaluation import (
    Cases,
    Target,
    evaluate,
    match_structures,
    name_targets,
    reference_key,
    score,
    shown_cases,
    unique_key,
)
from nnunet_transplant.figures import evaluation as drawing
from nnunet_transplant.figures.evaluation import Overlay, save_dice_figure, save_overlays_figure

ORGANS = {"background": 0, "liver": 1, "left_kidney": 2, "right_kidney": 3, "spleen": 4}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "edge": [1]}


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


# Which structure is scored against which labels

def model(labels: dict, classes: dict | None = None) -> SimpleNamespace:
    """As much of a model as its labels need; classes as a task dataset or a merge records them."""
    content = {"labels": labels} | ({} if classes is None else {"nnunet_transplant": {"classes": classes}})
    return SimpleNamespace(dataset_json=content)


def cases(labels: dict, classes: dict | None = None) -> Cases:
    return Cases("Dataset001_Test", model(labels, classes).dataset_json, {})


@pytest.mark.parametrize(("classes", "labels", "key"), [
    ({"Liver": ["liver"]}, ["liver"], 1),
    ({"Kidney": ["right_kidney", "left_kidney"]}, ["left_kidney", "right_kidney"], (2, 3)),
    ({"spleen": ["Milz"]}, ["spleen"], 4),  # of a dataset with names of its own: the structure's name
    ({"liver": ["liver", "spleen"]}, ["liver", "spleen"], (1, 4)),  # what it consists of, whatever its name
    (None, None, None),
])
def test_structures_are_found_by_origin_then_name(classes: dict | None, labels: list, key: object) -> None:
    structure = next(iter(classes or {"Heart": []}))
    matches, unknown = match_structures(model({"background": 0, structure: 1}, classes), cases(ORGANS))
    assert matches == ({structure: labels} if classes else {})
    assert unknown == ([] if classes else ["Heart"])
    if classes:
        assert reference_key(labels, {"labels": ORGANS}) == key


def test_half_a_structure_is_not_the_structure() -> None:
    task = model({"background": 0, "Both": 1}, {"Both": ["liver", "gallbladder"]})
    assert match_structures(task, cases(ORGANS)) == ({}, ["Both"])


def test_a_task_dataset_can_be_the_reference() -> None:
    reference = cases({"background": 0, "Kidney": 1, "spleen": 2, "ignore": 3},
                      {"Kidney": ["left_kidney", "right_kidney"], "spleen": ["spleen"]})
    merged = model({"background": 0, "Niere": 1, "Kidney": 2, "Both": 3, "spleen": 4},
                   {"Niere": ["right_kidney", "left_kidney"], "Kidney": ["left_kidney"],
                    "Both": ["left_kidney", "right_kidney", "spleen"]})
    matches, unknown = match_structures(merged, reference)
    assert matches == {"Niere": ["Kidney"], "Both": ["Kidney", "spleen"], "spleen": ["spleen"]}
    assert unknown == ["Kidney"]  # the dataset's Kidney is both, the model's the left one


@pytest.mark.parametrize(("labels", "key"), [
    (["whole"], (1, 2, 3)), (["core"], (2, 3)), (["enhancing"], 3), (["edge"], (1,)),
    (["edge", "core"], (1, 2, 3)), (["enhancing", "edge"], (1, 3)), (["core", "enhancing"], (2, 3)),
])
def test_keys_are_written_as_nnunet_writes_them(labels: list[str], key: object) -> None:
    assert reference_key(labels, {"labels": REGIONS}) == key


def test_a_list_of_one_label_is_a_label_without_regions() -> None:
    assert reference_key(["one"], {"labels": {"background": 0, "one": [1]}}) == 1


def test_unique_keys_stay_what_nnunet_reads() -> None:
    keys: list = []
    for key in (1, 1, (2, 3), 1, (2, 3)):
        keys.append(unique_key(key, keys))
    assert keys == [1, (1, 1), (2, 3), (1, 1, 1), (2, 3, 2)]


def test_rows_are_shared_by_what_is_scored_against_the_same_labels() -> None:
    base = model(ORGANS)
    liver = model({"background": 0, "Liver": 1}, {"Liver": ["liver"]})
    kidneys = model({"background": 0, "Kidney": 1, "Heart": 2}, {"Kidney": ["left_kidney", "right_kidney"]})
    other = model({"background": 0, "Kidney": 1, "Nieren": 2, "Leber": 3, "liver": 4},
                  {"Kidney": ["left_kidney", "spleen"], "Nieren": ["right_kidney", "left_kidney"], "Leber": ["liver"]})
    targets, notes = name_targets(["base", "a", "b", "c"], [[base], [liver], [kidneys], [other]], cases(ORGANS))
    assert [[(t.structure, t.row, t.key) for t in of_model] for of_model in targets] == [
        [("liver", "liver", 1), ("left_kidney", "left_kidney", 2), ("right_kidney", "right_kidney", 3),
         ("spleen", "spleen", 4)],
        [("Liver", "liver", 1)],
        [("Kidney", "Kidney", (2, 3))],
        [("Kidney", "left_kidney+spleen", (2, 4)), ("Nieren", "Kidney", (2, 3)), ("Leber", "liver", 1),
         ("liver", "liver (liver)", (1, 1))]]
    assert [t.prediction for t in targets[3]] == [(1,), (2,), (3,), (4,)]
    assert notes == ["note: Heart of b not scored: Dataset001_Test has no such label"]
    with pytest.raises(TransplantError, match="x has no structure of Dataset001_Test: it has Heart, the dataset liver"):
        name_targets(["x"], [[model({"background": 0, "Heart": 1})]], cases(ORGANS))


# Whole evaluations, with random weights

@pytest.fixture
def dataset(tmp_path: Path, nnunet_folders: None) -> Path:
    """Three raw cases of noise with the labels one, two and three, and splits of them."""
    folder = tmp_path / "raw" / "Dataset700_Small"
    rng = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        write_volume(folder / "imagesTr" / f"{case}_0000.nii.gz", rng.normal(size=(12, 18, 20)).astype(np.float32))
        write_volume(folder / "labelsTr" / f"{case}.nii.gz", rng.integers(0, 4, (12, 18, 20)).astype(np.uint8))
    write_json(folder / "dataset.json", {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "numTraining": 3,
                                         "labels": {"background": 0, "one": 1, "two": 2, "three": 3}})
    write_json(tmp_path / "preprocessed" / folder.name / "splits_final.json",
               [{"train": ["c"], "val": ["a", "b"]}, {"train": ["a", "b", "c"], "val": []},
                {"train": ["a"], "val": ["z"]}])
    return folder


def random_model(folder: Path, *labels: object, plans: dict | None = None, **options: object) -> Path:
    """With the intensity statistics in the plans that preprocessing wants to see."""
    plans = plans or small_plans()
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    return write_model(folder, *labels, plans=plans, **options)


def write_volume(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    volume = SimpleITK.GetImageFromArray(array)
    volume.SetSpacing((1.0, 1.5, 2.0))
    SimpleITK.WriteImage(volume, path)


def read(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path))


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def run(models: list[Path], output: Path, **options: object) -> pd.DataFrame:
    return evaluate(models, "Dataset700_Small", output=output, **{"device": "cpu", "step_size": 1.0, **options})


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


# Figures

@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, as matplotlib has them, beside their files."""
    saved = []

    def save(figure: Figure, path: Path) -> None:
        figure.savefig(path)
        saved.append(figure)

    monkeypatch.setattr(drawing, "save_figure", save)
    return saved


def test_bars_are_the_means_and_dots_the_cases(tmp_path: Path, figures: list) -> None:
    scores = dice_frame([("A", "liver", "c1", 0.5), ("A", "liver", "c2", np.nan), ("A", "liver", "c3", 0.9),
                    ("B", "liver", "c1", 1.0), ("B", "liver", "c2", 0.0), ("B", "liver", "c3", 0.2),
                    ("B", "rare", "c1", np.nan), ("B", "rare", "c2", np.nan), ("B", "rare", "c3", np.nan),
                    ("B", "spleen", "c1", 0.1), ("B", "spleen", "c2", 0.2), ("B", "spleen", "c3", 0.6),
                    ("A", "spleen", "c1", 0.4), ("A", "spleen", "c2", 0.6), ("A", "spleen", "c3", 0.8)])
    evaluation._draw_dice(scores, "Dice on $x$", tmp_path / "dice.png")
    (figure,), (axes,) = figures, figures[0].axes
    bars = [(round(bar.get_height(), 9), bar.get_facecolor()) for bar in axes.patches]
    assert [height for height, _ in bars] == [0.7, 0.4, 0.6, 0.3, 0.65, 0.35]  # the last two: means of two
    assert len({colour for _, colour in bars}) == 2 and bars[0][1] == bars[2][1] == bars[4][1]
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    dots = [sorted(np.round(points.get_offsets()[:, 1], 9)) for points in axes.collections]
    assert dots == [[0.5, 0.9], [0, 0.2, 1], [0.4, 0.6, 0.8], [0.1, 0.2, 0.6]]
    assert [text.get_text() for text in axes.texts] == ["in no case"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["liver", "rare", "spleen", "mean of 2"]
    assert (axes.get_ylabel(), axes.get_ylim()) == ("Dice", (0, 1))
    assert figure.get_suptitle() == "Dice on $x$"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "B"]


@pytest.mark.parametrize(("models", "structures"), [(1, 1), (8, 1), (1, 12), (8, 12), (17, 2)])
def test_there_is_a_bar_for_everything(tmp_path: Path, figures: list, models: int, structures: int) -> None:
    names = [[f"{kind} {number} $_{{" for number in range(count)] for kind, count in (
        ("_model", models), ("structure_" * 6, structures))]
    dice = {(structure, model): [0.25, 0.75] for model in names[0] for structure in names[1]}
    save_dice_figure(dice, names[1], names[0], "title", tmp_path / "dice.png")
    bars = [bar for axes in figures[0].axes for bar in axes.patches]
    assert len(bars) == models * structures
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == models
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == names[0]
    assert len([label for axes in figures[0].axes for label in axes.get_xticklabels()]) == structures
    edges = sorted((id(bar.axes), bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert all(left[0] != right[0] or left[2] <= right[1] + 1e-9 for left, right in itertools.pairwise(edges))


def test_best_median_and_worst_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    for cases_ in range(3, 9):
        dice = {f"case_{i}": value for i, value in enumerate(rng.permutation(cases_) / 10)} | {"none": np.nan}
        shown = shown_cases(dice)
        assert list(shown) == ["best", "median", "worst"]
        values = [value for value in dice.values() if value == value]
        assert (dice[shown["best"]], dice[shown["worst"]]) == (max(values), min(values))
        better = sum(value > dice[shown["median"]] for value in values)
        worse = sum(value < dice[shown["median"]] for value in values)
        assert better - worse == (0 if cases_ % 2 else 1)
    assert shown_cases({"a": 0.5, "b": 0.5, "c": 0.5}) == {"best": "c", "median": "b", "worst": "a"}
    assert shown_cases({"a": 0.5, "b": 0.4}) == {"best": "a", "worst": "b"}
    assert shown_cases({"a": np.nan, "b": 0.4}) == {"only": "b"}
    assert shown_cases({"a": np.nan, "b": np.nan}) == {"first": "a"}


def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """What is handed over to be drawn: the arguments of save_overlays_figure."""
    calls: list = []

    def save(*arguments: object) -> None:
        calls.append(arguments)
        save_overlays_figure(*arguments)

    monkeypatch.setattr(evaluation, "save_overlays_figure", save)
    return calls


def test_overlays_show_the_slice_with_most_structure(dataset: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """The first model that is merged leads; the spacing is coarsest from slice to slice."""
    truth = np.zeros((12, 18, 20), np.uint8)
    truth[3, 2:10, 2:10], truth[7, 4:8, 4:8], truth[7, 10:12, 4:8] = 1, 1, 2  # slice 7 has both
    for case in "abc":
        write_volume(dataset / "labelsTr" / f"{case}.nii.gz", truth)
    models = [random_model(tmp_path / "expert", {"background": 0, "two": 1}, seed=3),
              random_model(tmp_path / "merged", {"background": 0, "two": 1, "one": 2}, seed=4)]
    write_json(models[1] / "merge.json", {})
    calls = drawn(monkeypatch)
    scores = run(models, tmp_path / "out", fold="all")
    (overlays, structures, title, _), = calls
    assert structures == ["two", "one"] and title == "Cases by the mean Dice of merged"
    dice = {case: scores.query("model == 'merged' and case == @case")["dice"].mean() for case in "abc"}
    assert [overlay.title for overlay in overlays] == [f"{which}: {case}" for which, case in shown_cases(dice).items()]
    for overlay in overlays:
        case = overlay.title[-1]
        image = read(dataset / "imagesTr" / f"{case}_0000.nii.gz")
        assert np.array_equal(overlay.image, image[7]) and overlay.spacing == (1.5, 1.0)
        assert [name.split("\n")[0] for name, _ in overlay.panels] == ["truth", "expert", "merged"]
        assert overlay.panels[2][0].endswith(f"Dice {dice[case]:.3f}")
        for label, values in (("expert", {"two": 1}), ("merged", {"two": 1, "one": 2})):
            said = read(tmp_path / "out" / label / "predictions" / f"{case}.nii.gz")
            masks = dict(overlay.panels[1 if label == "expert" else 2][1])
            assert masks.keys() == values.keys()
            assert all(np.array_equal(masks[name], said[7] == value) for name, value in values.items())
        assert np.array_equal(overlay.panels[0][1]["one"], truth[7] == 1)
        assert np.array_equal(overlay.panels[0][1]["two"], truth[7] == 2)


def test_overlays_of_images_that_were_taken_in_another_direction(dataset: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    for path in dataset.glob("*Tr/*.nii.gz"):
        volume = SimpleITK.ReadImage(path)
        volume.SetSpacing((0.7, 4.0, 0.71))
        SimpleITK.WriteImage(volume, path)
    calls = drawn(monkeypatch)
    run([random_model(tmp_path / "model")], tmp_path / "out")
    for overlay in calls[0][0]:
        image = read(dataset / "imagesTr" / f"{overlay.title[-1]}_0000.nii.gz")
        assert overlay.image.shape == (12, 20) and overlay.spacing == pytest.approx((0.71, 0.7))
        assert any(np.array_equal(overlay.image, image[::-1, index]) for index in range(18))  # the head is above


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize("there", ["nothing", "one case"])
def test_overlays_without_truth(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str,
                                predicted: bool) -> None:
    """The leading model's prediction says where to look; and there is something to draw even if it says nothing."""
    for case in "abc":
        write_volume(dataset / "labelsTr" / f"{case}.nii.gz", np.zeros((12, 18, 20), np.uint8))
        write_volume(dataset / "imagesTr" / f"{case}_0000.nii.gz", np.full((12, 18, 20), 7, np.float32))
    if there == "one case":
        write_volume(dataset / "labelsTr" / "b.nii.gz", np.ones((12, 18, 20), np.uint8))
    said = np.zeros((12, 18, 20), np.uint8)
    said[9, 3:5, 3:5] = predicted

    def predict(contender: object, given: object, cases_: object, path: Path) -> np.ndarray:
        write_volume(path, said)
        return said[None]

    monkeypatch.setattr(evaluation, "_predict", predict)
    calls = drawn(monkeypatch)
    run([random_model(tmp_path / "model")], tmp_path / "out", fold="all")
    overlays = {overlay.title: overlay for overlay in calls[0][0]}
    assert list(overlays) == {
        ("nothing", True): ["best: c", "median: b", "worst: a"], ("nothing", False): ["first: a"],
        ("one case", True): ["best: b", "median: c", "worst: a"], ("one case", False): ["only: b"]}[there, predicted]
    for title, overlay in overlays.items():
        assert overlay.panels[1][1]["one"].sum() == (4 if predicted and (there, title[-1]) != ("one case", "b") else 0)
    assert (tmp_path / "out" / "overlays.png").stat().st_size > 1000


def test_two_dimensional_images(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(dataset)
    rng = np.random.default_rng(0)
    for case in "abc":
        for folder, name, highest in (("imagesTr", f"{case}_0000.png", 256), ("labelsTr", f"{case}.png", 3)):
            (dataset / folder).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, highest, (24, 30)).astype(np.uint8)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels), dataset / folder / name)
    write_json(dataset / "dataset.json", {"channel_names": {"0": "photograph"}, "file_ending": ".png", "numTraining": 3,
                                          "labels": {"background": 0, "one": 1, "two": 2}})
    plans = small_plans(2) | {"image_reader_writer": "NaturalImage2DIO"}
    calls = drawn(monkeypatch)
    run([random_model(tmp_path / "model", plans=plans, file_ending=".png")], tmp_path / "out", fold="all")
    assert [overlay.image.shape for overlay in calls[0][0]] == [(24, 30)] * 3
    assert all(overlay.spacing == (1, 1) for overlay in calls[0][0])


def overlay(shape: tuple[int, int], *masks: tuple[slice, slice], spacing: tuple[float, float] = (1, 1),
            panels: int = 1) -> Overlay:
    """Of structures that are boxes, and as many predictions of them as there are panels."""
    parts = {f"structure_{i} $": np.zeros(shape, bool) for i in range(len(masks))}
    for part, mask in zip(parts.values(), masks, strict=True):
        part[mask] = True
    image = np.arange(shape[0] * shape[1], dtype=np.float32).reshape(shape)
    return Overlay("best: case_$", image, spacing, [("truth", parts)] + [(f"model_{i}_$\nDice 0.5", parts)
                                                                        for i in range(panels)])


@pytest.mark.parametrize(("shape", "box", "spacing", "expected"), [
    ((100, 100), (slice(40, 60), slice(48, 52)), (1, 1), (slice(35, 65), slice(35, 65))),
    ((100, 100), (slice(20, 80), slice(48, 52)), (1, 2), (slice(5, 95), slice(27, 72))),
    ((100, 100), (slice(0, 40), slice(0, 4)), (1, 1), (slice(0, 60), slice(0, 60))),
    ((100, 100), (slice(50, 51), slice(99, 100)), (1, 1), (slice(38, 63), slice(75, 100))),
    ((100, 10), (slice(50, 70), slice(2, 4)), (1, 1), (slice(45, 75), slice(0, 10))),
    ((1, 3), (slice(0, 1), slice(1, 2)), (1, 1), (slice(0, 1), slice(0, 2))),
    ((100, 100), (slice(0, 0), slice(0, 0)), (1, 1), (slice(0, 100), slice(0, 100))),
])
def test_overlays_are_cut_to_what_is_there(shape: tuple, box: tuple, spacing: tuple, expected: tuple) -> None:
    whole = overlay(shape, box, spacing=spacing)
    cut = drawing._cut(whole)
    assert np.array_equal(cut.image, whole.image[expected])
    assert np.array_equal(cut.panels[1][1]["structure_0 $"], whole.panels[1][1]["structure_0 $"][expected])


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (40, 30)])
@pytest.mark.parametrize("panels", [1, 8])
def test_overlays_of_any_shape(tmp_path: Path, figures: list, shape: tuple, panels: int) -> None:
    everywhere = (slice(None), slice(None))
    boxes = [everywhere, (slice(0, 1), slice(0, 1)), (slice(0, 0), slice(0, 0))] * 4
    case = overlay(shape, *boxes, panels=panels, spacing=(3.3, 0.6))
    save_overlays_figure([case, case], list(case.panels[0][1]), "Cases of $", tmp_path / "overlays.png")
    shown = [axes for axes in figures[0].findobj(Axes) if axes.images]
    assert len(shown) == 2 * (panels + 2)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        *case.panels[0][1], "outline of the truth"]
    assert figures[0].get_size_inches()[0] < 10


def test_figures_are_there_whole_and_the_same_each_time(dataset: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    folder = random_model(tmp_path / "model")
    for output in ("one", "two"):
        run([folder], tmp_path / output)
    for name in ("dice.png", "overlays.png"):
        content = (tmp_path / "one" / name).read_bytes()
        assert content[:4] == b"\x89PNG" and content == (tmp_path / "two" / name).read_bytes()

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluation, "save_overlays_figure", full)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for output in ("two", "three"):
        with pytest.raises(OSError, match="no space"):
            run([folder], tmp_path / output, overwrite=True)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


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
    "device": (lambda d: None, {"device": "tpu"}, "-device must be"),
    "step": (lambda d: None, {"step_size": 0.0}, "-step_size must be above 0"),
    "checkpoint": (lambda d: None, {"checkpoint_name": "checkpoint_best.pth"}, "no fold_X/checkpoint_best.pth"),
    "shape": (crop_label, {}, r"case b of Dataset700_Small: the reference has the shape \(1, 11, 18, 20\)"),
    "damaged": (lambda d: (d / "imagesTr" / "b_0000.nii.gz").write_bytes(b"no image"), {},
                "SimpleITKIO cannot read .*b_0000.nii.gz"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_clear_and_leave_nothing(dataset: Path, tmp_path: Path, name: str) -> None:
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
