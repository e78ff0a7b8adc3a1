"""How to merge, as data: what a command line asks for, what merge.json records, what a recipe file says."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnunet_transplant.alignment import ALIGNERS, Aligner
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.fitting import FITS, Fit
from nnunet_transplant.methods import METHODS, Method
from nnunet_transplant.steps import Step, did_you_mean, option_name
from nnunet_transplant.volumes import N_CASES, Volumes

FORMAT = 1  # of recipes in files

Settings = dict[str, dict[str, Any]]  # step -> all of its options


@dataclass(frozen=True)
class Recipe:
    """Align, merge, fit: the steps by name, and everything they need to know but the models.

    weights: one for each model folder; its folds share it equally. None: the method's own default.
    parameters: options of the steps, by name: `density`, or of one step alone `ties.density`, which goes before.
    align: None for models with a common base. fit: what comes after the merge, in this order.
    volumes: that the steps may look at.
    keep_base_for, stage_weights: what stays at theta_0, and factors by stage: see `stages.scales`.
    share: shell patterns of the tensors that models share in the end; the others are their own. None: all are merged.
    same_channels: image channels that are called differently are the same.
    """
    method: str = "average"
    weights: Sequence[float] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    align: str | None = None
    fit: Sequence[str] = ()
    volumes: Volumes | None = None
    keep_base_for: Sequence[str] = ()
    stage_weights: Sequence[float] | None = None
    share: Sequence[str] = ()
    same_channels: bool = False

    @property
    def aligner(self) -> Aligner | None:
        return None if self.align is None else ALIGNERS.find(self.align)

    @property
    def merging(self) -> Method:
        return METHODS.find(self.method)

    @property
    def fits(self) -> list[Fit]:
        return [FITS.find(name) for name in self.fit]

    @property
    def steps(self) -> list[Step]:
        """In their order. Raises TransplantError for names that are none."""
        aligner = self.aligner
        steps = [*([] if aligner is None else [aligner]), self.merging, *self.fits]
        names = [step.name for step in steps]
        if len(set(names)) < len(names):
            raise TransplantError(f"each step comes once, not {', '.join(names)}")
        return steps

    @property
    def looking(self) -> list[Step]:
        """The steps that need volumes."""
        return [step for step in self.steps if step.looks]

    @property
    def reads_labels(self) -> bool:
        """Whether one of the steps reads the label maps of the volumes."""
        settings = self.settings()
        return any(step.reads_labels(settings[step.name]) for step in self.steps)

    def settings(self) -> Settings:
        """All options of every step, checked, the defaults filled in. Raises TransplantError for what no step has."""
        known = {step.name: {parameter.name: parameter for parameter in step.parameters} for step in self.steps}
        for name in self.parameters:
            step, _, own = name.rpartition(".")
            if own not in known.get(step, {}) if step else not any(name in parameters for parameters in known.values()):
                raise TransplantError(f"{_in_words(list(known))} no -{name[:40]}{_perhaps(name, known)}")
        return {step: {name: parameter.check(self.parameters.get(f"{step}.{name}", self.parameters.get(
            name, parameter.default))) for name, parameter in parameters.items()}
            for step, parameters in known.items()}

    def given(self, parameters: Mapping[str, Any]) -> "Recipe":
        """The same with these options, which go before those that it has; `lambda_` is lambda."""
        parameters = {option_name(name): value for name, value in parameters.items()}
        kept = {name: value for name, value in self.parameters.items() if name.rpartition(".")[2] not in parameters}
        return replace(self, parameters={**kept, **parameters})

    @property
    def looked_at(self) -> Volumes | None:
        """The volumes, with the number of patches where nobody said one: what the steps want."""
        if self.volumes is None or self.volumes.n_patches is not None:
            return self.volumes
        return replace(self.volumes, n_patches=max(step.n_patches for step in self.steps))

    def as_steps_want(self) -> "Recipe":
        """The same; where the number of patches is what its steps want, nobody has said it: others may want more."""
        if self.volumes is None:
            return self
        unsaid = replace(self, volumes=replace(self.volumes, n_patches=None))
        return unsaid if unsaid.looked_at == self.volumes else self

    def in_full(self) -> "Recipe":
        """The same with every option of every step written out."""
        written = {f"{step}.{name}": value for step, options in self.settings().items()
                   for name, value in options.items()}
        return replace(self, volumes=self.looked_at, parameters=written)

    def to_json(self) -> dict[str, Any]:
        volumes = None if self.volumes is None else {
            "datasets": list(self.volumes.datasets), "cases": self.volumes.cases, "n_cases": self.volumes.n_cases,
            "n_patches": self.volumes.n_patches}
        return {"format": FORMAT, "align": self.align, "method": self.method, "fit": list(self.fit),
                "parameters": dict(self.parameters), "weights": _listed(self.weights), "volumes": volumes,
                "keep_base_for": list(self.keep_base_for), "stage_weights": _listed(self.stage_weights),
                "share": list(self.share), "same_channels": self.same_channels}

    @staticmethod
    def from_json(content: Mapping[str, Any], source: str) -> "Recipe":
        """What is not said is as by default. Raises TransplantError that names the source for what is no recipe."""
        def wrong(what: str) -> TransplantError:
            return TransplantError(f"{source} is no recipe: {what}")

        if not isinstance(content, dict):
            raise wrong("it is not a JSON object")
        if content.get("format", FORMAT) != FORMAT:
            raise wrong(f"it has format {str(content['format'])[:20]}, this version reads format {FORMAT}")
        known = {"format", *KEYS}
        unknown = next((key for key in content if key not in known), None)
        if unknown is not None:
            raise wrong(f"nobody knows '{str(unknown)[:40]}'{did_you_mean(unknown, known)}")
        said = {key: value for key, value in content.items() if key != "format"}
        for key, value in said.items():
            if not KEYS[key](value):
                raise wrong(f"'{key}' cannot be {str(value)[:60]}")
        volumes = said.pop("volumes", None)
        recipe = Recipe(**said)
        if volumes is not None:
            recipe = replace(recipe, volumes=Volumes(**volumes))
        try:
            recipe.settings()
        except TransplantError as error:
            raise wrong(str(error)) from error
        return recipe


def _listed(numbers: Sequence[float] | None) -> list[float] | None:
    return None if numbers is None else list(numbers)


def _in_words(steps: Sequence[str]) -> str:
    return f"{steps[0]} has" if len(steps) == 1 else f"{', '.join(steps[:-1])} and {steps[-1]} have"


def _perhaps(name: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """What the steps have instead, and which steps have it."""
    has = sorted({option for parameters in known.values() for option in parameters})
    own = name.rpartition(".")[2]
    others = [step.name for registry in (ALIGNERS, METHODS, FITS) for step in registry.values()
              if step.name not in known and own in {parameter.name for parameter in step.parameters}]
    elsewhere = f"; {', '.join(others)} {'has' if len(others) == 1 else 'have'} it" if others else ""
    listed = ", ".join(f"-{option}" for option in has)
    return f"{did_you_mean(name, has)}" + (f": options are {listed}" if has else ": there are no options") + elsewhere


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2 ** 63)


def _are(is_one: Any) -> Any:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


def _or_none(is_one: Any) -> Any:
    return lambda value: value is None or is_one(value)


def _is_parameters(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_text(each) or _is_number(each) for each in value.values())


def _are_volumes(value: Any) -> bool:
    return bool(isinstance(value, dict) and set(value) <= {"datasets", "cases", "n_cases", "n_patches"}
            and value.get("datasets") and _are(lambda one: _is_text(one) or type(one) is int)(value["datasets"])
            and _or_none(_is_text)(value.get("cases")) and type(value.get("n_cases", N_CASES)) is int
                and (value.get("n_patches") is None or type(value["n_patches"]) is int))


# What recipes in files may say, and what is right there.
KEYS = {"align": _or_none(_is_text), "method": _is_text, "fit": _are(_is_text), "parameters": _is_parameters,
        "weights": _or_none(_are(_is_number)), "volumes": _or_none(_are_volumes), "keep_base_for": _are(_is_text),
        "stage_weights": _or_none(_are(_is_number)), "share": _are(_is_text),
        "same_channels": lambda value: isinstance(value, bool)}
