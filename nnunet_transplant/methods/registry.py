"""What a merging method declares: a pure function from tensors to a tensor."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.steps import IN_WORDS, Needs, Passes, Range, Registry, Step, read_signature


@dataclass(frozen=True)
class WeightsRule:
    """What the numbers given to -weights must be, and what they are where none are given."""
    text: str
    check: Callable[[Sequence[float]], None]
    default: Callable[[int], float]


@dataclass(frozen=True)
class Method(Step):
    """A merging method. by_entry: it acts entry by entry, so that blocks of tensors will do. strangers: it takes one
    model whole, whose `weights` it finds, so that models need not have a base in common."""
    weights_rule: WeightsRule
    by_entry: bool
    max_models: int | None
    strangers: bool

    @property
    def needs_base(self) -> bool:
        return "base" in self.needs

    def weights(self, given: Sequence[float] | None, models: int) -> list[float]:
        """One weight for each model. Raises TransplantError for a wrong number of them or a rule they break."""
        weights = [self.weights_rule.default(models)] * models if given is None else [float(w) for w in given]
        if len(weights) != models:
            raise TransplantError(f"-weights has {len(weights)} numbers for {models} models")
        if not all(-1e6 < w < 1e6 for w in weights):
            raise TransplantError("-weights must be finite numbers")
        self.weights_rule.check(weights)
        return weights


METHODS: Registry[Method] = Registry("merging method", "nnunet_transplant.methods", [
    ("tensors",), ("vectors",), ("vectors", "experts")])

F = TypeVar("F", bound=Callable[..., Any])


def method(name: str, summary: str, *, reference: str, url: str, weights: WeightsRule, needs: Sequence[Needs] = (),
           by_entry: bool = False, max_models: int | None = None, strangers: bool = False,
           passes: Passes | None = None,
           labels_when: tuple[str, str] | None = None) -> Callable[[F], F]:
    """Make a function a merging method: `-method name` on the command line.

    The function takes `tensors` (a `Tensors`: one tensor of every model, float32) and gives the merged tensor; or it
    takes `vectors` (a `TaskVectors`: whole networks) and, where it needs volumes, `experts` (an `Experts`), and gives
    such a function. Its options are its annotated parameters (see `steps`). Heads are joined by the weights, or by
    `weights` that it found (see `steps.Found`).
    """
    def declare(function: F) -> F:
        METHODS.add(Method(name, summary, reference, url, function, *read_signature(function), tuple(needs),
                           weights, by_entry, max_models, strangers, passes=passes, labels_when=labels_when))
        return function
    return declare


def needs_in_words(step: Step) -> str:
    return ", ".join(IN_WORDS[need] for need in step.needs)


def _sum_to_one(weights: Sequence[float]) -> None:
    if abs(sum(weights) - 1) > 1e-4:
        raise TransplantError(f"-weights must sum to 1 for this method, these sum to {sum(weights):g}")


def _convex(weights: Sequence[float]) -> None:
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-4:
        raise TransplantError("-weights must not be negative for this method, and sum to 1")


def _not_negative(weights: Sequence[float]) -> None:
    if min(weights) < 0 or sum(weights) <= 0:
        raise TransplantError("-weights must not be negative for this method, and not all zero")


def _equal(weights: Sequence[float]) -> None:
    if len(set(weights)) > 1:
        raise TransplantError("-weights say nothing to this method: leave them out")


def any_weights(weights: Sequence[float]) -> None:
    pass


def _one_over_t(models: int) -> float:
    return 1 / models


SUM_TO_ONE = WeightsRule("sum to 1, default 1/T", _sum_to_one, _one_over_t)
CONVEX = WeightsRule("not negative, sum to 1, default 1/T", _convex, _one_over_t)
RATIOS = WeightsRule("not negative, only their ratios count, default equal", _not_negative, _one_over_t)
EQUAL = WeightsRule("none", _equal, _one_over_t)
FREE_MEAN = WeightsRule("free, default 1/T", any_weights, _one_over_t)
FREE_SUM = WeightsRule("free, default 1", any_weights, lambda models: 1.0)

Lambda = Annotated[float, "scale of the merged task vector", Range(-10.0, 10.0)]
