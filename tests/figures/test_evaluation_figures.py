"""The figures of an evaluation: bars of Dice, and overlays of the best, the median and the worst case."""
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from evaluated import random_model, read, run, write_dataset, write_json, write_volume
from factory import dice_frame, small_plans
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunet_transplant import evaluation
from nnunet_transplant.evaluation import shown_cases
from nnunet_transplant.figures import evaluation as drawing
from nnunet_transplant.figures.evaluation import Overlay, save_dice_figure, save_overlays_figure


@pytest.fixture
def dataset(tmp_path: Path, nnunet_folders: None) -> Path:
    return write_dataset(tmp_path)


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

    def export(prediction: object, ending: str, path: Path) -> np.ndarray:
        write_volume(path, said)
        return said[None]

    monkeypatch.setattr(evaluation, "_export", export)
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
