"""Write the pages that say what the code says: every command's -h, and the docstrings of `import nnunet_transplant`.

    python documentation/generate.py
"""
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from importlib.metadata import distribution
from pathlib import Path
from unittest.mock import patch

import nnunet_transplant

HERE = Path(__file__).parent / "reference"

def main() -> None:
    for name, content in pages().items():
        (HERE / name).write_text(content, encoding="utf-8")


def pages() -> dict[str, str]:
    return {"commands.md": commands(), "front_door.md": front_door()}


def commands() -> str:
    """The help of every command, 100 columns wide."""
    parts = ["# Commands\n\nFor users of the command line: what every command says with `-h`. Made by `python "
             "documentation/generate.py`.\n"]
    for command in distribution("nnunet_transplant").entry_points:
        said = io.StringIO()
        with (patch.object(sys, "argv", [command.name, "-h"]), patch.dict(os.environ, COLUMNS="100"),
              redirect_stdout(said), suppress(SystemExit)):
            command.load()()
        parts.append(f"## {command.name}\n\n```text\n{said.getvalue().strip()}\n```\n")
    return "\n".join(parts)


def front_door() -> str:
    """The signature and the docstring of everything that `nnunet_transplant` has."""
    parts = ["# The Python front door\n\nFor users of `import nnunet_transplant`: what each name takes, gives and "
             "raises. [Examples](python.md). Made by `python documentation/generate.py`.\n"]
    for name in nnunet_transplant.__all__:
        thing = getattr(nnunet_transplant, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or not (said := inspect.getdoc(thing)):
            continue
        head = signature(name, thing) if inspect.isfunction(thing) else f"class {name}"
        parts.append(f"## {name}\n\n```text\n{head}\n\n{said}\n```\n")
    return "\n".join(parts)


def signature(name: str, function: Callable) -> str:
    """Without the modules of types, and without defaults that are objects or depend on the machine."""
    text = re.sub(r"\b(pathlib|typing|os|collections\.abc|nnunet_transplant(\.\w+)*)\.", "",
                  f"{name}{inspect.signature(function)}")
    text = re.sub(r"(Plan|Recipe)\([^()]*(\(\)[^()]*)*\)", r"\1()", text)
    text = re.sub(r"(num_processes: int = )\d+", r"\1nnU-Net's", text)
    text = re.sub(r"<function ([\w.<>]+) at \w+>", r"\1", text)
    return "\n".join(textwrap.wrap(text, 100, subsequent_indent="    ", break_long_words=False))


if __name__ == "__main__":
    main()
