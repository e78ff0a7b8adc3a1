"""The three steps of a merge (align, merge, fit) as data: what a step declares, once, and where steps are found.

A step is one decorated function. Those of its parameters that are annotated with what they say are options:

    density: Annotated[float, "share of the entries that trimming keeps", Range(0.0, 1.0)] = 0.2
    trim: Annotated[Literal["vector", "tensor"], "trim over the whole task vector, or in each tensor"] = "vector"

The command line, its validation, recipes and the documentation read them from there. The other parameters are inputs:
the merger hands them over by name. The underscore behind a word of Python is no part of an option's name (lambda_ is
-lambda).
"""
import difflib
import inspect
import keyword
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from nnunet_transplant.errors import TransplantError, note

N_PATCHES = 32      # of all volumes together that a step looks at, unless told
MANY_PATCHES = 64   # that it learns from in many steps, which gain less from the same ones again and again

Needs = Literal["base", "volumes", "labels"]
Passes = Callable[[Any, Mapping[str, Any]], float]
IN_WORDS = {"base": "the base", "volumes": "unlabelled volumes", "labels": "labelled volumes"}


class Range(NamedTuple):
    """What a number may be, both ends included."""
    low: float
    high: float


class Found(NamedTuple):
    """What a step makes, with what it found out on the way, for merge.json. A step may return one, or the bare
    result."""
    result: Any
    found: dict[str, Any]


def with_found(returned: Any) -> Found:
    return returned if isinstance(returned, Found) else Found(returned, {})


@dataclass(frozen=True)
class Parameter:
    """An option of a step: a number in [low, high] (a whole number where the default is one), or one of `choices`."""
    name: str
    default: Any
    help: str
    range: Range | None = None
    choices: tuple[str, ...] = ()

    @property
    def kind(self) -> type:
        return type(self.default)

    @property
    def allowed(self) -> str:
        """In words."""
        if self.range is None:
            return "|".join(self.choices)
        return f"{self.range.low:.10g} to {self.range.high:.10g}"

    def check(self, value: Any) -> Any:
        """The value as what it should be; numbers may be text. Raises TransplantError for what is not allowed."""
        if self.range is None:
            if value not in self.choices:
                raise TransplantError(f"-{self.name} must be one of {', '.join(self.choices)}, not "
                                      f"{str(value)[:40]}{did_you_mean(value, self.choices)}")
            return value
        kind = "a whole number" if self.kind is int else "a number"
        try:
            number = self.kind(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise TransplantError(f"-{self.name} must be {kind}, not {str(value)[:40]}") from error
        if self.kind is int and isinstance(value, float) and value != number:
            raise TransplantError(f"-{self.name} must be {kind}, not {str(value)[:40]}")
        if not self.range.low <= number <= self.range.high:  # also refuses NaN
            raise TransplantError(f"-{self.name} must lie between {self.range.low:.10g} and {self.range.high:.10g}, "
                                  f"not {str(value)[:40]}")
        return number


@dataclass(frozen=True)
class Step:
    """An aligner, a merging method or a fit.

    inputs: what the function wants of the merger, by name. needs: what must be there beside the models.
    passes: about how many forward passes of a network over a patch it takes, of an `Experts` and its options.
    n_patches: how many patches it wants of all volumes together, where nobody says.
    labels_when: an option and its value with which it reads the label maps of volumes, where it does not always.
    """
    name: str
    summary: str
    reference: str
    url: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    needs: tuple[Needs, ...]
    passes: Passes | None = field(default=None, kw_only=True)
    labels_when: tuple[str, str] | None = field(default=None, kw_only=True)
    n_patches: int = field(default=N_PATCHES, kw_only=True)

    @property
    def looks(self) -> bool:
        """Whether it needs volumes."""
        return "volumes" in self.needs or "labels" in self.needs

    def reads_labels(self, settings: Mapping[str, Any]) -> bool:
        option, value = self.labels_when or ("", None)
        return "labels" in self.needs or (self.labels_when is not None and settings[option] == value)

    def call(self, settings: Mapping[str, Any], **inputs: Any) -> Found:
        """The function, of those of the inputs that it wants."""
        return with_found(self.function(**{name: inputs[name] for name in self.inputs}, **arguments(settings)))


def option_name(name: str) -> str:
    """Of a parameter of a function; `lambda_` is lambda, `ties.lambda_` ties.lambda."""
    bare = name.removesuffix("_")
    return bare if keyword.iskeyword(bare.rpartition(".")[2]) else name


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options as Python writes them."""
    return {f"{name}_" if keyword.iskeyword(name) else name: value for name, value in settings.items()}


def read_signature(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[Parameter, ...]]:
    """Inputs and options of a step's function. Raises TypeError for one that does not declare itself fully: it is a
    mistake of whoever wrote it."""
    hints = typing.get_type_hints(function, include_extras=True)
    inputs, parameters = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints.get(name)) is not Annotated:
            inputs.append(name)
            continue
        kind, *said = typing.get_args(hints[name])
        ranges = [each for each in said if isinstance(each, Range)]
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        texts = [each for each in said if isinstance(each, str)]
        if parameter.default is parameter.empty or len(texts) != 1 or bool(choices) == bool(ranges) or (
                ranges and kind not in (int, float)):
            raise TypeError(f"{function.__name__}: {name} needs a default, a text that says what it is, and an int or "
                            "float with a Range, or a Literal of its choices")
        default = parameter.default
        if kind is float and type(default) is int:
            default = float(default)
        if type(default) is not (kind if ranges else str):
            raise TypeError(f"{function.__name__}: the default of {name} is not of its kind")
        parameters.append(Parameter(option_name(name), default, texts[0], ranges[0] if ranges else None, choices))
        parameters[-1].check(default)
    return tuple(inputs), tuple(parameters)


S = TypeVar("S", bound=Step)


class Registry(Mapping[str, S], Generic[S]):
    """The steps of one kind by name: our own, and those of installed packages that declare an entry point of the
    group, such as `mine = my_package.merging:mine` under nnunet_transplant.methods. A package that cannot be loaded is
    a note, and the others are there."""

    def __init__(self, what: str, group: str, inputs: Sequence[tuple[str, ...]]) -> None:
        self.what, self.group, self._allowed = what, group, inputs
        self._steps: dict[str, S] = {}
        self._loaded = False

    def add(self, step: S) -> None:
        """Raises ValueError for a name that is taken, and for inputs that nobody gives: mistakes of its author."""
        if step.inputs not in self._allowed:
            raise ValueError(f"{self.what} {step.name} takes {', '.join(step.inputs) or 'nothing'}: it may take "
                             + ", or ".join(" and ".join(names) for names in self._allowed))
        taken = self._steps.get(step.name)
        if taken is not None and (taken.function.__module__, taken.function.__qualname__) != (
                step.function.__module__, step.function.__qualname__):
            raise ValueError(f"there is a {self.what} {step.name} already")
        self._steps[step.name] = step

    def find(self, name: str) -> S:
        """Raises TransplantError for a name that is none."""
        if name not in self:
            raise TransplantError(f"there is no {self.what} '{str(name)[:40]}'{did_you_mean(name, self)}; choose from "
                                  f"{', '.join(self)}")
        return self[name]

    def _all(self) -> dict[str, S]:
        if not self._loaded:
            self._loaded = True
            for point in entry_points(group=self.group):
                try:
                    point.load()
                except Exception as error:  # whatever another package's import raises
                    note(f"the {self.what} {point.name} of {point.value} cannot be loaded ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]})")
        return self._steps

    def __getitem__(self, name: str) -> S:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """What was perhaps meant, as the end of a message."""
    close = difflib.get_close_matches(str(name), list(known), 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


Seed = Annotated[int, "seed of the random choices", Range(0, 2 ** 31 - 1)]
