from argparse import Namespace
from pathlib import Path

from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extract import extract
from nnunet_transplant.model_folder import CHECKPOINT
from nnunet_transplant.task_vector import DTYPES


def main() -> None:
    parser = command_parser(
        "extract", "Writes the task vector of a trained model, tau = theta - theta_0, with its heads, as one file to\n"
                   "share. nnunet_transplant_merge takes such files as -m, with the base as -base.",
        "nnunet_transplant_extract -m TASK_901 -f 0 -o anterior.safetensors -dtype float16 -density 0.3")
    parser.add_argument("-m", type=Path, required=True, metavar="MODEL",
                        help="trained model folder, or a checkpoint inside one")
    parser.add_argument("-o", type=Path, required=True, metavar="FILE", help="file to write, .safetensors")
    parser.add_argument("-f", metavar="FOLD", help="fold to take, where the model folder has several")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("-base", type=Path, help="theta_0, where the model does not record it: model folder, "
                                                 "checkpoint or theta_0 file")
    parser.add_argument("-dtype", choices=tuple(DTYPES), default="float32",
                        help="type to store; float32 (default) without a density is lossless")
    parser.add_argument("-density", type=float, default=1.0,
                        help="share of entries to store, the largest of the task vector; default 1")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load a checkpoint that asks for more than weights; it can run code")
    run_command(parser, run)


def run(args: Namespace) -> None:
    use_our_trainers()
    if args.o.exists() and not args.overwrite:
        raise TransplantError(f"{args.o} exists already; give another -o, or --overwrite to replace it")
    header = extract(args.m, args.o, args.f, args.chk, args.base, args.dtype, args.density, args.trust_checkpoints)
    print(f"wrote {args.o} ({args.o.stat().st_size / 1e6:.1f} MB): add it to theta_0 with SHA-256 "
          f"{header.theta_0[:16]}...\nmerge it: nnunet_transplant_merge -m {args.o} ... -base BASE -o MERGED")
