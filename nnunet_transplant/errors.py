"""The one exception this package raises for input a user can mend, and the notes it makes beside its results."""
import warnings


class TransplantError(ValueError):
    """What is wrong and where, in words a user of nnU-Net understands. The commands print it and exit with 1."""


class TransplantNote(UserWarning):
    """What a user should know, though nothing is wrong. Commands print it as `note: ...`."""


def note(message: str) -> None:
    warnings.warn(message, TransplantNote, stacklevel=3)
