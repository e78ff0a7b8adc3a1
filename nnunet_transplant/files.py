"""Files and folders that are there whole or not at all, JSON that may come from anybody, and hashes."""
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nnunet_transplant.errors import TransplantError

MOST_TEXT = 10 * 2**20  # bytes of a pickle or of JSON: in memory it takes up to 70 times as many
DEEPEST = 64            # levels of JSON: Python's own limit is reached at some hundred, in whatever reads it later


def read_json(path: Path, kind: type = dict) -> Any:
    """As `parse_json`, of a file. Raises TransplantError where there is none, too."""
    if not path.is_file():
        raise TransplantError(f"there is no file {path}")
    with open(path, "rb") as file:
        return parse_json(file.read(MOST_TEXT + 1), str(path), kind)


def parse_json(text: bytes | str, source: str, kind: type = dict) -> Any:
    """A JSON object (or with kind `list` a list) that is neither too long nor nested too deep for whatever reads or
    writes it later. Raises TransplantError that names the source."""
    if len(text) > MOST_TEXT:
        raise TransplantError(f"{source} is too long: {len(text) >> 20} MB of JSON")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TransplantError(f"{source} is not valid JSON") from error
    if not isinstance(content, kind):
        raise TransplantError(f"{source} holds no JSON {'object' if kind is dict else 'list'}")
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [value for node in level if isinstance(node, (dict, list))
                 for value in (node.values() if isinstance(node, dict) else node)]
    if level:
        raise TransplantError(f"{source} is nested too deep")
    return content


def check_output(output: Path, inputs: Sequence[Path | str], overwrite: bool, marker: str, what: str) -> None:
    """Raise TransplantError unless a folder may be written here: it is new or empty, or `overwrite` is set and it is
    one of ours, which have a file `marker`; and it holds none of the inputs."""
    if any(output.resolve() in (Path(path).resolve(), *Path(path).resolve().parents) for path in inputs):
        raise TransplantError(f"{output} is one of the models, or holds one: give another -o")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise TransplantError(f"{output} exists already; give another -o, or --overwrite to replace it")
    if not (output / marker).is_file():
        raise TransplantError(f"{output} is not {what} (it has no {marker}): --overwrite replaces nothing else")


@contextmanager
def atomic_path(path: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary name beside `path` to write a file or a folder to; renamed to `path` at the end, or removed.

    A file replaces an existing one. A folder does so only with `replace`: of two writers of the same folder one wins
    whole, the other gets a TransplantError. What a killed process left of the same target is cleared away first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.old.{os.getpid()}.tmp")
    renamed = False
    try:
        yield temporary
        try:
            if replace and path.is_dir():
                os.rename(path, old)
            os.rename(temporary, path)
            renamed = True
        except OSError as error:
            if old.exists() and not path.exists():
                os.rename(old, path)
            if path.is_dir() or (replace and isinstance(error, FileNotFoundError)):
                raise TransplantError(f"{path} was written by somebody else in the meantime") from error
            raise
    finally:
        _remove(temporary)
        if renamed or path.exists():  # else the old one is the last; a path renamed to may have been replaced again
            _remove(old)


def _clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a target; what one had already moved aside to replace comes back."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_running(left):
            continue
        if left.name.startswith(f".{path.name}.old.") and not path.exists():
            os.rename(left, path)
        else:
            _remove(left)


def _is_running(temporary: Path) -> bool:
    """Whether the process that writes to this temporary name still exists."""
    owner = temporary.name.removesuffix(".tmp").rpartition(".")[2]
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
