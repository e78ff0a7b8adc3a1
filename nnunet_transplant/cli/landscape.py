from argparse import Namespace
from pathlib import Path

from nnunet_transplant.analysis.landscape import CSV, JSON, LINES, PLANE, landscape
from nnunet_transplant.cli.common import add_output_arguments, command_parser, run_command
from nnunet_transplant.cli.flatness import add_patch_arguments


def main() -> None:
    parser = command_parser(
        "landscape", "Measures the loss between models, on patches of a dataset's labelled cases: over the plane that\n"
                     "lies closest to them all, and along the lines between each two. An interrupted run goes on.",
        "nnunet_transplant_landscape -m TASK_901 TASK_902 -also BASE MERGED -d 4 -f 0 -o LANDSCAPE")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="the experts, two or more: trained model folders or checkpoints inside them. Of different "
                             "labels, each is a task with a loss of its own")
    parser.add_argument("-also", type=Path, nargs="+", default=[], metavar="MODEL",
                        help="models to lay the plane through as well, such as the base and merged models")
    add_patch_arguments(parser, 8)
    add_output_arguments(parser, "folder to write to", earlier="a landscape of other models or settings")
    parser.add_argument("-points", type=int, default=17,
                        help="points of the plane along each axis, from coarse to fine; 0: no plane; default 17")
    parser.add_argument("-line_points", type=int, default=11, help="points of each line; default 11")
    run_command(parser, run)


def run(args: Namespace) -> None:
    result = landscape(args.m, args.d, args.f, output=args.o, also=args.also, cases=args.cases, n_cases=args.n_cases,
                       n_patches=args.n_patches, points=args.points, line_points=args.line_points, seed=args.seed,
                       checkpoint_name=args.chk, device=args.device, trust=args.trust_checkpoints,
                       overwrite=args.overwrite, progress=True)
    for pair, barrier in result["barriers"].items():
        print(f"barrier {pair}: " + ", ".join(f"{task} {value:.4g}" for task, value in barrier.items()))
    drawn = [CSV, LINES]
    if result["plane"] is not None:
        print(f"the plane holds {result['plane']['explained']:.0%} of how the models differ")
        drawn.append(PLANE)
    print(f"wrote {args.o}: {JSON}, {', '.join(drawn)}\n"
          f"put it on the page of a merge: nnunet_transplant_report -m MERGED -landscape {args.o} -o report.html")
