import time
from argparse import Namespace
from pathlib import Path

from nnunet_transplant.cli.common import command_parser, run_command


def main() -> None:
    parser = command_parser(
        "demo", "The whole job on an embedded CT phantom, on a CPU, in minutes: pre-trains a base on one scanner,\n"
                "fine-tunes two tasks and a joint model on another, merges the tasks, scores and draws everything.",
        "nnunet_transplant_demo -o demo")
    parser.add_argument("-o", type=Path, default=Path("nnunet_transplant_demo"), metavar="OUT",
                        help="folder to write; default nnunet_transplant_demo")
    run_command(parser, run)


def run(args: Namespace) -> None:
    from nnunet_transplant.demo import run_demo  # slow import: -h stays quick

    start = time.time()
    table = run_demo(args.o)
    table.loc["mean"] = table.mean()
    print("\nDice on scanner B's validation cases; experts know two organs each, merged models and Joint all four:\n")
    print(table.to_string(float_format="{:.3f}".format, na_rep="-"))
    print(f"\nwrote {args.o} in {(time.time() - start) / 60:.0f} minutes: look at {args.o / 'demo.png'}; the commands "
          f"that ran are in {args.o / 'log.txt'}")
