"""What a step declares: its signature read into options and inputs; what an option may be; where steps are found."""
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from nnunet_transplant import steps
from nnunet_transplant.errors import TransplantError, TransplantNote
from nnunet_transplant.steps import (
    Found,
    Parameter,
    Range,
    Registry,
    Seed,
    Step,
    arguments,
    did_you_mean,
    read_signature,
    with_found,
)

Share = Annotated[float, "a share", Range(0.0, 1.0)]
Count = Annotated[int, "a count", Range(1, 9)]
Way = Annotated[Literal["this", "that"], "which way"]


def test_annotated_parameters_are_options_and_the_others_inputs() -> None:
    def step(first: list, second, share: Share = 0.25, count: Count = 3, way: Way = "that", lambda_: Share = 1.0,
             seed: Seed = 7) -> None: ...
    inputs, parameters = read_signature(step)
    assert inputs == ("first", "second")
    assert parameters == (
        Parameter("share", 0.25, "a share", Range(0.0, 1.0)), Parameter("count", 3, "a count", Range(1, 9)),
        Parameter("way", "that", "which way", None, ("this", "that")),
        Parameter("lambda", 1.0, "a share", Range(0.0, 1.0)),
        Parameter("seed", 7, "seed of the random choices", Range(0, 2 ** 31 - 1)))
    assert [parameter.kind for parameter in parameters] == [float, int, str, float, int]


def test_annotations_may_be_text() -> None:
    """As `from __future__ import annotations` makes them."""
    def step(tensors: "list", share: "Share" = 0.5) -> None: ...
    assert read_signature(step) == (("tensors",), (Parameter("share", 0.5, "a share", Range(0.0, 1.0)),))


def test_a_number_is_of_the_kind_that_is_said() -> None:
    def step(share: Share = 1) -> None: ...
    parameter = read_signature(step)[1][0]
    assert parameter.kind is float and type(parameter.default) is float and parameter.check("0.5") == 0.5


def test_only_words_of_python_lose_their_underscore() -> None:
    """What a function is called with has the names that it has."""
    def step(lambda_: Share = 0.1, class_: Count = 2, low_: Share = 0.3, _: Share = 0.4) -> dict:
        return {"lambda_": lambda_, "class_": class_, "low_": low_, "_": _}
    _, parameters = read_signature(step)
    assert [parameter.name for parameter in parameters] == ["lambda", "class", "low_", "_"]
    settings = {parameter.name: parameter.default for parameter in parameters}
    assert arguments(settings) == {"lambda_": 0.1, "class_": 2, "low_": 0.3, "_": 0.4}
    assert step_of(step).call(settings).result == arguments(settings)


def undeclared() -> list[Callable[..., Any]]:
    def no_default(share: Share) -> None: ...
    def no_text(share: Annotated[float, Range(0, 1)] = 0.5) -> None: ...
    def two_texts(share: Annotated[float, "one", "two", Range(0, 1)] = 0.5) -> None: ...
    def neither_range_nor_choices(share: Annotated[float, "a share"] = 0.5) -> None: ...
    def both(way: Annotated[Literal["this", "that"], "a way", Range(0, 1)] = "this") -> None: ...
    def no_number(name: Annotated[str, "a name", Range(0, 1)] = "x") -> None: ...
    def half_a_count(count: Count = 2.5) -> None: ...
    def no_share(share: Share = "half") -> None: ...
    def no_word(way: Annotated[Literal[1, 2], "a way"] = 1) -> None: ...
    return [no_default, no_text, two_texts, neither_range_nor_choices, both, no_number, half_a_count, no_share,
            no_word]


@pytest.mark.parametrize("function", undeclared(), ids=lambda function: function.__name__)
def test_what_is_not_fully_declared_is_a_mistake_of_its_author(function: Callable) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: .*(share|way|name|count)"):
        read_signature(function)


def test_a_default_is_allowed_itself() -> None:
    def too_large(share: Share = 2.0) -> None: ...
    def no_way(way: Way = "those") -> None: ...
    for function in (too_large, no_way):
        with pytest.raises(TransplantError):
            read_signature(function)


# ---------------------------------------------------------------------------------------------------------------------
# Options

SHARE = Parameter("share", 0.5, "a share", Range(0.0, 1.0))
COUNT = Parameter("count", 3, "a count", Range(1, 9))
WAY = Parameter("way", "this", "which way", None, ("this", "that"))


@pytest.mark.parametrize(("parameter", "value", "expected"), [
    (SHARE, 0, 0.0), (SHARE, 1.0, 1.0), (SHARE, "0.25", 0.25), (SHARE, "1e-3", 1e-3), (SHARE, np.float32(0.5), 0.5),
    (COUNT, 1, 1), (COUNT, "9", 9), (COUNT, 4.0, 4), (COUNT, np.int64(5), 5), (WAY, "that", "that")])
def test_what_is_allowed_comes_out_as_what_it_should_be(parameter: Parameter, value: Any, expected: Any) -> None:
    assert parameter.check(value) == expected and type(parameter.check(value)) is parameter.kind


@pytest.mark.parametrize(("parameter", "value", "message"), [
    (SHARE, -1e-9, "-share must lie between 0 and 1, not -1e-09"), (SHARE, 1.0001, "between 0 and 1"),
    (SHARE, math.nan, "between 0 and 1"), (SHARE, math.inf, "between 0 and 1"), (SHARE, "nan", "between 0 and 1"),
    (SHARE, "much", "-share must be a number, not much"), (SHARE, None, "must be a number"),
    (SHARE, [0.5], "must be a number"), (SHARE, 10 ** 400, "must be a number"), (SHARE, "x" * 999, "x{40}$"),
    (COUNT, 0, "-count must lie between 1 and 9, not 0"), (COUNT, 10, "between 1 and 9"),
    (COUNT, 2.5, "-count must be a whole number, not 2.5"), (COUNT, "2.5", "must be a whole number, not 2.5"),
    (COUNT, math.nan, "must be a whole number"), (COUNT, math.inf, "must be a whole number"),
    (WAY, "those", "-way must be one of this, that, not those"), (WAY, "thiss", r"\(did you mean this\?\)"),
    (WAY, 1, "must be one of"), (WAY, None, "must be one of"), (WAY, ["this"], "must be one of")])
def test_what_is_not_allowed_is_refused(parameter: Parameter, value: Any, message: str) -> None:
    with pytest.raises(TransplantError, match=message):
        parameter.check(value)


def test_large_limits_are_written_out() -> None:
    """-seed 0 to 2147483647, not 2.14748e+09."""
    seed = Parameter("seed", 0, "a seed", Range(0, 2 ** 31 - 1))
    assert seed.allowed == "0 to 2147483647" and WAY.allowed == "this|that" and SHARE.allowed == "0 to 1"
    with pytest.raises(TransplantError, match="between 0 and 2147483647"):
        seed.check(2 ** 31)


# ---------------------------------------------------------------------------------------------------------------------
# Steps, and where they are found

def step_of(function: Callable[..., Any], name: str = "mine", **more: Any) -> Step:
    return Step(name, "what it does", "whose", "https://example.org", function, *read_signature(function),
                **{"needs": (), **more})


def registry(**names: Callable[..., Any]) -> Registry[Step]:
    made: Registry[Step] = Registry("merging method", "nnunet_transplant.nothing", [("a",), ("a", "b")])
    for name, function in names.items():
        made.add(step_of(function, name))
    return made


def one(a: Any, share: Share = 0.5) -> Any:
    return a, share


def two(a: Any, b: Any, lambda_: Share = 0.5) -> Found:
    return Found((a, b, lambda_), {"seen": True})


def test_a_step_is_called_with_what_it_wants() -> None:
    assert step_of(one).call({"share": 0.1}, a=1, b=2) == Found((1, 0.1), {})
    assert step_of(two).call({"lambda": 0.1}, a=1, b=2, c=3) == Found((1, 2, 0.1), {"seen": True})
    assert with_found((1, 2)) == Found((1, 2), {})  # a tuple is a result, too


@pytest.mark.parametrize(("needs", "looks"), [((), False), (("base",), False), (("volumes",), True),
                                              (("base", "labels"), True)])
def test_steps_that_need_volumes_look(needs: tuple[str, ...], looks: bool) -> None:
    assert step_of(one, needs=needs).looks == looks


def test_a_registry_is_a_mapping_in_the_order_of_what_was_added() -> None:
    found = registry(ties=one, average=two)
    assert list(found) == ["ties", "average"] and len(found) == 2 and "ties" in found and "tie" not in found
    assert found.find("average") is found["average"] and found["ties"].function is one


@pytest.mark.parametrize(("name", "message"), [
    ("tie", r"^there is no merging method 'tie' \(did you mean ties\?\); choose from ties, average$"),
    ("verage", r"\(did you mean average\?\)"), ("magic", "^there is no merging method 'magic'; choose from"),
    ("", "choose from"), ("x" * 999, "'x{40}'; choose from")])
def test_a_name_that_is_none_is_told_from_those_there_are(name: str, message: str) -> None:
    with pytest.raises(TransplantError, match=message):
        registry(ties=one, average=two).find(name)


def test_a_name_is_taken_once() -> None:
    found = registry(ties=one)
    with pytest.raises(ValueError, match="there is a merging method ties already"):
        found.add(step_of(two, "ties"))
    again = step_of(one, "ties", needs=("base",))  # the same function, as when its module is loaded anew
    found.add(again)
    assert list(found) == ["ties"] and found["ties"] is again


def test_inputs_that_nobody_gives_are_refused() -> None:
    def none() -> None: ...
    def other(c: Any) -> None: ...
    def turned(b: Any, a: Any) -> None: ...
    for function, message in ((none, "merging method mine takes nothing: it may take a, or a and b"),
                              (other, "mine takes c: it may take a, or a and b"), (turned, "mine takes b, a:")):
        with pytest.raises(ValueError, match=message):
            registry(mine=function)


def test_installed_packages_bring_steps_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked for once, when they are asked for; one that cannot be loaded is a note."""
    found, asked = registry(ties=one), []

    def broken() -> None:
        raise ImportError("no module\nnamed nothing")

    def points(group: str) -> list[SimpleNamespace]:
        asked.append(group)
        return [SimpleNamespace(name="broken", value="theirs:broken", load=broken),
                SimpleNamespace(name="theirs", value="theirs:theirs", load=lambda: found.add(step_of(two, "theirs")))]
    monkeypatch.setattr(steps, "entry_points", points)
    with pytest.warns(TransplantNote, match=r"the merging method broken of theirs:broken cannot be loaded "
                                            r"\(ImportError: no module named nothing\)") as notes:
        assert list(found) == ["ties", "theirs"]
    assert found.find("theirs").function is two and len(found) == 2
    assert asked == ["nnunet_transplant.nothing"] and len(notes) == 1


def test_did_you_mean_says_nothing_where_nothing_is_near() -> None:
    assert did_you_mean("densty", ["density", "lambda"]) == " (did you mean density?)"
    assert did_you_mean("zzz", ["density", "lambda"]) == did_you_mean("x", []) == ""
    assert did_you_mean(3, ["density"]) == ""
