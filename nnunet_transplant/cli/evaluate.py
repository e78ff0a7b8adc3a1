from argparse import Namespace
from pathlib import Path

from nnunet_transplant.cli.common import command_parser, run_command
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
from nnunet_transplant.model_folder import CHECKPOINT


def main() -> None:
    parser = command_parser(
        "evaluate", "Predicts a dataset's validation cases with each model and prints the Dice of every structure,\n"
                    "found by name in the dataset's own labels: task models, merged models and the model of the\n"
                    "whole dataset in one table.",
        "nnunet_transplant_evaluate -m MERGED TASK_901 TASK_902 -d 4 -f 0 -o EVALUATION")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders (several folds are an ensemble), or checkpoints inside them")
    parser.add_argument("-d", required=True, metavar="DATASET",
                        help="name or id of the dataset whose images are predicted and whose labels are the reference")
    parser.add_argument("-f", default="0", metavar="FOLD",
                        help="the validation cases of this fold of the dataset, or all for every case; default 0")
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder to write to")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("-device", default="cuda", help="cuda (default), cpu or mps")
    parser.add_argument("-step_size", type=float, default=0.5,
                        help="step of the sliding window, at most 1; default 0.5")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time: faster, less accurate")
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load checkpoints that ask for more than weights; they can run code")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation")
    run_command(parser, run)


def run(args: Namespace) -> None:
    evaluate(args.m, args.d, args.f, output=args.o, checkpoint_name=args.chk, device=args.device,
             step_size=args.step_size, mirroring=not args.disable_tta, trust=args.trust_checkpoints,
             overwrite=args.overwrite, progress=True)
    print((args.o / TABLE).read_text(encoding="utf-8").partition(PER_CASE)[0])
    print(f"wrote {args.o}: {TABLE} (also case by case), {CSV}, {DICE_FIGURE}, {OVERLAYS_FIGURE}, and for each model "
          f"{SUMMARY} and {PREDICTIONS}")
