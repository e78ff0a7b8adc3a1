"""`import nnunet_transplant as nt`: takes no time, changes nothing, and has what the commands do by the same names."""
import argparse
import dataclasses
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import nnunet_transplant as nt
from nnunet_transplant.cli.steps import OPTION

STATE = """
import json, os, sys
before = dict(os.environ)

def changed():
    return {name: os.environ.get(name) for name in {*before, *os.environ} if os.environ.get(name) != before.get(name)}
"""


def in_a_fresh_process(code: str, **environment: str) -> Any:
    """What the code prints, as JSON."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", STATE + code], capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_importing_takes_nothing_and_changes_nothing() -> None:
    found = in_a_fresh_process("""
import nnunet_transplant
print(json.dumps([sorted(name.partition(".")[0] for name in sys.modules), changed(), nnunet_transplant.__version__]))
""")
    modules, environment, version = found
    assert not {"torch", "nnunetv2", "matplotlib", "numpy", "pandas", "scipy", "optuna", "SimpleITK", "jinja2"} & {
        *modules}
    assert environment == {} and version == nt.__version__


@pytest.mark.parametrize("command", ["trainers", "demo", "split_tasks"])
def test_commands_that_need_no_network_start_quickly(command: str) -> None:
    """`export nnUNet_extTrainer="$(nnunet_transplant_trainers)"` stands in the start-up files of shells."""
    found = in_a_fresh_process(f"""
import nnunet_transplant.cli.{command}
print(json.dumps(sorted(name.partition(".")[0] for name in sys.modules)))
""")
    assert not {"torch", "nnunetv2", "numpy"} & {*found}


def test_every_name_is_there_and_dir_has_it() -> None:
    for name in nt.__all__:
        assert getattr(nt, name) is not None
    assert set(nt.__all__) <= set(dir(nt)) and dir(nt) == sorted(dir(nt))
    assert len(set(nt.__all__)) == len(nt.__all__)
    with pytest.raises(AttributeError, match="nnunet_transplant has no attribute merj"):
        _ = nt.merj
    assert not hasattr(nt, "METHOD")


def test_no_name_is_that_of_a_module() -> None:
    """Which would take its place once it is imported."""
    assert not {module.name for module in pkgutil.iter_modules(nt.__path__)} & set(nt.__all__)


def test_the_names_for_type_checkers_are_those_there_are() -> None:
    """Beside __getattr__, which they do not run."""
    source = inspect.getsource(nt).partition("if TYPE_CHECKING:")[2].partition("_HOMES")[0]
    said = {}
    for line in source.splitlines():
        module, _, names = line.strip().removeprefix("from nnunet_transplant.").partition(" import ")
        said |= {name.strip(): module for name in names.split(",") if name.strip()}
    assert said == nt._HOMES and {*said, "__version__"} == set(nt.__all__)


@pytest.mark.slow
def test_using_everything_leaves_the_process_as_it_was() -> None:
    """Matplotlib's backend, torch's threads, and all variables but those that nnU-Net's own imports set."""
    threads = "2"
    nnunets = in_a_fresh_process("import nnunetv2.run.run_training\nsys.stdout.write(json.dumps(changed()))")
    backend, count, environment = in_a_fresh_process(f"""
import matplotlib, torch
torch.set_num_threads({threads})
def backend():
    return dict.__getitem__(matplotlib.rcParams, "backend")  # without resolving it
first = repr(backend())
import nnunet_transplant as nt
for name in nt.__all__:
    getattr(nt, name)
print(json.dumps([[first, repr(backend())], torch.get_num_threads(), changed()]))
""")
    assert backend[0] == backend[1] and str(count) == threads
    assert environment.items() <= nnunets.items()
    assert not [name for name in environment if name.startswith("nnUNet")]


# ---------------------------------------------------------------------------------------------------------------------
# What a command does is one call here, with the same names

# flag -> parameter, where they are not called the same; nnU-Net's flags are short, and -m is several things
COMMON = {"m": "models", "d": "dataset", "f": "fold", "o": "output", "chk": "checkpoint_name",
          "trust_checkpoints": "trust", "disable_tta": "mirroring"}
MERGING = {"d": "images", "f": "folds", "from": "earlier"}
TABLE: dict[str, dict[str, str]] = {
    "merge": {**MERGING, "out_fold": "fold"},
    "predict": {**MERGING, "i": "input", "not_on_device": "on_device", "disable_progress_bar": "progress"},
    "evaluate": {},
    "split_tasks": {"p": "plans_name", "np": "num_processes"},
    "extract": {"m": "model"},
    "interference": {"f": "folds"},
    "flatness": {},
    "landscape": {},
    "sweep": {"range": "weight_range", "search": "searched", "tta": "mirroring"},
    "report": {"m": "model"},
    "spec": {"m": "model"},
}
BESIDE = {"progress"}  # commands show it, always


def parameters_of(function: Callable) -> dict[str, inspect.Parameter]:
    return {name: parameter for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind != parameter.VAR_KEYWORD and name != "self"}


def fields_of(kind: type) -> dict[str, Any]:
    return {field.name: field for field in dataclasses.fields(kind)}


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, argparse.Action]]:
    """A command's own flags by name, without dashes; not the options of steps, which are theirs."""
    def flags(command: str) -> dict[str, argparse.Action]:
        module = importlib.import_module(f"nnunet_transplant.cli.{command}")
        parsers: list[argparse.ArgumentParser] = []
        monkeypatch.setattr(module, "run_command", lambda parser, work: parsers.append(parser))
        monkeypatch.setattr(sys, "argv", [command])
        module.main()
        return {action.option_strings[0].lstrip("-"): action for action in parsers[0]._actions
                if action.dest != "help" and not action.dest.startswith(OPTION)}
    return flags


@pytest.mark.parametrize("command", TABLE)
def test_flags_and_parameters_have_the_same_names(command: str, flags: Callable) -> None:
    own = parameters_of(getattr(nt, command))
    taken: dict[str, Any] = dict(own)  # by what it takes, too
    required = set(own) - BESIDE
    if command == "merge":
        saving = parameters_of(nt.Merged.save)
        taken, required = taken | saving, required | set(saving)
    elif command == "predict":
        taken |= parameters_of(nt.merge)
    elif command == "sweep":
        plan = fields_of(nt.Plan)
        taken = taken | plan | fields_of(nt.Recipe)
        required = (required | set(plan)) - {"plan", "recipe"}
    names = {flag: {**COMMON, **TABLE[command]}.get(flag, flag) for flag in flags(command)}
    assert set(names.values()) <= set(taken), "flags that no parameter is called like"
    assert required <= set(names.values()), "parameters that no flag is called like"
    assert {flag for flag in TABLE[command] if flag not in names} == set()


@pytest.mark.parametrize("command", TABLE)
def test_flags_and_parameters_have_the_same_defaults(command: str, flags: Callable) -> None:
    own = parameters_of(getattr(nt, command))
    for flag, action in flags(command).items():
        name = {**COMMON, **TABLE[command]}.get(flag, flag)
        if name not in own or action.default in (None, [], ()) or action.nargs == 0:
            continue
        assert own[name].default == action.default, flag


def test_the_functions_say_what_they_do() -> None:
    for command in TABLE:
        assert len(inspect.getdoc(getattr(nt, command)) or "") > 80, command
