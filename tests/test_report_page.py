"""The page about a merged model: sound HTML that stands alone, with the numbers of the files it was made of."""
import base64
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from factory import base_network, write_model
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunet_transplant.cli.report import main
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import write_merge
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.report_page import ANALYSES, read_scores, write_report

HOSTILE = """a<b>&"c"'d'$x$ {{ 7 * 7 }}{% raw %} </td><script>"""
VOID = {"meta", "link", "img", "br", "wbr"}


class Page(HTMLParser):
    """Every element with its attributes and text; fails on a tag that is not closed, or not in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict, list[str]]] = []
        self.elements: list[tuple[str, dict, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(dict(attrs)) == len(attrs)
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        opened, attrs, text = self.open.pop()
        assert opened == tag, f"<{opened}> closed by </{tag}>"
        self.elements.append((tag, attrs, "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag: str) -> list[tuple[dict, str]]:
        return [(attrs, text) for name, attrs, text in self.elements if name == tag]

    @property
    def text(self) -> str:
        return self.all("body")[0][1]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks, merged; to be copied where a test changes it."""
    root = tmp_path_factory.mktemp("models")
    return merge(root, {"liver": 1}, {"left_kidney": 1, "spleen": 2})


def merge(root: Path, *labels: dict, per_fold: bool = False) -> Path:
    base = base_network()
    folds = ("0", "1") if per_fold else ("0",)
    models = [root / f"task_{i}" for i in range(len(labels))]
    for i, (model, of_task) in enumerate(zip(models, labels, strict=True)):
        for fold in folds:
            write_model(model, {"background": 0, **of_task}, base=base, seed=10 * i + int(fold), fold=fold, axes=(0, 2))
    write_merge(merge_folders(models, recipe=Recipe("ties", parameters={"density": 0.25}), per_fold=per_fold),
                root / "merged")
    return root / "merged"


def write_evaluation(folder: Path, models: list[str], structures: list[str], cases: int = 5) -> pd.DataFrame:
    """As nnunet_transplant_evaluate leaves it; each model but the first lacks the first structure."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    frame = pd.DataFrame([(model, structure, f"case_{case}", rng.random()) for i, model in enumerate(models)
                          for structure in structures[min(i, 1):] for case in range(cases)],
                         columns=["model", "structure", "case", "dice"])
    frame.loc[3, "dice"] = np.nan
    frame.to_csv(folder / "evaluation.csv", index=False)
    (folder / "table.txt").write_text("Dice on Dataset700_Small, fold 0 (5 cases)\n\nstructure\nnote: heart not "
                                      "scored\n\nDice per case\n\ncase\n")
    for name in ("dice.png", "overlays.png"):
        write_figure(folder / name)
    return frame


def write_figure(path: Path, size: tuple[float, float] = (1.5, 1)) -> None:
    figure = Figure(figsize=size, dpi=50)
    figure.text(0.1, 0.5, path.name)
    figure.savefig(path)


def write_analysis(folder: Path) -> Path:
    folder.mkdir()
    (folder / "table.txt").write_text("  stage  a<b & c\n  1      0.25\n")
    (folder / "result.json").write_text("{}")
    write_figure(folder / "one.png")
    write_figure(folder / "two.png", (1, 2))
    return folder


@pytest.fixture
def everything(merged: Path, tmp_path: Path) -> tuple[Page, pd.DataFrame, Path]:
    """A page of all there can be, the scores in it, and the folder that its parts are in."""
    frame = write_evaluation(tmp_path / "evaluation", ["merged", "expert"], ["liver", "spleen", "left_kidney"])
    analyses = {kind: write_analysis(tmp_path / kind) for kind in ANALYSES}
    write_report(merged, tmp_path / "report.html", [tmp_path / "evaluation"], analyses)
    return Page((tmp_path / "report.html").read_text()), frame, tmp_path


def test_the_page_stands_alone(everything: tuple) -> None:
    page, _, _ = everything
    assert not page.all("script") and not page.all("iframe")
    for tag, attrs, _ in page.elements:
        assert not {name for name in attrs if name.startswith("on")}
        for name in ("src", "href"):
            if name in attrs:
                assert attrs[name].startswith(("data:", "#")), (tag, attrs[name])
    (_, style), = page.all("style")
    assert "url(" not in style and "@import" not in style and "http" not in style
    policy, = (attrs["content"] for attrs, _ in page.all("meta") if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_page_can_be_read_by_everybody(everything: tuple) -> None:
    page, _, folder = everything
    assert page.all("html")[0][0] == {"lang": "en"}
    assert [attrs for attrs, _ in page.all("meta") if attrs.get("name") == "viewport"]
    assert len(page.all("h1")) == len(page.all("title")) == len(page.all("main")) == 1
    assert len(page.all("h2")) == len(page.all("section")) == len(page.all("li")) == 3 + len(ANALYSES)
    ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert {attrs["href"] for attrs, _ in page.all("a")} == {f"#{name}" for name in ids if name.startswith("s")}
    assert all(attrs["aria-labelledby"] in ids for attrs, _ in page.all("section"))
    captions = [text for _, text in page.all("caption")]
    assert len(captions) == len(page.all("table")) and all(captions)
    assert all(attrs["scope"] in ("row", "col") for attrs, _ in page.all("th"))
    regions = [attrs for attrs, _ in page.all("div")]
    assert len({attrs["aria-label"] for attrs in regions}) == len(regions)
    assert all(attrs["tabindex"] == "0" for attrs in regions)
    images = [attrs for attrs, _ in page.all("img")]
    files = [folder / "evaluation" / name for name in ("dice.png", "overlays.png")]
    files += [folder / kind / name for kind in ANALYSES for name in ("one.png", "two.png")]
    assert len(images) == len(files) == len(page.all("figcaption"))
    for attrs, file in zip(images, files, strict=True):
        kind, _, data = attrs["src"].partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == file.read_bytes()
        assert file.name in attrs["alt"] and file.parent.name in attrs["alt"]
        height, width, _ = imread(file).shape
        assert (attrs["width"], attrs["height"]) == (str(width), str(height))


def test_colours_have_enough_contrast(merged: Path, tmp_path: Path) -> None:
    """WCAG 2's ratio, at least 4.5 for text, on the page and on the bands of tables."""
    def luminance(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    write_report(merged, tmp_path / "report.html")
    (_, style), = Page((tmp_path / "report.html").read_text()).all("style")
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", scheme))
               for scheme in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(schemes) == 3  # light, dark and print
    for colours in schemes:
        for text in ("ink", "soft", "link"):
            for ground in ("paper", "band"):
                low, high = sorted([luminance(colours[text]), luminance(colours[ground])])
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def rows(text: str, caption: str) -> list[list[str]]:
    """The cells of a table of the page, by its caption."""
    table = next(part for part in text.split("<table")[1:] if f"<caption>{caption}" in part.replace("<wbr>", ""))
    return [[cell for tag, _, cell in Page(row).elements if tag in ("th", "td")]
            for row in re.findall("<tr>.*?</tr>", table.partition("</table>")[0], re.DOTALL)]


def test_scores_are_those_of_the_csv(everything: tuple) -> None:
    page, frame, folder = everything
    text = (folder / "report.html").read_text()
    head, *found = rows(text, "Mean Dice over the cases, evaluation")
    assert head == ["structure", "merged", "expert"]
    dice: dict[tuple, list[float]] = {}
    for row in frame.itertuples():
        dice.setdefault((row.structure, row.model), []).append(row.dice)
    means = {key: sum(v for v in values if v == v) / sum(v == v for v in values) for key, values in dice.items()}
    expected = [[structure, *(f"{means[structure, model]:.4f}" if (structure, model) in means else "-"
                              for model in ("merged", "expert"))] for structure in ("liver", "spleen", "left_kidney")]
    expected.append(["mean of 2", *(f"{(means['spleen', model] + means['left_kidney', model]) / 2:.4f}"
                                    for model in ("merged", "expert"))])
    assert found == expected
    best = [max(cells[1:]) for cells in expected]
    assert [bold for _, bold in page.all("strong")] == best
    assert "Dice on Dataset700_Small, fold 0 (5 cases)" in [text for _, text in page.all("h3")]
    assert "heart not scored" in page.text
    assert "No model of this evaluation" not in page.text


def test_names_that_pandas_would_take_for_nothing(tmp_path: Path) -> None:
    frame = write_evaluation(tmp_path / "evaluation", ["NA", "null"], ["nan", "None"])
    pd.testing.assert_frame_equal(read_scores(tmp_path / "evaluation"), frame)


def test_long_names_of_models_are_numbered(merged: Path, tmp_path: Path) -> None:
    names = [f"Dataset90{i}_Task__nnUNetTrainerTaskVector" for i in range(3)]
    write_evaluation(tmp_path / "evaluation", names, ["liver", "spleen"])
    write_report(merged, tmp_path / "report.html", [tmp_path / "evaluation"])
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert rows(text, "Mean Dice")[0] == ["structure", "[1]", "[2]", "[3]"]
    assert [f"[{i}] {name}" for i, name in enumerate(names, 1)] == [item for _, item in page.all("li")][-3:]
    assert "No model of this evaluation is called merged" in page.text


def test_provenance_is_that_of_merge_json(merged: Path, tmp_path: Path) -> None:
    record = json.loads((merged / "merge.json").read_text())
    write_report(merged, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    fold = record["folds"]["all"]
    head, *found = rows(text, "Inputs")
    assert head == ["", "path", "fold", "weight", "structures", "SHA-256"]
    assert found == [[str(i), each["path"], each["fold"], f"{each['weight']:g}", ", ".join(each["structures"]),
                      each["sha256"]] for i, each in enumerate(fold["inputs"], 1)]
    facts = dict(rows(text, "How it was merged"))
    step, = fold["steps"]
    assert facts["step"] == f"ties: {step['summary']}"
    assert facts["reference"] == f"{step['reference']}, {step['url']}" and step["url"].startswith("https://")
    assert (facts["density"], facts["trim"]) == ("0.25", "vector")
    assert facts["theta_0 (SHA-256)"] == fold["theta_0_sha256"]
    assert dict(rows(text, "Versions")) == record["versions"]
    assert rows(text, "Structures")[1:] == [
        ["liver", "1", "liver", "Dataset700_Small"], ["left_kidney", "2", "left_kidney", "Dataset700_Small"],
        ["spleen", "3", "spleen", "Dataset700_Small"]]
    model = dict(rows(text, "The model"))
    assert (model["configuration"], model["trainer"], model["test-time mirroring"]) == (
        "3d_fullres", "nnUNetTrainer", "axes 0, 2")
    assert "An nnU-Net model, merged from 2 models by ties." in page.text


def test_whatever_a_merge_found_is_shown(merged: Path, tmp_path: Path) -> None:
    folder = copy_of(merged, tmp_path)
    recipe = read_fold(folder)["recipe"]
    steps = [{"name": name, "summary": f"what {name} does", "reference": f"who made {name}", "url": f"https://{name}"}
             for name in ("of_old", "of_tomorrow", "polish")]
    edit_fold(folder, base="/models/base", steps=steps, found={
        "alpha": 0.5, "sweeps": 3, "coefficients": {f"tensor_{i}": [0.1, 0.2] for i in range(50)}},
        volumes={"Dataset004_X": ["case_1", "case_2"]}, device="cpu", recipe=recipe | {
            "align": "of_old", "method": "of_tomorrow", "fit": ["polish"], "weights": [0.75, 0.25],
            "parameters": {"of_old.units": "zip", "of_tomorrow.density": 0.5, "polish.steps": 20, "polish.lr": 0.002},
            "keep_base_for": ["*norm*"], "stage_weights": [1.0, 0.5], "share": ["encoder.*"],
            "volumes": {"datasets": [4], "n_cases": 2, "cases": "train:0"}})
    write_report(folder, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    found = rows(text, "How it was merged")
    facts = dict(found)
    assert facts | {"found: coefficients": ""} == facts | {
        "base given": "/models/base", "weights given": "0.75, 0.25",
        "left at theta_0": "*norm*", "weights of the stages": "1, 0.5", "tensors shared": "encoder.*",
        "found: alpha": "0.5", "found: sweeps": "3",
        "volumes of Dataset004_X": "case_1, case_2", "volumes asked for": "2", "chosen from": "train:0",
        "looked at on": "cpu", "found: coefficients": ""}
    assert found[:10] == [  # each step with its own options
        ["step", "of_old: what of_old does"], ["reference", "who made of_old, https://of_old"], ["units", "zip"],
        ["step", "of_tomorrow: what of_tomorrow does"], ["reference", "who made of_tomorrow, https://of_tomorrow"],
        ["density", "0.5"],
        ["step", "polish: what polish does"], ["reference", "who made polish, https://polish"],
        ["steps", "20"], ["lr", "0.002"]]
    (_, folded), = Page(text).all("details")
    assert "characters" in folded and "tensor_49" in folded
    assert "An nnU-Net model, merged from 2 models by of_old + of_tomorrow + polish." in Page(text).text


def test_each_fold_has_its_provenance(tmp_path: Path) -> None:
    folder = merge(tmp_path, {"liver": 1}, {"spleen": 1}, per_fold=True)
    write_report(folder, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert [heading for _, heading in page.all("h3")] == ["Fold 0", "Fold 1"]
    assert "in 2 folds" in page.text
    for fold in ("0", "1"):
        assert [row[2] for row in rows(text, f"Inputs, fold {fold}")[1:]] == [fold, fold]
    assert len([key for key, _ in rows(text, "The model") if key.startswith("SHA-256 of fold_")]) == 2


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    folder = merge(tmp_path / "models", {HOSTILE: 1}, {"spleen": 1})
    moved = folder.rename(tmp_path / HOSTILE.replace("/", "|"))
    fold = read_fold(moved)
    edit_fold(moved, steps=[fold["steps"][0] | {"name": "hostile", "reference": HOSTILE}],
              recipe=fold["recipe"] | {"parameters": {f"hostile.{HOSTILE}": HOSTILE}})
    write_evaluation(tmp_path / "evaluation<i>", [HOSTILE, "b&amp;"], [HOSTILE, "<i>spleen"])
    analysis = write_analysis(tmp_path / "inter$x<i>")
    (analysis / "one.png").rename(analysis / "\"'<i>$.png")
    (analysis / "table.txt").write_text(HOSTILE)
    write_report(moved, tmp_path / "report.html", [tmp_path / "evaluation<i>"], {"interference": analysis})
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script") and not page.all("b") and not page.all("i")
    assert page.all("h1")[0][1] == page.all("title")[0][1] == f"Merged model {moved.name}"
    assert page.all("pre")[0][1] == HOSTILE
    assert page.text.count(HOSTILE) >= 7
    assert [text for _, text in page.all("li")][-2:] == [f"[1] {HOSTILE}", "[2] b&amp;"]
    alts = [attrs["alt"] for attrs, _ in page.all("img")]
    assert alts[0].startswith("evaluation<i>, dice.png") and "inter$x<i>, \"'<i>$.png" in alts[2]


def test_bytes_that_are_no_text(merged: Path, tmp_path: Path) -> None:
    folder = copy_of(merged, tmp_path)
    record = json.loads((folder / "merge.json").read_text())
    record["folds"]["all"]["inputs"][0]["path"] = "/models/\udcff/checkpoint.pth"
    (folder / "merge.json").write_text(json.dumps(record))
    analysis = write_analysis(tmp_path / "flatness")
    (analysis / "table.txt").write_bytes(b"\xff 1")
    write_report(folder, tmp_path / "report.html", analyses={"flatness": analysis})
    assert "\\udcff" in Page((tmp_path / "report.html").read_text()).text


@pytest.mark.parametrize("left", ["table.txt", "one.png"])
def test_a_table_or_a_figure_is_enough(merged: Path, tmp_path: Path, left: str) -> None:
    analysis = write_analysis(tmp_path / "sweep")
    for path in analysis.iterdir():
        if path.name != left:
            path.unlink()
    write_report(merged, tmp_path / "report.html", analyses={"sweep": analysis})
    page = Page((tmp_path / "report.html").read_text())
    assert (len(page.all("pre")), len(page.all("img"))) == ((1, 0) if left == "table.txt" else (0, 1))
    assert ANALYSES["sweep"].reading in page.text


def test_the_same_inputs_give_the_same_page(merged: Path, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        write_report(merged, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


# What goes wrong

def copy_of(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def read_fold(folder: Path) -> dict:
    return json.loads((folder / "merge.json").read_text())["folds"]["all"]


def edit_fold(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "merge.json").read_text())
    record["folds"]["all"] |= changes
    (folder / "merge.json").write_text(json.dumps(record))


def write_shared_record(folder: Path) -> None:
    (folder / "merge.json").write_text(json.dumps({"models": ["A_fold_0", "B_fold_0"]}))


def drop_input_path(folder: Path) -> None:
    record = json.loads((folder / "merge.json").read_text())
    del record["folds"]["all"]["inputs"][1]["path"]
    (folder / "merge.json").write_text(json.dumps(record))


ERRORS = {
    "no folder": (lambda d: shutil.rmtree(d / "copy"), {}, "there is no folder .*copy"),
    "not merged": (lambda d: (d / "copy" / "merge.json").unlink(), {},
                   "copy is not a merged model: it has no merge.json"),
    "no JSON": (lambda d: (d / "copy" / "merge.json").write_text("{"), {}, "merge.json"),
    "no folds": (lambda d: (d / "copy" / "merge.json").write_text("{}"), {}, "merge.json is not the record of a merge"),
    "no path": (lambda d: drop_input_path(d / "copy"), {}, "merge.json is not the record of a merge"),
    "odd fold": (lambda d: edit_fold(d / "copy", inputs=7), {}, "merge.json is not the record of a merge"),
    "shared": (lambda d: write_shared_record(d / "copy"), {},
               "copy holds several models side by side, .* to -m: .*copy/A_fold_0, .*copy/B_fold_0"),
    "no checkpoint": (lambda d: shutil.rmtree(d / "copy" / "fold_all"), {},
                      "is not complete: it has no fold_all/checkpoint_final.pth"),
    "no evaluation": (lambda d: None, {"evaluations": ["nowhere"]}, "nowhere is not an evaluation: it has no "),
    "another CSV": (lambda d: (d / "evaluation" / "evaluation.csv").write_text("a,b\n1,2\n"), {},
                    "evaluation.csv is not as nnunet_transplant_evaluate writes it"),
    "empty CSV": (lambda d: (d / "evaluation" / "evaluation.csv").write_text(""), {}, "is not as"),
    "no number": (lambda d: (d / "evaluation" / "evaluation.csv").write_text("model,structure,case,dice\na,b,c,d\n"),
                  {}, "is not as"),
    "binary CSV": (lambda d: (d / "evaluation" / "evaluation.csv").write_bytes(bytes(range(256))), {}, "is not as"),
    "no analysis": (lambda d: None, {"analyses": {"flatness": "nowhere"}}, "there is no folder .*nowhere"),
    "nothing in it": (lambda d: [path.unlink() for path in (d / "sweep").iterdir() if path.suffix != ".json"], {},
                      "sweep holds nothing to show: neither a table.txt nor a .png"),
    "no PNG": (lambda d: (d / "sweep" / "one.png").write_bytes(b"<svg>"), {}, "one.png is not a PNG image"),
    "a folder": (lambda d: (d / "report.html").mkdir(), {"overwrite": True}, "is a folder: give a file to -o"),
    "exists": (lambda d: (d / "report.html").write_text("mine"), {}, "exists already"),
    "not ours": (lambda d: (d / "report.html").write_text("mine"), {"overwrite": True}, "is no report"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_clear_and_leave_nothing(merged: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(merged, tmp_path)
    write_evaluation(tmp_path / "evaluation", ["merged"], ["liver"])
    write_analysis(tmp_path / "sweep")
    spoil, options, message = ERRORS[name]
    spoil(tmp_path)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    options = {"evaluations": ["evaluation"], "analyses": {"sweep": "sweep"}, **options}
    options["evaluations"] = [tmp_path / name for name in options["evaluations"]]
    options["analyses"] = {kind: tmp_path / name for kind, name in options["analyses"].items()}
    with pytest.raises(TransplantError, match=message) as caught:
        write_report(folder, tmp_path / "report.html", **options)
    assert "\n" not in str(caught.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_earlier_report_is_replaced_whole_or_not_at_all(merged: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "report.html"
    write_report(merged, output)
    first = output.read_bytes()
    analyses = {"sweep": write_analysis(tmp_path / "sweep")}
    with monkeypatch.context() as patch:
        write = Path.write_text

        def full(path: Path, text: str, **options: object) -> None:
            write(path, text[:100], **options)
            raise OSError("no space left on device")

        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="no space"):
            write_report(merged, output, analyses=analyses, overwrite=True)
    assert output.read_bytes() == first and len(list(tmp_path.iterdir())) == 2
    write_report(merged, output, analyses=analyses, overwrite=True)
    assert output.read_bytes() != first


def test_the_command(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture) -> None:
    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["nnunet_transplant_report", *map(str, arguments)])
        main()

    write_evaluation(tmp_path / "evaluation", ["merged"], ["liver"])
    analyses = {kind: write_analysis(tmp_path / kind) for kind in ANALYSES}
    write_report(merged, tmp_path / "called.html", [tmp_path / "evaluation"], analyses)
    options = [argument for kind, folder in analyses.items() for argument in (f"-{kind}", folder)]
    run("-m", merged, "-evaluation", tmp_path / "evaluation", *options, "-o", tmp_path / "command.html")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'command.html'}: open it in any browser\n"
    assert (tmp_path / "command.html").read_bytes() == (tmp_path / "called.html").read_bytes()
    with pytest.raises(SystemExit) as left:
        run("-m", tmp_path, "-o", tmp_path / "other.html")
    assert left.value.code == 1
    assert capsys.readouterr().err == (f"nnunet_transplant_report: error: {tmp_path} is not a merged model: it has no "
                                       "merge.json\n")
