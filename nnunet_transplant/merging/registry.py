"""What a merging method declares, once: the command line, its validation, merge.json and the documentation read it."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nnunet_transplant.errors import TransplantError


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: a number in [low, high], or one of `choices`."""
    name: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> Any:
        if self.choices:
            if value not in self.choices:
                raise TransplantError(f"-{self.name} must be one of {', '.join(self.choices)}, not {value}")
        elif not self.low <= value <= self.high:  # also refuses NaN
            raise TransplantError(f"-{self.name} must lie between {self.low:g} and {self.high:g}, not {value:g}")
        return value


@dataclass(frozen=True)
class Method:
    """A merging method: a pure function from tensors to a tensor.

    merge(theta_0, thetas, weights, state, **parameters) gives the merged tensor. theta_0 (None unless needs_base) and
    the thetas are one tensor of the network from the base and from each model, in float32 and of one shape; weights
    has one number for each model.
    prepare(taus, **parameters), where a method has it, sees one whole task vector first (an iterable of its tensors)
    and returns what merge is given for it in the list `state`.
    """
    name: str
    summary: str
    reference: str
    merge: Callable[..., torch.Tensor]
    needs_base: bool
    weights_rule: str
    check_weights: Callable[[Sequence[float]], None]
    default_weight: Callable[[int], float]
    parameters: tuple[Parameter, ...] = ()
    prepare: Callable[..., Any] | None = None

    def weights(self, given: Sequence[float] | None, models: int) -> list[float]:
        """One weight for each model. Raises TransplantError for a wrong number of them or a rule they break."""
        weights = [self.default_weight(models)] * models if given is None else [float(w) for w in given]
        if len(weights) != models:
            raise TransplantError(f"-weights has {len(weights)} numbers for {models} models")
        if not all(-1e6 < w < 1e6 for w in weights):
            raise TransplantError("-weights must be finite numbers")
        self.check_weights(weights)
        return weights

    def settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """All parameters, checked, the defaults filled in. Raises TransplantError for one the method does not have."""
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                raise TransplantError(f"method {self.name} has no -{name} (it has: "
                                      f"{', '.join('-' + other for other in known) or 'no parameters'})")
        return {name: parameter.check(given.get(name, parameter.default)) for name, parameter in known.items()}


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    METHODS[method.name] = method
    return method


def find(name: str) -> Method:
    if name not in METHODS:
        raise TransplantError(f"there is no merging method '{name}'; choose from {', '.join(METHODS)}")
    return METHODS[name]


def sum_to_one(weights: Sequence[float]) -> None:
    if abs(sum(weights) - 1) > 1e-4:
        raise TransplantError(f"-weights must sum to 1 for this method, these sum to {sum(weights):g}")


def not_negative(weights: Sequence[float]) -> None:
    if min(weights) < 0 or sum(weights) <= 0:
        raise TransplantError("-weights must not be negative for this method, and not all zero")


def any_weights(weights: Sequence[float]) -> None:
    pass


def uniform(models: int) -> float:
    return 1 / models


def one(_: int) -> float:
    return 1.0
