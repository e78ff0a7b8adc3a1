"""The one exception this package raises for input a user can mend, and the notes it makes beside its results."""
import warnings


class TransplantError(ValueError):
    """What is wrong and where, in words a user of nnU-Net understands. The commands print it and exit with 1."""


class TransplantNote(UserWarning):
    """What a user should know, though nothing is wrong. Commands print it as `note: ...`."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so, of Python's, CUDA's, MPS's or the CPU's memory."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said))


def note(message: str) -> None:
    warnings.warn(message, TransplantNote, stacklevel=3)
