from argparse import ArgumentParser, Namespace
from pathlib import Path

from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merging import METHODS, MergedModel, merge_folders, write_merge
from nnunet_transplant.merging.merge import check_output
from nnunet_transplant.model_folder import CHECKPOINT


def main() -> None:
    parser = command_parser(
        "merge", "Merges trained nnU-Net models into one ordinary nnU-Net model folder.",
        "nnunet_transplant_merge -m TASK_901 TASK_902 -f 0 -o MERGED -method ties -density 0.2\n"
        "  nnunet_transplant_merge -m MODEL -f 0 1 2 3 4 -o ONE_MODEL_OF_FIVE_FOLDS")
    parser.add_argument("-o", type=Path, required=True, metavar="OUTPUT", help="model folder to write")
    add_merge_arguments(parser)
    parser.add_argument("--per_fold", action="store_true",
                        help="merge fold k of every model with fold k of the others instead of everything into one")
    parser.add_argument("-out_fold", type=int, metavar="N",
                        help="write fold_N instead of fold_all, for tools that take only numbers")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing merged model")
    run_command(parser, run)


def add_merge_arguments(parser: ArgumentParser) -> None:
    """What says how to merge, for every command that merges."""
    parser.add_argument("-m", type=Path, nargs="+", required=True, metavar="MODEL",
                        help="trained model folders, or checkpoints inside them")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to take from each model folder; default: all of "
                                                              "its numbered folds, else fold_all")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("-base", type=Path, help="theta_0 for models that do not record it: model folder or checkpoint")
    parser.add_argument("-method", default="average", metavar="NAME", help="; ".join(
        f"{method.name}: {method.summary}" for method in METHODS.values()) + "; default average")
    parser.add_argument("-weights", type=float, nargs="+", metavar="W", help="one number for each MODEL (its folds "
                        "share it): " + "; ".join(f"{m.name}: {m.weights_rule}" for m in METHODS.values()))
    for name in dict.fromkeys(p.name for method in METHODS.values() for p in method.parameters):
        owners = [(method, p) for method in METHODS.values() for p in method.parameters if p.name == name]
        text = "; ".join(f"{method.name}: {p.help}, default {p.default}" for method, p in owners)
        parser.add_argument(f"-{name}", type=str if owners[0][1].choices else float, metavar="X", help=text,
                            choices=owners[0][1].choices or None)
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load checkpoints that ask for more than weights; they can run code")


def merge_from(args: Namespace, per_fold: bool = False) -> dict[str, MergedModel]:
    """The merge that the arguments of `add_merge_arguments` ask for."""
    use_our_trainers()
    names = {p.name for method in METHODS.values() for p in method.parameters}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    return merge_folders(args.m, args.f, args.chk, args.base, args.method, args.weights, given, per_fold,
                         args.trust_checkpoints, progress=True)


def run(args: Namespace) -> None:
    if args.per_fold and args.out_fold is not None:
        raise TransplantError("-out_fold names the one fold that is written; with --per_fold there are several")
    check_output(args.o, args.overwrite)
    inputs = [path.resolve() for path in args.m]
    if any(args.o.resolve() in (path, *path.parents) for path in inputs):
        raise TransplantError(f"{args.o} is one of the models to merge, or holds one")
    merged = merge_from(args, args.per_fold)
    if args.out_fold is not None:
        merged = {str(args.out_fold): merged["all"]}
    write_merge(merged, args.o, args.overwrite)
    for model in merged.values():
        report(model)
    print(f"wrote {args.o} ({', '.join('fold_' + fold for fold in merged)})\n"
          f"predict with it: nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {args.o} "
          f"-f {' '.join(merged)}")


def report(model: MergedModel) -> None:
    inputs = model.provenance["inputs"]
    print(f"merged {len(inputs)} model{'s' if len(inputs) > 1 else ''} by {model.provenance['method']}; structures: "
          + ", ".join(name for name in model.dataset_json["labels"] if name not in ("background", "ignore")))
    for note in model.notes:
        print(f"note: {note}")
