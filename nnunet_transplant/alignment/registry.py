"""What an aligner declares: it says which unit of one model is which of the others, and puts them into common units."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from nnunet_transplant.steps import Needs, Passes, Registry, Step, read_signature


@dataclass(frozen=True)
class Aligner(Step):
    """An aligner. mean_only: with which settings nothing but the plain mean of what it makes is a network."""
    mean_only: Callable[[Mapping[str, Any]], bool]


ALIGNERS: Registry[Aligner] = Registry("aligner", "nnunet_transplant.aligners", [("experts",), ("experts", "merge")])

F = TypeVar("F", bound=Callable[..., Any])


def aligner(name: str, summary: str, *, reference: str, url: str, needs: Sequence[Needs] = (),
            mean_only: Callable[[Mapping[str, Any]], bool] = lambda settings: False,
            passes: Passes | None = None,
            labels_when: tuple[str, str] | None = None) -> Callable[[F], F]:
    """Make a function an aligner: `-align name` on the command line.

    The function takes `experts` (an `Experts`) and gives the tensors of each model, by canonical name, in common units:
    unit i of one belongs to unit i of the others. One that wants to try what comes of it takes `merge`, too: a function
    from such tensors to the merged ones. Its options are its annotated parameters (see `steps`).
    """
    def declare(function: F) -> F:
        ALIGNERS.add(Aligner(name, summary, reference, url, function, *read_signature(function), tuple(needs),
                             mean_only, passes=passes, labels_when=labels_when))
        return function
    return declare
