"""The three steps on the command line: listed and explained by -h, told apart where misspelt, given their options."""
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factory import base_network, write_model

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.cli import predict as predict_command
from nnunet_transplant.cli import sweep as sweep_command
from nnunet_transplant.fitting import FITS
from nnunet_transplant.methods import METHODS, Method
from nnunet_transplant.steps import IN_WORDS

KINDS = {"align": ALIGNERS, "method": METHODS, "fit": FITS}
STEPS = [(kind, name) for kind, registry in KINDS.items() for name in registry]
OPTIONS = {parameter.name for registry in KINDS.values() for step in registry.values() for parameter in step.parameters}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = base_network()
    return [write_model(tmp_path / name, {"background": 0, name: 1}, base=base, seed=i) for i, name in enumerate("AB")]


# What -h says

@pytest.mark.parametrize(("command", "own"), [("merge", set()), ("predict", set()), ("sweep", {"seed"})])
def test_help_lists_every_step_and_no_option(command: str, own: set[str], run: Callable) -> None:
    status, out, err = run(command, "-h")
    assert (status, err) == (0, "")
    whole, _, steps = out.partition("aligners (-align):")
    flags = {flag.lstrip("-") for flag in re.findall(r"^  (-\S+)", whole, re.M)}
    assert {"align", "method", "fit", "m"} <= flags
    assert flags & OPTIONS == own and not any("." in flag for flag in flags)
    rows = dict(re.findall(r"^  (\w+) +(\S.*(?:\n {18}\S.*)*)$", steps.partition("example:")[0], re.M))
    assert rows.keys() == {name for _, name in STEPS}
    for kind, name in STEPS:
        step = KINDS[kind][name]
        needs = f" [needs {', '.join(IN_WORDS[need] for need in step.needs)}]" if step.needs else ""
        assert " ".join(rows[name].split()) == step.summary + needs
    assert steps.index("methods (-method):") < steps.index("fits (-fit):") < steps.index("example:")


def test_help_of_merge_is_in_groups(run: Callable) -> None:
    _, out, _ = run("merge", "-h")
    headings = [line.partition(" (")[0].partition(",")[0].rstrip(":") for line in out.splitlines()
                if re.fullmatch(r"[a-z].*:", line)]
    assert headings == ["options", "required", "the three steps", "models", "volumes", "more", "aligners", "methods",
                        "fits", "example"]
    assert max(map(len, out.partition("example:")[0].splitlines())) <= 103  # the usage is longest


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_help_beside_a_step_says_all_that_it_declares(kind: str, name: str, run: Callable) -> None:
    step = KINDS[kind][name]
    status, out, err = run("merge", f"-{kind}", name, "-h")
    assert (status, err) == (0, "")
    text = " ".join(out.split())
    assert text.startswith(f"-{kind} {name}: {step.summary} from {step.reference} {step.url} ")
    assert step.url.startswith("https://")
    assert ("(-d DATASET)" in text) == step.looks
    assert all(IN_WORDS[need] in text for need in step.needs)
    assert re.findall(r"^    -(\S+)", out, re.M) == [parameter.name for parameter in step.parameters]
    for parameter in step.parameters:
        between = "|".join(parameter.choices) if parameter.choices else \
            f"{parameter.range.low:.10g} to {parameter.range.high:.10g}"
        assert f"-{parameter.name} {parameter.help} ({between}; default {parameter.default})" in text
    assert isinstance(step, Method) == ("-weights: " in text)
    assert "nnunet_transplant_merge -h" in text and max(map(len, out.splitlines())) <= 120


def test_help_beside_ties(run: Callable) -> None:
    """To the letter, once."""
    _, out, _ = run("merge", "-method", "ties", "-h")
    for line in ("-method ties: trim small entries, elect the sign", "https://arxiv.org/abs/2306.01708",
                 "needs the base", "(0 to 1; default 0.2)", "(-10 to 10; default 1.0)",
                 "(vector|tensor; default vector)", "-weights: not negative, only their ratios count, default equal"):
        assert line in out


@pytest.mark.parametrize("where", [0, 2, None])
def test_help_of_several_steps(where: int | None, run: Callable) -> None:
    """In the order of a merge, wherever -h stands and whatever else is given."""
    arguments = ["-m", "A", "-fit", "head", "polish", "-method", "regmean", "-align", "mudsc", "-seed", "3"]
    arguments.insert(len(arguments) if where is None else where, "-h")
    status, out, _ = run("merge", *arguments)
    assert status == 0
    assert re.findall(r"^-(\w+ \w+):", out, re.M) == ["align mudsc", "method regmean", "fit head", "fit polish"]
    assert run("predict", *arguments)[1].replace("_predict", "_merge") == out


def test_help_without_a_step_is_that_of_the_command(models: list[Path], run: Callable) -> None:
    """-m is not -method."""
    _, whole, _ = run("merge", "-h")
    assert run("merge", "-m", *models, "-o", "out", "-f", "0", "-h") == (0, whole, "")


# What is wrong

MISSPELT = {
    "method": (["-method", "tise"], 1, "there is no merging method 'tise' (did you mean ties?); choose from average, "),
    "method and help": (["-method", "tise", "-h"], 2, "there is no merging method 'tise' (did you mean ties?)"),
    "aligner": (["-align", "rebasni"], 1, "there is no aligner 'rebasni' (did you mean rebasin?)"),
    "aligner and help": (["-align", "rebasni", "-h"], 2, "there is no aligner 'rebasni' (did you mean rebasin?)"),
    "fit": (["-fit", "haed"], 1, "there is no fit 'haed' (did you mean head?)"),
    "fit and help": (["-h", "-fit", "haed"], 2, "there is no fit 'haed' (did you mean head?)"),
    "nothing like it": (["-method", "xyzzy"], 1, "there is no merging method 'xyzzy'; choose from"),
    # and not the flag of one letter that it starts with
    "option": (["-densty", "0.3"], 2, "there is no option -densty (did you mean -density?)"),
    "flag of a step": (["-mehtod", "ties"], 2, "there is no option -mehtod (did you mean -method?)"),
    "option of one step": (["-ties.densty", "0.3"], 2, "there is no option -ties.densty (did you mean -ties.density?)"),
    "flag": (["--per_flod"], 2, "there is no option --per_flod (did you mean --per_fold?)"),
    "another flag": (["-xyzzy", "1"], 2, "there is no option -xyzzy. nnunet_transplant_merge -h says more"),
    "no flag": (["stray", "-o"], 2, "argument -o: expected one argument"),
    "choice": (["-method", "ties", "-trim", "vectr"], 1,
               "-trim must be one of vector, tensor, not vectr (did you mean vector?)"),
    "no number": (["-method", "ties", "-density", "much"], 1, "-density must be a number, not much"),
    "no weight": (["-weights", "much"], 2, "argument -weights: invalid float value: 'much'"),
    "number": (["-method", "ties", "-density", "1.5"], 1, "-density must lie between 0 and 1, not 1.5"),
    "number of one step": (["-method", "ties", "-ties.density", "nan"], 1, "must lie between 0 and 1, not nan"),
    "option of other methods": (["-method", "average", "-density", "0.5"], 1,
                                "average has no -density: there are no options; ties, dare, della, breadcrumbs, pcb "
                                "have it"),
    "option of another method": (["-method", "ties", "-off_diagonal", "0.5"], 1,
                                 "ties has no -off_diagonal: options are -density, -lambda, -trim; regmean has it"),
    "option of an aligner": (["-method", "ties", "-units", "zip"], 1, "rebasin, activation, mudsc have it"),
    "option of another step": (["-method", "ties", "-dare.density", "0.5"], 1, "ties has no -dare.density"),
    "option of none of two": (["-align", "rebasin", "-density", "0.5"], 1, "rebasin and average have no -density"),
    "step twice": (["-fit", "head", "head"], 1, "each step comes once, not average, head, head"),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_what_is_wrong_is_one_line(tmp_path: Path, models: list[Path], run: Callable, name: str) -> None:
    arguments, expected, message = MISSPELT[name]
    status, out, err = run("merge", "-m", *models, "-o", tmp_path / "merged", *arguments)
    assert (status, out) == (expected, "")
    assert err.startswith("nnunet_transplant_merge: error: ") and message in err and err.count("\n") == 1, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B"]


@pytest.mark.parametrize("name", ["option of other methods", "option of another method"])
def test_those_that_have_an_option_are_those_that_declare_it(name: str) -> None:
    (*_, flag, _), _, message = MISSPELT[name]
    having = [step for kind, step in STEPS if flag[1:] in [each.name for each in KINDS[kind][step].parameters]]
    assert message.partition("; ")[2] == f"{', '.join(having)} {'have' if len(having) > 1 else 'has'} it"


@pytest.mark.parametrize("command", ["evaluate", "sweep", "flatness", "landscape", "interference", "extract", "report",
                                     "spec", "split_tasks", "predict", "trainers", "demo"])
def test_every_command_says_in_one_line_what_its_arguments_lack(command: str, run: Callable) -> None:
    for arguments in (["-densitty", "x"], ["--overwritten"]):
        status, out, err = run(command, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith(f"nnunet_transplant_{command}: error: ") and err.count("\n") == 1
        assert err.endswith(f"nnunet_transplant_{command} -h says more\n")


# What reaches the recipe

def recorded(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merge.json").read_text())["folds"]["all"]["recipe"]["parameters"]


@pytest.mark.parametrize(("arguments", "expected"), [
    (["-density", "0.3"], 0.3), (["-ties.density", "0.3"], 0.3), (["-density=0.3"], 0.3), ([], 0.2),
    (["-ties.density", "0.4", "-density", "0.3"], 0.4), (["-density", "0.3", "-ties.density", "0.4"], 0.4)])
def test_options_reach_the_recipe(tmp_path: Path, models: list[Path], run: Callable, arguments: list[str],
                                  expected: float) -> None:
    status, _, err = run("merge", "-m", *models, "-o", tmp_path / "merged", "-method", "ties", "-lambda", "-0.5",
                         *arguments)
    assert (status, err) == (0, "")
    assert recorded(tmp_path / "merged") == {"ties.density": expected, "ties.lambda": -0.5, "ties.trim": "vector"}


def test_an_option_of_several_steps_reaches_them_all_or_one(tmp_path: Path, models: list[Path], run: Callable) -> None:
    arguments = ["merge", "-m", *models, "-align", "rebasin", "-base", next(models[0].glob("theta_0*")), "-method",
                 "dare", "-seed", 3]
    assert run(*arguments, "-o", tmp_path / "both")[0] == 0
    assert run(*arguments, "-o", tmp_path / "one", "-dare.seed", 5)[0] == 0
    for name, seed in (("both", 3), ("one", 5)):
        parameters = recorded(tmp_path / name)
        assert (parameters["rebasin.seed"], parameters["dare.seed"]) == (3, seed)


def test_options_reach_predicting_and_sweeping(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeping has a -seed of its own, of everything it does."""
    given: list[Any] = []

    def stop(*arguments: object, **options: object) -> None:
        given.append(options)
        raise OSError("far enough")
    monkeypatch.setattr(predict_command, "merge", stop)
    monkeypatch.setattr(sweep_command, "sweep", stop)
    steps = ["-align", "mudsc", "-method", "dare", "-fit", "head", "polish", "-density", "0.3", "-polish.lr", "0.1",
             "-dare.seed", "7"]
    assert run("predict", "-i", "images", "-o", "out", "-m", "A", "B", "-device", "cpu", "-seed", "3", *steps)[0] == 1
    assert run("sweep", "-m", "A", "B", "-d", "4", "-o", "out", "-seed", "3", *steps)[0] == 1
    predicting, sweeping = given
    options = {"density": "0.3", "polish.lr": "0.1", "dare.seed": "7"}
    assert {name: predicting[name] for name in ("align", "method", "fit", "seed", *options)} == {
        "align": "mudsc", "method": "dare", "fit": ["head", "polish"], "seed": "3", **options}
    recipe = sweeping["recipe"]
    assert (recipe.align, recipe.method, recipe.fit, recipe.parameters) == (
        "mudsc", "dare", ["head", "polish"], options)
    assert sweeping["plan"].seed == 3


@pytest.mark.parametrize("command", ["merge", "predict", "sweep"])
def test_every_option_has_its_flag(command: str, run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no step has one that a command means otherwise, but for the one that is the same."""
    given: list[dict[str, Any]] = []

    def stop(args: Any) -> None:
        given.append(vars(args))
    module = __import__(f"nnunet_transplant.cli.{command}", fromlist=["run"])
    monkeypatch.setattr(module, "run", stop)
    required = {"merge": ["-o", "out"], "predict": ["-i", "images", "-o", "out"],
                "sweep": ["-m", "A", "B", "-d", "4", "-o", "out"]}[command]
    names = [name for kind, step in STEPS for parameter in KINDS[kind][step].parameters
             for name in (parameter.name, f"{step}.{parameter.name}")]
    own = {"seed"} if command == "sweep" else set()
    flags = [argument for name in sorted({*names} - own) for argument in (f"-{name}", "1")]
    assert run(command, *required, *flags)[0] == 0
    (args,) = given
    assert {name for name, value in args.items() if value == "1"} == {f"option:{name}" for name in {*names} - own}
