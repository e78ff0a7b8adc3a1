from argparse import Namespace
from pathlib import Path

from nnunet_transplant.analysis.interference import CSV, FIGURE, JSON, TABLE, interference
from nnunet_transplant.cli.common import (
    add_checkpoint_arguments,
    add_output_arguments,
    command_parser,
    run_command,
)


def main() -> None:
    parser = command_parser(
        "interference", "Says from the weights alone where in the network fine-tuned models of one base collide:\n"
                        "norms of their task vectors, cosines, sign conflicts and overlap of the large entries, in\n"
                        "each stage of the U-Net.",
        "nnunet_transplant_interference -m TASK_901 TASK_902 TASK_903 -o INTERFERENCE")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders, checkpoints inside them, or task vector files; two or more")
    parser.add_argument("-base", type=Path, help="theta_0 for task vector files and for models that do not record it: "
                                                 "model folder, checkpoint or theta_0 file")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to take from each model folder, each a task "
                        "vector of its own; default: all of its numbered folds, else fold_all")
    parser.add_argument("-density", type=float, default=0.2, help="share of each task vector's entries that count as "
                        "large, as in TIES' trimming; default 0.2")
    add_output_arguments(parser, "folder to write to", earlier="an earlier analysis of interference")
    add_checkpoint_arguments(parser)
    run_command(parser, run)


def run(args: Namespace) -> None:
    interference(args.m, output=args.o, folds=args.f, checkpoint_name=args.chk, base=args.base, density=args.density,
                 trust=args.trust_checkpoints, overwrite=args.overwrite, progress=True)
    print((args.o / TABLE).read_text(encoding="utf-8"))
    print(f"wrote {args.o}: {TABLE}, {FIGURE}, {CSV} and {JSON}\n"
          f"put it on the page of a merge: nnunet_transplant_report -m MERGED -interference {args.o} -o report.html")
