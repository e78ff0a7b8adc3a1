from argparse import Namespace
from pathlib import Path

from nnunet_transplant.cli.common import (
    add_checkpoint_arguments,
    add_output_arguments,
    command_parser,
    run_command,
)
from nnunet_transplant.extraction import extract
from nnunet_transplant.task_vector import DTYPES


def main() -> None:
    parser = command_parser(
        "extract", "Writes the task vector of a trained model, tau = theta - theta_0, with its heads, as one file to\n"
                   "share. nnunet_transplant_merge takes such files as -m, with the base as -base.",
        "nnunet_transplant_extract -m TASK_901 -f 0 -o anterior.safetensors -dtype float16 -density 0.3")
    parser.add_argument("-m", type=Path, required=True, metavar="MODEL",
                        help="trained model folder, or a checkpoint inside one")
    add_output_arguments(parser, "file to write, .safetensors", "FILE", "an existing file")
    parser.add_argument("-f", metavar="FOLD", help="fold to take, where the model folder has several")
    parser.add_argument("-base", type=Path, help="theta_0, where the model does not record it: model folder, "
                                                 "checkpoint or theta_0 file")
    parser.add_argument("-dtype", choices=tuple(DTYPES), default="float32",
                        help="type to store; float32 (default) without a density is lossless")
    parser.add_argument("-density", type=float, default=1.0,
                        help="share of entries to store, the largest of the task vector; default 1")
    add_checkpoint_arguments(parser)
    run_command(parser, run)


def run(args: Namespace) -> None:
    header = extract(args.m, args.o, fold=args.f, checkpoint_name=args.chk, base=args.base, dtype=args.dtype,
                     density=args.density, trust=args.trust_checkpoints, overwrite=args.overwrite)
    print(f"wrote {args.o} ({args.o.stat().st_size / 1e6:.1f} MB): add it to theta_0 with SHA-256 "
          f"{header.theta_0[:16]}...\nmerge it: nnunet_transplant_merge -m {args.o} ... -base BASE -o MERGED")
