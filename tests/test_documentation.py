"""Links, anchors, commands and flags in the README and in documentation/ are those that are there."""
import importlib
import re
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "documentation").rglob("*.md")),
         *sorted((ROOT / "benchmarks").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def commands(text: str) -> list[list[str]]:
    """The words of all command lines in bash blocks, those of one command together."""
    lines = "".join(block for language, block in FENCE.findall(text) if language in ("bash", "sh"))
    found = []
    for line in lines.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\|", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"(export|\w+=.*)", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch):
    """Builds the parser of a command for these words, and parses them or not."""
    def parse(words: list[str], whole: bool) -> ArgumentParser:
        module = importlib.import_module(f"nnunet_transplant.cli.{words[0].removeprefix('nnunet_transplant_')}")
        known = []

        def run_command(parser: ArgumentParser, work: object) -> None:
            known.append(parser)
            if whole:
                parser.parse_args()
        monkeypatch.setattr(module, "run_command", run_command, raising=False)
        monkeypatch.setattr("sys.argv", words)
        module.main()
        return known[0]
    return parse


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands(page: Path, parse, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole commands in blocks are what their parsers take; scripts are there."""
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0].startswith("nnunet_transplant_") and words[0] != "nnunet_transplant_trainers":
            if "soft_median" in words:  # the reader's own method
                continue
            if "..." in words:
                check_flags(words, parse)
                continue
            try:
                parse(words, whole=True)
            except SystemExit as end:
                assert end.code == 0, f"{' '.join(words)}: {capsys.readouterr().err}"
        elif words[0] == "python" and words[1] != "-m":
            assert (ROOT / words[1]).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags(page: Path, parse) -> None:
    """In sentences a command has the flags that it is shown with."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for code in re.findall(r"`(nnunet_transplant_\w+ [^`]+)`", text):
        words = shlex.split(code)
        if "-h" in words:
            continue
        check_flags(words, parse)


def check_flags(words: list[str], parse) -> None:
    flags = parse(words, whole=False)._option_string_actions
    for word in words[1:]:
        assert not re.match(r"--?[a-z]", word) or word in flags, " ".join(words)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python write help in another way")
@pytest.mark.parametrize("name", ["commands.md", "front_door.md"])
def test_generated_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "documentation")
    made = importlib.import_module("generate").pages()[name]
    assert (ROOT / "documentation" / "reference" / name).read_text(encoding="utf-8") == made, \
        "run: python documentation/generate.py"
