from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from nnunet_transplant.analysis.sweep import TABLE, WEIGHTS, Plan, sweep
from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.cli.merge import add_method_parameters, add_same_channels
from nnunet_transplant.merging import METHODS
from nnunet_transplant.model_folder import CHECKPOINT

OWN = ("seed", "search")  # flags of this command, which some methods have too


def main() -> None:
    parser = command_parser(
        "sweep", "Searches the weights (and other numbers) with which models merge best, by the Dice on a dataset's\n"
                 "validation cases. Merges and predicts in memory; half of the cases tune, the others report.",
        "nnunet_transplant_sweep -m TASK_901 TASK_902 -d 4 -f 0 -o SWEEP -grid 21\n"
        "  nnunet_transplant_sweep -m TASK_901 TASK_902 TASK_903 -d 4 -o SWEEP -trials 60 -method dare "
        "-search density=0.05:0.8\n"
        "  nnunet_transplant_merge -m TASK_901 TASK_902 -weights @SWEEP/weights.json -o MERGED")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders (their folds share a weight), checkpoints inside them, or task "
                             "vector files")
    parser.add_argument("-d", required=True, metavar="DATASET",
                        help="name or id of the dataset on which merges are scored")
    parser.add_argument("-f", default="0", metavar="FOLD",
                        help="the validation cases of this fold of the dataset, or all for every case; default 0")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT",
                        help="folder to write to; an earlier sweep of the same goes on")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("-base", type=Path, help="theta_0 for task vector files and for models that do not record it: "
                                                 "model folder, checkpoint or theta_0 file")
    parser.add_argument("-method", metavar="NAME", default="task_arithmetic",
                        help=f"merging method, default task_arithmetic; one of {', '.join(METHODS)}")
    parser.add_argument("-grid", type=int, metavar="K", help="K values of both weights of two models; default 21, "
                                                             "unless -trials is given")
    parser.add_argument("-trials", type=int, metavar="N", help="N merges, chosen by what the earlier ones gave")
    parser.add_argument("-sampler", default="tpe", metavar="tpe|gp|cmaes", help="how they are chosen: gp needs the "
                        "fewest, for up to some ten numbers and some hundred merges; default tpe")
    parser.add_argument("-range", type=float, nargs=2, metavar=("LOW", "HIGH"), dest="weight_range",
                        help="of every weight; default 0 2")
    parser.add_argument("-search", type=searched, nargs="+", default=[], metavar="NAME=LOW:HIGH",
                        help="search these parameters of the method as well")
    parser.add_argument("-objective", default="mean", metavar="mean|structures",
                        help="the mean Dice, or the Dice of each structure: a Pareto front; default mean")
    parser.add_argument("-tune", type=float, default=0.5, metavar="SHARE",
                        help="share of the cases to tune on, the others report; default 0.5")
    parser.add_argument("-n_cases", type=int, metavar="N", help="how many cases in all; default all of the fold")
    parser.add_argument("-seed", type=int, default=0,
                        help="of the split of the cases, of the search and of the method's random choices; default 0")
    parser.add_argument("-storage", metavar="URL|FILE", help="where evaluations are stored, to be shared by several "
                        "machines: a database's URL or a journal file; default OUT/study.log")
    parser.add_argument("-study", default="sweep", metavar="NAME", help="its name in the storage; default sweep")
    parser.add_argument("-device", default="cuda", help="cuda (default), cpu or mps")
    parser.add_argument("-step_size", type=float, default=0.5,
                        help="step of the sliding window, at most 1; default 0.5")
    parser.add_argument("--tta", action="store_true", help="mirror at test time, up to 8 times slower; default not")
    parser.add_argument("--fit_head", action="store_true", help="fit the head of every merge, with images that the "
                        "fold trains on and without their labels, as in the merge to come; default not")
    add_method_parameters(parser, but=OWN)
    add_same_channels(parser)
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load checkpoints that ask for more than weights; they can run code")
    parser.add_argument("--overwrite", action="store_true", help="start an earlier sweep anew")
    run_command(parser, run)


def searched(text: str) -> tuple[str, tuple[float, float]]:
    name, _, numbers = text.partition("=")
    low, _, high = numbers.partition(":")
    try:
        return name.removeprefix("-"), (float(low), float(high))
    except ValueError as error:
        raise ArgumentTypeError(f"'{text}' is not NAME=LOW:HIGH") from error


def run(args: Namespace) -> None:
    names = {p.name for method in METHODS.values() for p in method.parameters} - {*OWN}
    parameters = {name: value for name in names if (value := getattr(args, name)) is not None}
    plan = Plan(args.grid, args.trials, args.sampler, args.weight_range, dict(args.search), args.objective, args.tune,
                args.n_cases, args.seed, args.storage, args.study)
    sweep(args.m, args.d, args.f, output=args.o, plan=plan, method=args.method, parameters=parameters, base=args.base,
          checkpoint_name=args.chk, device=args.device, step_size=args.step_size, mirroring=args.tta,
          fit_head=args.fit_head, same_channels=bool(args.same_channels), trust=args.trust_checkpoints,
          overwrite=args.overwrite, progress=True)
    print((args.o / TABLE).read_text(encoding="utf-8"))
    base = "" if args.base is None else f"-base {args.base} "
    head = f" --fit_head -d {args.d} -cases train:{args.f}" if args.fit_head else ""
    head += " --same_channels" * bool(args.same_channels)
    print(f"wrote {args.o}\nmerge with the best: nnunet_transplant_merge -m {' '.join(map(str, args.m))} {base}"
          f"-weights @{args.o / WEIGHTS}{head} -o MERGED")
