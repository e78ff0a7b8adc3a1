from argparse import Namespace

from nnunet_transplant.check import table_of
from nnunet_transplant.cli.common import (
    add_checkpoint_arguments,
    add_device_argument,
    add_output_arguments,
    command_parser,
    run_command,
)
from nnunet_transplant.cli.steps import (
    add_held_back_arguments,
    add_model_arguments,
    add_step_arguments,
    add_step_options,
    add_volume_arguments,
    help_of_steps,
    merge_options,
)
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.merged_model import Merged, check_merge_output
from nnunet_transplant.merging import merge
from nnunet_transplant.record import read_merge


def main() -> None:
    parser = command_parser(
        "merge", "Merges trained nnU-Net models into one ordinary nnU-Net model folder: align, merge, fit.",
        "nnunet_transplant_merge -m TASK_901 TASK_902 -f 0 -fit head -d 901 -o MERGED\n"
        "  nnunet_transplant_merge -m TASK_901 TASK_902 -method ties -density 0.3 -o MERGED\n"
        "  nnunet_transplant_merge -m MODEL -f 0 1 2 3 4 -align mudsc -units zip -fit head -d 4 -o ONE_OF_FIVE_FOLDS\n"
        "  nnunet_transplant_merge -from MERGED -drop Anterior -m TASK_903 -o MERGED_ANEW",
        "nnunet_transplant_merge -m MODEL [MODEL ...] -o OUT [-align NAME] [-method NAME] [-fit NAME ...]\n"
        "                               [-d DATASET ...] [more options]")
    required = parser.add_argument_group("required")
    add_output_arguments(required, "model folder to write", earlier="an existing merged model")
    add_step_arguments(parser)
    models = parser.add_argument_group("models (required: -m, -from, or a -recipe that names them)")
    add_model_arguments(models)
    add_checkpoint_arguments(models)
    volumes = parser.add_argument_group("volumes, for steps that look at some")
    add_volume_arguments(volumes)
    add_device_argument(volumes, "where networks run for this")
    more = parser.add_argument_group("more")
    more.add_argument("--per_fold", action="store_true",
                      help="merge fold k of every model with fold k of the others instead of everything into one")
    more.add_argument("-out_fold", type=int, metavar="N",
                      help="write fold_N instead of fold_all, for tools that take only numbers")
    add_held_back_arguments(more)
    more.add_argument("-share", nargs="+", metavar="PATTERN", help="with -align: merge only tensors with such a name "
                      "(as 'encoder.*'), and write a model for each input, with the rest its own, side by side in OUT")
    add_step_options(parser)
    help_of_steps(parser)
    run_command(parser, run)


def run(args: Namespace) -> None:
    if args.out_fold is not None:
        if args.out_fold < 0:
            raise TransplantError(f"-out_fold must not be negative, not {args.out_fold}")
        if args.per_fold:
            raise TransplantError("-out_fold names the one fold that is written; with --per_fold there are several")
        if args.share:
            raise TransplantError("-share writes a model for each input: leave out --per_fold and -out_fold")
        if args.earlier is not None and (earlier := read_merge(args.earlier)).per_fold:
            raise TransplantError("-out_fold names the one fold that is written; that earlier merge has several: "
                                  + " ".join(earlier.folds))
    check_merge_output(args.o, args.overwrite, [*args.m, *([] if args.earlier is None else [args.earlier])])
    merged = merge(share=args.share, per_fold=args.per_fold, progress=True, **merge_options(args))
    merged.save(args.o, fold=args.out_fold, overwrite=args.overwrite)
    say(merged)
    if merged.side_by_side:
        print(f"wrote {', '.join(str(args.o / name) for name in merged)}")
        return
    recipe = merged.provenance["recipe"]
    if len(merged.provenance["inputs"]) > 1 and not recipe["fit"] and "default" not in merged.provenance:
        print("note: the heads were trained on other networks than the merged one: -fit head -d DATASET fits them "
              "with a few images, without labels, and mostly helps much")
    folds = list(merged) if args.out_fold is None else [str(args.out_fold)]
    print(f"wrote {args.o} ({', '.join('fold_' + fold for fold in folds)})\n"
          f"predict with it: nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {args.o} "
          f"-f {' '.join(folds)}\n"
          f"score it: nnunet_transplant_evaluate -m {args.o} -d DATASET -o EVALUATION")


def say(merged: Merged) -> None:
    """What was merged, and how."""
    inputs = len(merged.provenance["inputs"])
    print(f"merged {inputs} model{'s' * (inputs > 1)} by "
          + " + ".join(step["name"] for step in merged.provenance["steps"])
          + (f" (the default for {merged.provenance['default']})" if "default" in merged.provenance else "")
          + f"; structures: {', '.join(merged.structures)}")
    check = merged.provenance.get("check")
    if check is not None:
        print(f"agreement with the experts (Dice) on {check['patches']} patches"
              + (" that no step looked at" if check["held_back"] else ", all of which the steps looked at, too")
              + f":\n{table_of(check['agreement'])}")
    for note in merged.notes:
        print(f"note: {note}")
