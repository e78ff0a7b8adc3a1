"""What a merging method declares, once: the command line, its validation, merge.json and the documentation read it."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nnunet_transplant.errors import TransplantError


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: a number in [low, high] (a whole number where the default is one), or one of
    `choices`."""
    name: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> type:
        return type(self.default)

    def check(self, value: Any) -> Any:
        if self.choices:
            if value not in self.choices:
                raise TransplantError(f"-{self.name} must be one of {', '.join(self.choices)}, not "
                                      f"{str(value)[:40]}")
            return value
        try:
            value = self.kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise TransplantError(f"-{self.name} must be a number, not {str(value)[:40]}") from error
        if not self.low <= value <= self.high:  # also refuses NaN
            raise TransplantError(f"-{self.name} must lie between {self.low:g} and {self.high:g}, not "
                                  f"{str(value)[:40]}")
        return value


@dataclass(frozen=True)
class WeightsRule:
    """What the numbers given to -weights must be, and what they are where none are given."""
    text: str
    check: Callable[[Sequence[float]], None]
    default: Callable[[int], float]


@dataclass(frozen=True)
class Method:
    """A merging method: a pure function from tensors to a tensor.

    merge(tensors, state, **parameters) gives the merged tensor; tensors is a `Tensors`. Where the method acts entry by
    entry (by_entry), it is given blocks of tensors, else whole ones.
    prepare(vectors, **parameters), where a method has it, sees the whole networks first (a `TaskVectors`); what it
    returns is the state given to merge. Methods with needs_data are given the `Calibration` volumes too:
    prepare(vectors, calibration, **parameters).

    align, where a method has it, comes first: align(models, calibration, **parameters) (`alignment.methods`) puts the
    models into common units; then the method that its parameter `then` names merges them.
    """
    name: str
    summary: str
    reference: str
    merge: Callable[..., torch.Tensor]
    weights_rule: WeightsRule
    needs_base: bool = True
    needs_data: Literal["", "volumes", "labels"] = ""
    by_entry: bool = False
    max_models: int | None = None
    parameters: tuple[Parameter, ...] = ()
    prepare: Callable[..., Any] | None = None
    align: Callable[..., Any] | None = None

    @property
    def needs(self) -> list[str]:
        """In words what the method needs beside the models."""
        data = {"": [], "volumes": ["unlabelled volumes"], "labels": ["labelled volumes"]}
        return ["the base"] * self.needs_base + data[self.needs_data]

    def check_models(self, models: int, volumes_given: bool) -> None:
        """Raise TransplantError unless the method can merge so many models, and has the data it needs."""
        if self.max_models is not None and models > self.max_models:
            raise TransplantError(f"method {self.name} merges at most {self.max_models} models, not {models}")
        if self.align is not None and models < 2:
            raise TransplantError(f"method {self.name} aligns models with each other: it needs at least two")
        if self.needs_data and not volumes_given:
            raise TransplantError(f"method {self.name} needs volumes to look at: give -d DATASET")

    def weights(self, given: Sequence[float] | None, models: int) -> list[float]:
        """One weight for each model. Raises TransplantError for a wrong number of them or a rule they break."""
        weights = [self.weights_rule.default(models)] * models if given is None else [float(w) for w in given]
        if len(weights) != models:
            raise TransplantError(f"-weights has {len(weights)} numbers for {models} models")
        if not all(-1e6 < w < 1e6 for w in weights):
            raise TransplantError("-weights must be finite numbers")
        self.weights_rule.check(weights)
        return weights

    def then(self, given: Mapping[str, Any]) -> "Method":
        """The method that merges: this one, or where it aligns, the one that its parameter `then` names."""
        if self.align is None:
            return self
        choosable = "then" in {parameter.name for parameter in self.parameters}
        return find(str(given.get("then", "average")) if choosable else "average")

    def looks(self, given: Mapping[str, Any]) -> bool:
        """Whether it, or the method that comes then, needs volumes."""
        return bool(self.needs_data or self.then(given).needs_data)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters, also those of the method that comes then, checked, the defaults filled in. Raises
        TransplantError for one that neither has."""
        known = {parameter.name: parameter for method in (self, self.then(given)) for parameter in method.parameters}
        for name in given:
            if name not in known:
                raise TransplantError(f"method {self.name} has no -{name} (it has: "
                                      f"{', '.join('-' + other for other in known) or 'no parameters'})")
        return {name: parameter.check(given.get(name, parameter.default)) for name, parameter in known.items()}


    def own(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the settings that are this method's."""
        return {parameter.name: settings[parameter.name] for parameter in self.parameters}


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    METHODS[method.name] = method
    return method


def markdown_table() -> str:
    """All methods as documentation/methods.md lists them."""
    columns = ("method", "what it does", "needs", "weights", "parameters", "source")
    rows = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for method in METHODS.values():
        parameters = "<br>".join(f"`-{p.name}` {_text(p.default)}: {p.help}" for p in method.parameters)
        needs = ", ".join(method.needs) + f" (at most {method.max_models} models)" * (method.max_models is not None)
        rows.append(f"| `{method.name}` | {method.summary} | {needs} | {method.weights_rule.text} | {parameters} | "
                    f"{method.reference} |")
    return "\n".join(rows)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def find(name: str) -> Method:
    if name not in METHODS:
        raise TransplantError(f"there is no merging method '{name[:40]}'; choose from {', '.join(METHODS)}")
    return METHODS[name]


def _sum_to_one(weights: Sequence[float]) -> None:
    if abs(sum(weights) - 1) > 1e-4:
        raise TransplantError(f"-weights must sum to 1 for this method, these sum to {sum(weights):g}")


def _shares(weights: Sequence[float]) -> None:
    if min(weights) < 0 or abs(sum(weights) - 1) > 1e-4:
        raise TransplantError("-weights must not be negative for this method, and sum to 1")


def _not_negative(weights: Sequence[float]) -> None:
    if min(weights) < 0 or sum(weights) <= 0:
        raise TransplantError("-weights must not be negative for this method, and not all zero")


def any_weights(weights: Sequence[float]) -> None:
    pass


def _one_over_t(models: int) -> float:
    return 1 / models


def _one(_: int) -> float:
    return 1.0


SUM_TO_ONE = WeightsRule("sum to 1, default 1/T", _sum_to_one, _one_over_t)
SHARES = WeightsRule("not negative, sum to 1, default 1/T", _shares, _one_over_t)
RATIOS = WeightsRule("not negative, only their ratios count, default equal", _not_negative, _one_over_t)
FREE_MEAN = WeightsRule("free, default 1/T", any_weights, _one_over_t)
FREE_SUM = WeightsRule("free, default 1", any_weights, _one)

LAMBDA = Parameter("lambda", 1.0, "scale of the merged task vector", -10.0, 10.0)
SEED = Parameter("seed", 0, "seed of the random choices", 0, 2 ** 31 - 1)
