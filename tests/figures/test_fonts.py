"""Names in any script: fonts of the machine draw what matplotlib's own lacks, and what none has is said once."""
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager, get_font
from matplotlib.image import imread
from matplotlib.text import Text

from nnunet_transplant.errors import TransplantNote
from nnunet_transplant.figures import fonts
from nnunet_transplant.figures.common import save_figure

BUNDLED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
NOBODY = "\U0001f9e0\U000131e4"  # a brain, a hieroglyph


def characters(file: str) -> set[str]:
    return {chr(code) for code in get_font(str(BUNDLED / file)).get_charmap()}


# what STIX's font has and DejaVu Sans, the default, has not: it stands for a font of another script
RARE = "".join(sorted(character for character in characters("STIXGeneral.ttf") - characters("DejaVuSans.ttf")
                      if character.isalpha()))[:3]


regular_fonts, add_new_fonts = fonts._regular_fonts, fonts._add_new_fonts.__wrapped__  # which the fixture replaces


@pytest.fixture(autouse=True)
def fonts_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Family -> file, whatever this machine has; what was found is forgotten before and after."""
    listed = {"cmr10": str(BUNDLED / "cmr10.ttf"), "STIXGeneral": str(BUNDLED / "STIXGeneral.ttf"),
              "gone": str(BUNDLED / "gone.ttf")}
    monkeypatch.setattr(fonts, "_regular_fonts", lambda: listed)
    monkeypatch.setattr(fonts, "_add_new_fonts", lambda: False)
    monkeypatch.setattr(fonts, "_told", False)
    fonts._search.cache_clear()
    yield listed
    fonts._search.cache_clear()


def figure_of(*names: str) -> Figure:
    figure = Figure(figsize=(3, 2))
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.set_title(names[0])
    figure.legend([axes.plot([0, 1], label="line")[0]], [names[-1]])
    return figure


def test_texts_take_from_a_font_that_has_all_and_others_stay() -> None:
    assert len(RARE) == 3
    figure = figure_of("Liver", RARE)
    fonts.add_fallback_fonts(figure)
    families = {text.get_text(): text.get_fontfamily() for text in figure.findobj(Text) if text.get_text()}
    assert families[RARE] == [*families["Liver"], "STIXGeneral"]


def test_they_are_drawn(tmp_path: Path) -> None:
    """Not as the box that stands for what is missing, which is the same for all characters."""
    drawn = []
    for i, name in enumerate(RARE[:2]):
        save_figure(figure_of(name), tmp_path / f"{i}.png")
        drawn.append(imread(tmp_path / f"{i}.png"))
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)


def test_what_no_font_has_is_said_once_and_in_no_other_words(tmp_path: Path) -> None:
    with pytest.warns(TransplantNote, match="no font on this machine has the characters") as caught:
        save_figure(figure_of("Liver", RARE + NOBODY), tmp_path / "one.png")
    assert len(caught) == 1 and all(character in str(caught[0].message) for character in NOBODY)
    assert not any(character in str(caught[0].message) for character in RARE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure_of(NOBODY), tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_names_that_the_default_font_has_cost_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_families", None)  # not to be called
    save_figure(figure_of("Liver", "Прямая кишка", "λ é ß", "two\nlines"), tmp_path / "plain.png")


def test_fonts_that_were_installed_since_are_looked_for(fonts_of_the_machine: dict[str, str],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    file = fonts_of_the_machine.pop("STIXGeneral")

    def install() -> bool:
        fonts_of_the_machine["STIXGeneral"] = file
        return True
    monkeypatch.setattr(fonts, "_add_new_fonts", install)
    assert fonts._search(frozenset(RARE)) == (["STIXGeneral"], "")


def test_fonts_are_added_once_and_damaged_ones_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    (tmp_path / "new.ttf").write_bytes((BUNDLED / "STIXGeneral.ttf").read_bytes())
    files = [str(path) for path in tmp_path.iterdir()]
    monkeypatch.setattr(fonts, "findSystemFonts", lambda: files)
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
    assert add_new_fonts()
    assert [entry.fname for entry in fontManager.ttflist if entry.fname in files] == [str(tmp_path / "new.ttf")]
    assert not add_new_fonts()


def test_sans_and_regular_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [entry(name, file, **more) for name, file, more in (
        ("Script", "script", {}), ("B Sans", "bold", {"weight": 700}), ("B Sans", "slanted", {"style": "italic"}),
        ("B Sans", "regular", {}), ("Only Sans Bold", "only", {"weight": 700}), ("A Serif", "serif", {}),
        ("A Sans", "sans", {}), ("Last Resort High-Efficiency", "boxes", {}))]
    for order in (listed, listed[::-1]):
        monkeypatch.setattr(fontManager, "ttflist", order)
        assert list(regular_fonts().items()) == [("A Sans", "sans"), ("B Sans", "regular"), ("Only Sans Bold", "only"),
                                                 ("Script", "script"), ("A Serif", "serif")]


def test_of_equals_the_preferred_and_no_more_than_needed(fonts_of_the_machine: dict[str, str]) -> None:
    files = {**fonts_of_the_machine}
    fonts_of_the_machine.clear()
    fonts_of_the_machine.update({"first": files["STIXGeneral"], "second": files["STIXGeneral"], **files})
    assert fonts._search(frozenset(RARE)) == (["first"], "")


def test_a_font_without_the_normal_weight_is_used_in_silence(
        tmp_path: Path, fonts_of_the_machine: dict[str, str], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    odd = entry("Odd", fonts_of_the_machine.pop("STIXGeneral"), weight=500)
    fonts_of_the_machine["Odd"] = odd.fname
    monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist, odd])
    figure = figure_of(RARE)
    save_figure(figure, tmp_path / "odd.png")
    assert "Odd" in figure.axes[0].title.get_fontfamily() and not caplog.records


def entry(name: str, file: str, style: str = "normal", weight: int = 400) -> FontEntry:
    return FontEntry(fname=file, name=name, style=style, variant="normal", weight=weight, stretch="normal",
                     size="scalable")
