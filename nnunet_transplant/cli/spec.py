from argparse import Namespace
from pathlib import Path

from nnunet_transplant.alignment.aligners import spec
from nnunet_transplant.cli.common import add_checkpoint_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(
        "spec", "Prints which units of a model's network may change places: the segments of tensors that share one\n"
                "permutation, as aligners use them.",
        "nnunet_transplant_spec -m MODEL")
    parser.add_argument("-m", type=Path, required=True, metavar="MODEL",
                        help="trained model folder, checkpoint inside one, or task vector file")
    parser.add_argument("-base", type=Path, help="theta_0 of a task vector file")
    add_checkpoint_arguments(parser)
    run_command(parser, run)


def run(args: Namespace) -> None:
    print(spec(args.m, base=args.base, checkpoint_name=args.chk, trust=args.trust_checkpoints).text())
    print("align models by it: nnunet_transplant_merge -m MODEL MODEL -align rebasin -o MERGED")
