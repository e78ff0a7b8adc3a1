"""The flags of a merge: models, the three steps with the options of each, volumes. For all commands that merge."""
import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_transplant.alignment import ALIGNERS
from nnunet_transplant.cli.common import Parser, notes_as_lines
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.fitting import FITS
from nnunet_transplant.methods import METHODS, Method
from nnunet_transplant.steps import IN_WORDS, MANY_PATCHES, N_PATCHES, Registry, Step
from nnunet_transplant.volumes import N_CASES

KINDS: dict[str, Registry[Any]] = {"align": ALIGNERS, "method": METHODS, "fit": FITS}
OPTION = "option:"  # before the names of steps' options in parsed arguments


def add_step_arguments(parser: Parser, default_method: str | None = None) -> None:
    """-align, -method and -fit. default_method: where the steps are not chosen by what is at hand."""
    chosen = "average, and where no step is named all are chosen by what is at hand"
    group = parser.add_argument_group("the three steps, each listed below; with one of them -h shows its options")
    group.add_argument("-align", metavar="NAME", help="put models with no common base into common units first")
    group.add_argument("-method", metavar="NAME", help=f"merge; default {default_method or chosen}")
    group.add_argument("-fit", nargs="+", metavar="NAME", help="then fit, without labels, to what the models say of "
                                                               "the volumes of -d; several fits one after the other")


def add_step_options(parser: Parser) -> None:
    """A flag for every option of every step: -density, and -ties.density. Not the first where the command has a flag of
    its own of this name: add those before. None is shown by -h, but all steps are listed."""
    with notes_as_lines():  # the first to ask loads the steps of other packages
        steps = _steps()
    for step in steps:
        for parameter in step.parameters:
            for name in (parameter.name, f"{step.name}.{parameter.name}"):
                if f"-{name}" not in parser._option_string_actions:
                    parser.add_argument(f"-{name}", dest=f"{OPTION}{name}", metavar="X", help=argparse.SUPPRESS)
    parser.epilog = "\n\n".join([*(_listed(what, registry) for what, registry in (
        ("aligners (-align)", ALIGNERS), ("methods (-method)", METHODS), ("fits (-fit)", FITS))), parser.epilog or ""])


def add_volume_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument("-d", nargs="+", metavar="DATASET", help="dataset(s) whose volumes the steps may look at")
    group.add_argument("-cases", metavar="FILE|train:K|val:K", help="out of these cases; default all")
    group.add_argument("-n_cases", type=int, metavar="N",
                       help=f"so many volumes of each, spread evenly; default {N_CASES}")
    add_patch_budget(group)


def add_patch_budget(group: argparse._ActionsContainer) -> None:
    group.add_argument("-n_patches", type=int, metavar="N",
                       help="so many patches of all volumes together, which is what the time depends on; default "
                            f"{N_PATCHES}, {MANY_PATCHES} for fits that take many steps")
    group.add_argument("-cache", type=Path, metavar="DIR", help="keep here what looking at volumes found out: a merge "
                       "with another method or fit, or one that was interrupted, goes on from there")


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The steps' options that were given, by name."""
    return {name.removeprefix(OPTION): value for name, value in vars(args).items()
            if name.startswith(OPTION) and value is not None}


def help_of_steps(parser: Parser) -> None:
    """Where -h stands beside -align, -method or -fit, print what there is to know of those steps, and leave."""
    asked = Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    asked.add_argument("-h", "--help", action="store_true")
    asked.add_argument("-align")
    asked.add_argument("-method")
    asked.add_argument("-fit", nargs="+", default=[])
    try:
        args, _ = asked.parse_known_args()
    except argparse.ArgumentError:  # the real parser says what is wrong
        return
    named = {"align": [args.align], "method": [args.method], "fit": args.fit}
    if not args.help or not any(name for names in named.values() for name in names):
        return
    try:
        found = [(kind, KINDS[kind].find(name)) for kind, names in named.items() for name in names if name]
    except TransplantError as error:
        parser.error(str(error))
    print("\n\n".join(step_help(kind, step) for kind, step in found))
    print(f"\nall other options: {parser.prog} -h")
    sys.exit(0)


def step_help(kind: str, step: Step) -> str:
    """Everything that a step declares, as text."""
    lines = [f"-{kind} {step.name}: {step.summary}", f"  from {step.reference}", f"  {step.url}"]
    if step.needs:
        lines.append(f"  needs {', '.join(IN_WORDS[need] for need in step.needs)}"
                     + " (-d DATASET)" * step.looks)
    if isinstance(step, Method):
        lines.append(f"  -weights: {step.weights_rule.text}")
    if step.parameters:
        lines.append("  options:")
    for parameter in step.parameters:
        said = f"{parameter.help} ({parameter.allowed}; default {parameter.default})"
        lines += _column(f"    -{parameter.name}", said, 22)
    return "\n".join(lines)


def _steps() -> list[Step]:
    return [step for registry in KINDS.values() for step in registry.values()]


def _listed(what: str, registry: Registry[Any]) -> str:
    """Those that need nothing come first."""
    steps = sorted(registry.values(), key=lambda step: (step.looks, len(step.needs)))
    lines = [f"{what}:"]
    for step in steps:
        needs = f" [needs {', '.join(IN_WORDS[need] for need in step.needs)}]" if step.needs else ""
        lines += _column(f"  {step.name}", step.summary + needs, 18)
    return "\n".join(lines)


def _column(left: str, right: str, width: int) -> Sequence[str]:
    first, *rest = textwrap.wrap(right, 100 - width)
    return [f"{left:<{width}}{first}", *(" " * width + line for line in rest)]


def add_model_arguments(group: argparse._ActionsContainer) -> None:
    """What is merged, and what a merge may start from."""
    group.add_argument("-m", type=Path, nargs="+", default=[], metavar="MODEL",
                       help="trained model folders, checkpoints inside them, or task vector files")
    group.add_argument("-f", nargs="+", metavar="FOLD", help="folds to take from each model folder; default: all of "
                                                             "its numbered folds, else fold_all")
    group.add_argument("-weights", type=float, nargs="+", metavar="W",
                       help="one number for each MODEL (its folds share it); what it may be depends on the method")
    group.add_argument("-base", type=Path, help="theta_0 for task vector files and for models that do not record it: "
                                                "model folder, checkpoint or theta_0 file")
    group.add_argument("-recipe", type=Path, metavar="FILE",
                       help="do as this file says (nnunet_transplant_sweep writes one, every merge.json is one); what "
                            "is given beside it goes before")
    group.add_argument("-from", dest="earlier", type=Path, metavar="MERGED",
                       help="start from this earlier merge: its models and its recipe; -m adds models to it")
    group.add_argument("-drop", nargs="+", default=[], metavar="NAME", help="leave out these models of the earlier "
                       "merge: a structure, a dataset's name or a model's path")
    group.add_argument("--same_channels", action="store_true", default=None, help="merge models whose image channels "
                       "are called differently: you know that they are the same")


def add_held_back_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument("-keep_base_for", nargs="+", metavar="PATTERN", help="leave tensors with such a name (as "
                       "'encoder.stages.0.*' or '*norm*') at theta_0")
    group.add_argument("-stage_weights", type=float, nargs="+", metavar="W", help="factors for the merged task vector "
                       "by stage: those of the encoder from full to lowest resolution, then those of the decoder up")


def merge_options(args: argparse.Namespace) -> dict[str, Any]:
    """The parsed flags as `merging.merge` takes them."""
    return {"models": args.m, "align": args.align, "method": args.method, "fit": args.fit, "images": args.d,
            "cases": args.cases, "n_cases": args.n_cases, "n_patches": args.n_patches, "weights": args.weights,
            "keep_base_for": args.keep_base_for, "stage_weights": args.stage_weights,
            "same_channels": args.same_channels, "folds": args.f, "base": args.base, "recipe": args.recipe,
            "earlier": args.earlier, "drop": args.drop, "checkpoint_name": args.chk, "device": args.device,
            "trust": args.trust_checkpoints, "cache": args.cache, **options_of(args)}
