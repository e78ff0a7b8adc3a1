"""What every command shares: a parser whose help is in groups and ends with an example, flags that mean the same
everywhere, and one clear line for bad input."""
import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nnunet_transplant.errors import TransplantError, TransplantNote, out_of_memory
from nnunet_transplant.steps import did_you_mean


class Parser(argparse.ArgumentParser):
    """What is wrong is one line, and a flag that nobody knows may be one misspelt: -densty is not -d ensty."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What else argparse would take a flag for that it does not know, such as one that starts like it."""
        return []

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        if message.startswith("unrecognized") and unknown.startswith("-"):
            message = f"there is no option {unknown}{did_you_mean(unknown, self._option_string_actions)}"
        self.exit(2, f"{self.prog}: error: {message.removeprefix('the following ')}. {self.prog} -h says more\n")


def command_parser(name: str, description: str, example: str, usage: str | None = None) -> Parser:
    prog = f"nnunet_transplant_{name}"
    return Parser(prog=prog, description=description, epilog=f"example:\n  {example}", usage=usage, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)


# ---------------------------------------------------------------------------------------------------------------------
# Flags of several commands

def add_case_arguments(parser: argparse._ActionsContainer, what: str) -> None:
    """Labelled cases of one dataset. what: is done with them."""
    parser.add_argument("-d", required=True, metavar="DATASET",
                        help=f"name or id of the dataset whose cases are {what}")
    parser.add_argument("-f", default="0", metavar="FOLD",
                        help="its validation cases of this fold, or all for every case; default 0")
    parser.add_argument("-cases", metavar="FILE|train:K|val:K", help="these cases instead")
    parser.add_argument("-n_cases", type=int, metavar="N", help="so many of them, spread evenly")


def add_checkpoint_arguments(parser: argparse._ActionsContainer) -> None:
    from nnunet_transplant.model_folder import CHECKPOINT  # slow import: commands without models stay quick

    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load checkpoints that ask for more than weights; they can run code")


def add_device_argument(parser: argparse._ActionsContainer, what: str = "where networks run") -> None:
    parser.add_argument("-device", default="auto", metavar="auto|cuda|mps|cpu",
                        help=f"{what}; default auto: the first of CUDA, MPS and the CPU that is there")


def add_output_arguments(parser: argparse._ActionsContainer, what: str, metavar: str = "OUT",
                         earlier: str = "an earlier one") -> None:
    parser.add_argument("-o", type=Path, required=True, metavar=metavar, help=what)
    parser.add_argument("--overwrite", action="store_true", help=f"replace {earlier}")


# ---------------------------------------------------------------------------------------------------------------------
# Running

def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], None]) -> None:
    """Parse sys.argv, do the work, and turn what a user can mend into one message on stderr and exit status 1."""
    args = parser.parse_args()
    try:
        with notes_as_lines():
            work(args)
    except BrokenPipeError:  # whoever read our output has left: nothing to tell anybody
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (TransplantError, OSError) as error:
        _exit(f"{parser.prog}: error: {error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        _exit(f"{parser.prog}: error: memory ran out ({' '.join(str(error).split())[:200]}). -device cpu uses the "
              "machine's memory, where a GPU has too little", 1)
    except KeyboardInterrupt:
        _exit(f"{parser.prog}: interrupted{_left_behind(args)}", 130)


@contextmanager
def notes_as_lines() -> Iterator[None]:
    """Each note of ours once, as a line on stderr without the code that made it."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TransplantNote)
        warnings.showwarning = _show(warnings.showwarning)
        yield


def _show(otherwise: Callable[..., None]) -> Callable[..., None]:
    """Other warnings as Python shows them."""
    shown = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, TransplantNote):
            otherwise(message, category, *where, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"note: {message}", file=sys.stderr)
    return show


def _left_behind(args: argparse.Namespace) -> str:
    """What of an interrupted merge that looks at volumes is kept, or could have been."""
    if "cache" not in args or not args.d:
        return ""
    if args.cache is None:
        return "; with -cache DIR the same command would go on where it was"
    return f"; what was found out is in {args.cache}: the same command goes on from there"


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)
