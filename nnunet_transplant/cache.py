"""What takes long and does not change, kept in a folder: files of tensors, named by the hash of what they depend on."""
import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

from nnunet_transplant.environment import versions
from nnunet_transplant.files import atomic_path

T = TypeVar("T")


class Cache:
    """A folder of results that several merges share, one after the other or at the same time. An entry is whole or not
    there; one that cannot be read is made anew.

    Results are what `torch.load` reads without trust: tensors and numbers in dictionaries, lists and tuples.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def kept(self, what: str, depends: Iterable[object], make: Callable[[], T]) -> T:
        """What make() gave when it was asked the last time with the same dependencies (which are known by how they
        print) and versions, or gives now."""
        described = json.dumps([what, *map(str, depends), versions()], sort_keys=True)
        path = self.folder / f"{what}_{hashlib.sha256(described.encode()).hexdigest()[:32]}.pt"
        if path.is_file():
            try:
                found: T = torch.load(path, map_location="cpu", weights_only=True)
                os.utime(path)  # the oldest are those that nobody uses
                return found
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError):
                path.unlink(missing_ok=True)
        made = make()
        with atomic_path(path) as temporary:
            torch.save(made, temporary)
        return made
