"""What every command shares: a parser whose help ends with an example, and one clear line for bad input."""
import argparse
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from nnunet_transplant.errors import TransplantError, TransplantNote


def command_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"nnunet_transplant_{name}", description=description, epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter)


def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Parse sys.argv, do the work, and turn what a user can mend into one message on stderr and exit status 1."""
    args = parser.parse_args()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", TransplantNote)
            warnings.showwarning = _show(warnings.showwarning)
            work(args)
    except BrokenPipeError:  # whoever read our output has left: nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (TransplantError, OSError) as error:
        _exit(f"{parser.prog}: error: {error}", 1)
    except KeyboardInterrupt:
        _exit(f"{parser.prog}: interrupted", 130)


def _show(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Warnings as Python shows them, but each note of ours once, as a line without the code that made it."""
    shown = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, TransplantNote):
            otherwise(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"note: {message}", file=sys.stderr)
    return show


def _exit(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)
