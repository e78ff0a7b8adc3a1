"""What a fit declares: what comes after a merge, towards what the experts say of a few images."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nnunet_transplant.steps import N_PATCHES, Needs, Passes, Registry, Step, read_signature


@dataclass(frozen=True)
class Fit(Step):
    """A fit: merged tensors in, better ones out."""


FITS: Registry[Fit] = Registry("fit", "nnunet_transplant.fits", [
    ("merged", "experts"), ("merged", "experts", "vectors")])

F = TypeVar("F", bound=Callable[..., Any])


def fit(name: str, summary: str, *, reference: str, url: str,
        needs: Sequence[Needs] = ("volumes",), passes: Passes | None = None,
        n_patches: int = N_PATCHES) -> Callable[[F], F]:
    """Make a function a fit: `-fit name` on the command line.

    The function takes `merged` (tensors by canonical name) and `experts` (an `Experts`), and gives such tensors. It may
    take `vectors`, too (a `TaskVectors`): the models as they were merged, beside their base, or beside their mean where
    they were aligned or their base is not known. Its options are its annotated parameters (see `steps`).
    """
    def declare(function: F) -> F:
        FITS.add(Fit(name, summary, reference, url, function, *read_signature(function), tuple(needs), passes=passes,
                     n_patches=n_patches))
        return function
    return declare
