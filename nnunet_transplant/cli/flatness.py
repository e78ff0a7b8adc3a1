from argparse import ArgumentParser, Namespace
from pathlib import Path

from nnunet_transplant.analysis.flatness import FIGURE, JSON, TABLE, flatness, table
from nnunet_transplant.analysis.risk import volumes_of
from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.model_folder import CHECKPOINT


def main() -> None:
    parser = command_parser(
        "flatness", "Measures how wide the minimum is that each model lies in, on patches of a dataset's labelled\n"
                    "cases: the Fisher information, the largest eigenvalues of the Hessian and its trace, and what\n"
                    "task vectors of a base may add to its loss.",
        "nnunet_transplant_flatness -m STABLE PLASTIC -tasks TASK_901 TASK_902 -d 4 -f 0 -o FLATNESS")
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders, each fold by itself, or checkpoints inside them")
    add_patch_arguments(parser, 16)
    parser.add_argument("-o", type=Path, required=True, metavar="OUT", help="folder to write to")
    parser.add_argument("-tasks", type=Path, nargs="+", default=[], metavar="TASK",
                        help="models fine-tuned from those of -m, or task vector files: adds the bound of Eq. 7")
    parser.add_argument("-n_eigenvalues", type=int, default=10, help="of the Hessian; 0: only the Fisher; default 10")
    parser.add_argument("-n_probes", type=int, default=10, help="vectors that estimate the Hessian's trace; default 10")
    parser.add_argument("-batch_size", type=int, help="patches differentiated at once; default as the plans")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier measurement")
    run_command(parser, run)


def add_patch_arguments(parser: ArgumentParser, patches: int) -> None:
    """What commands share that look at patches of labelled cases."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or id of a dataset with the models' labels")
    parser.add_argument("-f", default="0", metavar="FOLD",
                        help="look at the validation cases of this fold of the dataset, or all; default 0")
    parser.add_argument("-cases", metavar="CASES", help="look at these instead: FILE, train:FOLD or val:FOLD")
    parser.add_argument("-n_patches", type=int, default=patches, help=f"patches to look at; default {patches}")
    parser.add_argument("-seed", type=int, default=0, help="seed of all random choices; default 0")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("-device", default="cuda", help="cuda (default) or cpu")
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load checkpoints that ask for more than weights; they can run code")


def run(args: Namespace) -> None:
    volumes = volumes_of(args.d, args.f, args.n_patches, args.cases, args.device)
    result = flatness(args.m, volumes, output=args.o, tasks=args.tasks, patches=args.n_patches,
                      eigenvalues=args.n_eigenvalues, probes=args.n_probes, batch_size=args.batch_size,
                      seed=args.seed, checkpoint_name=args.chk, trust=args.trust_checkpoints,
                      overwrite=args.overwrite, progress=True)
    print(table(result))
    print(f"wrote {args.o}: {JSON}, {TABLE} and {FIGURE}")
