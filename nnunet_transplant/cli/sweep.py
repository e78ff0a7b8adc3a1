from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from nnunet_transplant.analysis.sweep import RECIPE, TABLE, Plan, sweep
from nnunet_transplant.cli.common import (
    add_case_arguments,
    add_checkpoint_arguments,
    add_device_argument,
    add_output_arguments,
    command_parser,
    run_command,
)
from nnunet_transplant.cli.steps import (
    add_patch_budget,
    add_step_arguments,
    add_step_options,
    help_of_steps,
    options_of,
)
from nnunet_transplant.recipe import Recipe

METHOD = "task_arithmetic"


def main() -> None:
    parser = command_parser(
        "sweep", "Searches the weights (and other numbers) with which models merge best, by the Dice on a dataset's\n"
                 "validation cases. Merges and predicts in memory; half of the cases tune, the others report.",
        "nnunet_transplant_sweep -m TASK_901 TASK_902 -d 4 -f 0 -o SWEEP -grid 21\n"
        "  nnunet_transplant_sweep -m TASK_901 TASK_902 TASK_903 -d 4 -o SWEEP -trials 60 -method dare "
        "-search density=0.05:0.8\n"
        "  nnunet_transplant_merge -recipe SWEEP/recipe.json -o MERGED",
        "nnunet_transplant_sweep -m MODEL MODEL [MODEL ...] -d DATASET -o OUT [-align NAME] [-method NAME]\n"
        "                               [-fit NAME ...] [-grid K | -trials N] [more options]")
    required = parser.add_argument_group("required")
    required.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                          help="trained model folders (their folds share a weight), checkpoints inside them, or task "
                               "vector files")
    add_output_arguments(required, "folder to write to; an earlier sweep of the same goes on",
                         earlier="an earlier sweep: start anew")
    add_step_arguments(parser, METHOD)
    cases = parser.add_argument_group("cases, on which merges are scored")
    add_case_arguments(cases, "scored")
    cases.add_argument("-tune", type=float, default=0.5, metavar="SHARE",
                       help="share of the cases to tune on, the others report; default 0.5")
    add_device_argument(cases)
    cases.add_argument("-step_size", type=float, default=0.5,
                       help="step of the sliding window, at most 1; default 0.5")
    cases.add_argument("--tta", action="store_true", help="mirror at test time, up to 8 times slower; default not")
    search = parser.add_argument_group("search")
    search.add_argument("-grid", type=int, metavar="K", help="K values of both weights of two models; default 21, "
                                                             "unless -trials is given")
    search.add_argument("-trials", type=int, metavar="N", help="N merges, chosen by what the earlier ones gave")
    search.add_argument("-sampler", default="tpe", metavar="tpe|gp|cmaes", help="how they are chosen: gp needs the "
                        "fewest, for up to some ten numbers and some hundred merges; default tpe")
    search.add_argument("-range", type=float, nargs=2, metavar=("LOW", "HIGH"), dest="weight_range",
                        help="of every weight; default 0 2")
    search.add_argument("-search", type=searched, nargs="+", default=[], metavar="NAME=LOW:HIGH",
                        help="search these options of the steps as well")
    search.add_argument("-objective", default="mean", metavar="mean|structures",
                        help="the mean Dice, or the Dice of each structure: a Pareto front; default mean")
    search.add_argument("-seed", type=int, default=0,
                        help="of the split of the cases, of the search and of the steps' random choices; default 0")
    search.add_argument("-storage", metavar="URL|FILE", help="where evaluations are stored, to be shared by several "
                        "machines: a database's URL or a journal file; default OUT/study.log")
    search.add_argument("-study", default="sweep", metavar="NAME", help="its name in the storage; default sweep")
    more = parser.add_argument_group("more")
    more.add_argument("-base", type=Path, help="theta_0 for task vector files and for models that do not record it: "
                                               "model folder, checkpoint or theta_0 file")
    more.add_argument("--same_channels", action="store_true", help="merge models whose image channels are called "
                      "differently: you know that they are the same")
    add_patch_budget(more)
    add_checkpoint_arguments(more)
    add_step_options(parser)
    help_of_steps(parser)
    run_command(parser, run)


def searched(text: str) -> tuple[str, tuple[float, float]]:
    name, _, numbers = text.partition("=")
    low, _, high = numbers.partition(":")
    try:
        return name.removeprefix("-"), (float(low), float(high))
    except ValueError as error:
        raise ArgumentTypeError(f"'{text}' is not NAME=LOW:HIGH") from error


def run(args: Namespace) -> None:
    plan = Plan(args.grid, args.trials, args.sampler, args.weight_range, dict(args.search), args.objective, args.tune,
                args.seed, args.storage, args.study)
    recipe = Recipe(args.method or METHOD, None, options_of(args), args.align, args.fit or (),
                    same_channels=args.same_channels)
    sweep(args.m, args.d, args.f, output=args.o, plan=plan, recipe=recipe, base=args.base, cases=args.cases,
          n_cases=args.n_cases, n_patches=args.n_patches, cache=args.cache, checkpoint_name=args.chk,
          device=args.device, step_size=args.step_size, mirroring=args.tta, trust=args.trust_checkpoints,
          overwrite=args.overwrite, progress=True)
    print((args.o / TABLE).read_text(encoding="utf-8"))
    print(f"wrote {args.o}\nmerge with the best: nnunet_transplant_merge -recipe {args.o / RECIPE} -o MERGED")
