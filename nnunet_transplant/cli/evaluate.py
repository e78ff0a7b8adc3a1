from argparse import Namespace
from pathlib import Path

from nnunet_transplant.cli.common import (
    add_case_arguments,
    add_checkpoint_arguments,
    add_device_argument,
    add_output_arguments,
    command_parser,
    run_command,
)
from nnunet_transplant.evaluation import (
    CSV,
    DICE_FIGURE,
    OVERLAYS_FIGURE,
    PER_CASE,
    PREDICTIONS,
    SUMMARY,
    TABLE,
    evaluate,
)


def main() -> None:
    parser = command_parser(
        "evaluate", "Predicts a dataset's validation cases with each model and prints the Dice of every structure,\n"
                    "found by name in the dataset's own labels: task models, merged models and the model of the\n"
                    "whole dataset in one table.",
        "nnunet_transplant_evaluate -m MERGED TASK_901 TASK_902 -d 4 -f 0 -o EVALUATION")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders (several folds are an ensemble), or checkpoints inside them")
    add_case_arguments(parser, "predicted; its labels are the reference")
    add_output_arguments(parser, "folder to write to", earlier="an earlier evaluation")
    add_device_argument(parser)
    parser.add_argument("-step_size", type=float, default=0.5,
                        help="step of the sliding window, at most 1; default 0.5")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time: faster, less accurate")
    add_checkpoint_arguments(parser)
    run_command(parser, run)


def run(args: Namespace) -> None:
    evaluate(args.m, args.d, args.f, output=args.o, cases=args.cases, n_cases=args.n_cases, checkpoint_name=args.chk,
             device=args.device, step_size=args.step_size, mirroring=not args.disable_tta,
             trust=args.trust_checkpoints, overwrite=args.overwrite, progress=True)
    print((args.o / TABLE).read_text(encoding="utf-8").partition(PER_CASE)[0])
    print(f"wrote {args.o}: {TABLE} (also case by case), {CSV}, {DICE_FIGURE}, {OVERLAYS_FIGURE}, and for each model "
          f"{SUMMARY} and {PREDICTIONS}\n"
          f"put it on one page: nnunet_transplant_report -m MERGED -evaluation {args.o} -o report.html")
