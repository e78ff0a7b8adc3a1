"""Other fonts of the machine for characters that matplotlib's own lacks: names of structures may be in any script."""
import logging
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text

from nnunet_transplant.errors import note

_told = False  # one note is enough, however many figures


def add_fallback_fonts(figure: Figure) -> None:
    """Let each text take from other fonts what its own lacks. Notes once what no font has."""
    global _told
    lacking = {text: characters for text in figure.findobj(Text) if (characters := _lacking(text))}
    if not lacking:
        return
    families, rest = _search(frozenset().union(*lacking.values()))
    for text in lacking:
        text.set_fontfamily([*text.get_fontfamily(), *families])
    if rest and not _told:
        _told = True
        shown = rest if len(rest) <= 30 else f"{rest[:27]}..."
        note(f"no font on this machine has the characters '{shown}': figures show boxes for them. Install a font that "
             "has them, such as one of the Noto fonts (Noto Sans CJK for Chinese, Japanese and Korean)")


@contextmanager
def without_remarks() -> Iterator[None]:
    """Silence matplotlib on glyphs that are missing (said already, in words that help) and on weights: a font may have
    another than the normal one only."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            yield
    finally:
        logger.setLevel(level)


def _lacking(text: Text) -> set[str]:
    """What of a text its own fonts lack and a reader would see, so no line breaks or joiners (category C)."""
    characters = {character for character in text.get_text()
                  if not character.isascii() and unicodedata.category(character)[0] != "C"}
    for family in text.get_fontfamily() if characters else ():
        characters -= _characters(findfont(FontProperties(family=[family])))
    return characters


@cache
def _characters(path: str) -> set[str]:
    return set(map(chr, get_font(path).get_charmap()))


@cache
def _search(wanted: frozenset[str]) -> tuple[list[str], str]:
    """Few families that have the characters, and the characters that none has."""
    families, rest = _families(wanted)
    if rest and _add_new_fonts():
        families, rest = _families(wanted)
    return families, "".join(sorted(rest))


def _families(wanted: frozenset[str]) -> tuple[list[str], frozenset[str]]:
    """First the family with most of the characters, then the one with most of the rest, and so on."""
    having = {}
    for family, path in _regular_fonts().items():
        with suppress(OSError, RuntimeError):  # gone or damaged since it was listed
            charmap = get_font(path).get_charmap()
            having[family] = {character for character in wanted if ord(character) in charmap}
    families, rest = [], wanted
    while any(characters & rest for characters in having.values()):
        shares = {family: len(characters & rest) for family, characters in having.items()}
        best = max(shares, key=shares.__getitem__)  # of equals the first, which is preferred
        families.append(best)
        rest -= having[best]
    return families, rest


def _regular_fonts() -> dict[str, str]:
    """Family -> file of its most regular font, the one that matplotlib takes for texts like ours. What to prefer comes
    first, in the same order each time."""
    listed = [entry for entry in fontManager.ttflist
              if "lastresort" not in entry.name.replace(" ", "").lower()  # has boxes for all characters there are
              and getattr(entry, "index", 0) == 0]  # of a collection the first, which has the characters of all
    fonts: dict[str, str] = {}
    for entry in sorted(listed, key=_preference):
        fonts.setdefault(entry.name, entry.fname)
    return fonts


def _preference(entry: FontEntry) -> tuple[int, float, str, str]:
    """The lower the better: sans, then regular ones."""
    name = entry.name.lower()
    irregular = (fontManager.score_style("normal", entry.style) + fontManager.score_weight("normal", entry.weight)
                 + fontManager.score_stretch("normal", entry.stretch))
    return ("sans" not in name) + ("serif" in name or "mono" in name), irregular, entry.name, entry.fname


@cache
def _add_new_fonts() -> bool:
    """Whether there are fonts that were installed since matplotlib made its list, which it keeps from run to run."""
    before = len(fontManager.ttflist)
    for path in sorted({*findSystemFonts()} - {entry.fname for entry in fontManager.ttflist}):
        with suppress(Exception):  # it is no font that matplotlib can use, such as one of bitmaps
            fontManager.addfont(path)
    return len(fontManager.ttflist) > before
