from argparse import ArgumentParser, Namespace
from pathlib import Path

from nnunet_transplant.analysis.flatness import FIGURE, JSON, TABLE, flatness, table
from nnunet_transplant.cli.common import (
    add_case_arguments,
    add_checkpoint_arguments,
    add_device_argument,
    add_output_arguments,
    command_parser,
    run_command,
)


def main() -> None:
    parser = command_parser(
        "flatness", "Measures how wide the minimum is that each model lies in, on patches of a dataset's labelled\n"
                    "cases: the Fisher information, the largest eigenvalues of the Hessian and its trace, and what\n"
                    "task vectors of a base may add to its loss.",
        "nnunet_transplant_flatness -m STABLE PLASTIC -tasks TASK_901 TASK_902 -d 4 -f 0 -o FLATNESS")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders, each fold by itself, or checkpoints inside them")
    add_patch_arguments(parser, 16)
    add_output_arguments(parser, "folder to write to", earlier="an earlier measurement")
    parser.add_argument("-tasks", type=Path, nargs="+", default=[], metavar="TASK",
                        help="models fine-tuned from those of -m, or task vector files: adds the bound of Eq. 7")
    parser.add_argument("-n_eigenvalues", type=int, default=10, help="of the Hessian; 0: only the Fisher; default 10")
    parser.add_argument("-n_probes", type=int, default=10, help="vectors that estimate the Hessian's trace; default 10")
    parser.add_argument("-batch_size", type=int, help="patches differentiated at once; default as the plans")
    run_command(parser, run)


def add_patch_arguments(parser: ArgumentParser, patches: int) -> None:
    """What commands share that look at patches of labelled cases."""
    add_case_arguments(parser, "looked at, with the models' labels")
    parser.add_argument("-n_patches", type=int, default=patches, help=f"patches to look at; default {patches}")
    parser.add_argument("-seed", type=int, default=0, help="seed of all random choices; default 0")
    add_device_argument(parser)
    add_checkpoint_arguments(parser)


def run(args: Namespace) -> None:
    result = flatness(args.m, args.d, args.f, output=args.o, tasks=args.tasks, cases=args.cases, n_cases=args.n_cases,
                      n_patches=args.n_patches, n_eigenvalues=args.n_eigenvalues, n_probes=args.n_probes,
                      batch_size=args.batch_size, seed=args.seed, checkpoint_name=args.chk, device=args.device,
                      trust=args.trust_checkpoints, overwrite=args.overwrite, progress=True)
    print(table(result))
    print(f"wrote {args.o}: {JSON}, {TABLE} and {FIGURE}\n"
          f"put it on the page of a merge: nnunet_transplant_report -m MERGED -flatness {args.o} -o report.html")
