from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.files import read_json
from nnunet_transplant.merging import (
    METHODS,
    MergedModel,
    Recipe,
    Volumes,
    merge_groups,
    merge_shared,
    write_merge,
    write_shared,
)
from nnunet_transplant.merging.align import network_spec
from nnunet_transplant.merging.merge import check_merge_output
from nnunet_transplant.merging.registry import find
from nnunet_transplant.merging.repeat import Earlier, read_merge
from nnunet_transplant.model_folder import CHECKPOINT, TrainedModel, open_models, open_theta_0


def main() -> None:
    parser = command_parser(
        "merge", "Merges trained nnU-Net models into one ordinary nnU-Net model folder.",
        "nnunet_transplant_merge -m TASK_901 TASK_902 -f 0 -o MERGED -method ties -density 0.2\n"
        "  nnunet_transplant_merge -m MODEL -f 0 1 2 3 4 -o ONE_MODEL_OF_FIVE_FOLDS\n"
        "  nnunet_transplant_merge -from MERGED -drop Anterior -m TASK_903 -o MERGED_ANEW")
    parser.add_argument("-o", type=Path, metavar="OUTPUT", help="model folder to write")
    add_merge_arguments(parser)
    parser.add_argument("--per_fold", action="store_true",
                        help="merge fold k of every model with fold k of the others instead of everything into one")
    parser.add_argument("-out_fold", type=int, metavar="N",
                        help="write fold_N instead of fold_all, for tools that take only numbers")
    parser.add_argument("-share", nargs="+", metavar="PATTERN", help="with methods that align: merge only tensors with "
                        "such a name (as 'encoder.*'), and write a model for each input, with the rest its own, side "
                        "by side in OUTPUT")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing merged model")
    parser.add_argument("--show_spec", action="store_true", help="only print which units of the first model's network "
                        "may change places: the segments of tensors that share one permutation")
    run_command(parser, run)


def add_merge_arguments(parser: ArgumentParser) -> None:
    """What says how to merge, for every command that merges."""
    parser.add_argument("-m", type=Path, nargs="+", default=[], metavar="MODEL",
                        help="trained model folders, checkpoints inside them, or task vector files")
    parser.add_argument("-from", dest="earlier", type=Path, metavar="MERGED",
                        help="start from this earlier merge: its models and its options, -m adds models to it")
    parser.add_argument("-drop", nargs="+", default=[], metavar="NAME", help="leave out these models of the earlier "
                        "merge: a structure, a dataset's name or a model's path")
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds to take from each model folder; default: all of "
                                                              "its numbered folds, else fold_all")
    parser.add_argument("-chk", default=CHECKPOINT, metavar="NAME", help=f"checkpoint to take; default {CHECKPOINT}")
    parser.add_argument("-base", type=Path, help="theta_0 for task vector files and for models that do not record it: "
                                                 "model folder, checkpoint or theta_0 file")
    parser.add_argument("-method", metavar="NAME", help="merging method, listed below; default average")
    rules: dict[str, list[str]] = {}
    for method in METHODS.values():
        rules.setdefault(method.weights_rule.text, []).append(method.name)
    parser.add_argument("-weights", type=number_or_file, nargs="+", metavar="W", help="one number for each MODEL (its "
                        "folds share it): " + "; ".join(f"{', '.join(names)}: {rule}" for rule, names in rules.items())
                        + "; or @FILE: with the weights.json of nnunet_transplant_sweep, its method and parameters")
    parser.add_argument("-keep_base_for", nargs="+", metavar="PATTERN", help="leave tensors with such a name (as "
                        "'encoder.stages.0.*' or '*norm*') at theta_0")
    parser.add_argument("-stage_weights", type=float, nargs="+", metavar="W", help="factors for the merged task vector "
                        "by stage: those of the encoder from full to lowest resolution, then those of the decoder up")
    parser.add_argument("-d", nargs="+", metavar="DATASET", help="dataset(s) whose volumes a method may look at: "
                        + "; ".join(f"{m.name}: {m.needs[-1]}" for m in METHODS.values() if m.needs_data))
    parser.add_argument("-n_cases", type=int, default=8, metavar="N", help="how many volumes of each; default 8")
    parser.add_argument("-cases", metavar="FILE|train:K|val:K", help="take them from these cases; default all")
    parser.add_argument("--fit_head", action="store_true", default=None, help="after merging, fit the head without "
                        "labels to what the ensemble of the models says of the volumes")
    parser.add_argument("-polish", type=int, metavar="N", help="after merging, N steps without labels towards what the "
                        "ensemble of the models says of the volumes; default 0")
    parser.add_argument("-polish_lr", type=float, metavar="LR", help="their learning rate (AdamW); default 0.001")
    parser.add_argument("-data_device", choices=("cpu", "cuda"), default="cpu", help="where methods with volumes run "
                        "the networks; default cpu")
    add_method_parameters(parser)
    add_same_channels(parser)
    parser.add_argument("--trust_checkpoints", action="store_true",
                        help="load checkpoints that ask for more than weights; they can run code")
    parser.epilog += "\n\nmethods:\n" + "\n".join(
        f"  {method.name:<16}{method.summary}" + f" [needs {', '.join(method.needs)}]" * bool(method.needs)
        for method in METHODS.values())


def add_method_parameters(parser: ArgumentParser, but: Sequence[str] = ()) -> None:
    """A flag for each parameter that some method has, except those that the command has a flag of its own for."""
    group = parser.add_argument_group("parameters of the methods")
    for name in dict.fromkeys(p.name for method in METHODS.values() for p in method.parameters):
        if name in but:
            continue
        owners = [(method, p) for method in METHODS.values() for p in method.parameters if p.name == name]
        text = "; ".join(f"{', '.join(method.name for method, p in owners if (p.help, p.default) == said)}: "
                         f"{said[0]}, default {said[1]}" for said in dict.fromkeys((p.help, p.default)
                                                                                    for _, p in owners))
        group.add_argument(f"-{name}", type=owners[0][1].kind, metavar="X", help=text,
                           choices=owners[0][1].choices or None)


def add_same_channels(parser: ArgumentParser) -> None:
    parser.add_argument("--same_channels", action="store_true", default=None, help="merge models whose image channels "
                        "are called differently: you know that they are the same")


def number_or_file(text: str) -> float | str:
    return text if text.startswith("@") else float(text)


def with_weights_file(args: Namespace) -> Namespace:
    """With -weights @FILE the arguments as if the file's weights, method and parameters had been given; parameters that
    were given go before those of the file. Raises TransplantError for a file of another method or of other models."""
    files = [given for given in args.weights or [] if isinstance(given, str)]
    if not files:
        return args
    path = Path(files[0][1:])
    if len(args.weights) > 1:
        raise TransplantError("-weights takes either numbers or one @FILE")
    found = read_json(path)
    method, parameters, weights, models = (found.get(key) for key in ("method", "parameters", "weights", "models"))
    if not (isinstance(method, str) and isinstance(parameters, dict) and _is_list(models, str)
            and (weights is None or _is_list(weights, (int, float)))):
        raise TransplantError(f"{path} is no weights file: nnunet_transplant_sweep writes one")
    if args.method not in (None, method):
        raise TransplantError(f"{path} has the weights of method {method}: leave out -method {args.method}")
    given = [str(model.resolve()) for model in args.m]
    if args.earlier is None and (len(given) != len(models) or (given != models and sorted(given) == sorted(models))):
        what = f"{len(models)} models, not {len(given)}" if len(given) != len(models) else "the models in another order"
        raise TransplantError(f"{path} has the weights of {what}: {' '.join(models)}")
    known = find(method).settings(parameters)  # also refuses what is no parameter
    missing = {name: value for name, value in known.items() if getattr(args, name, None) is None}
    return Namespace(**vars(args) | missing | {"method": method, "weights": weights})


def _is_list(value: Any, of: type | tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(each, of) for each in value)


def recipe_from(args: Namespace, start: Recipe) -> Recipe:
    """The recipe that the arguments ask for; what they do not say is as in `start`, if its method stays."""
    args = with_weights_file(args)
    names = {p.name for method in METHODS.values() for p in method.parameters}
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    recipe = start if args.method in (None, start.method) else Recipe(
        args.method, keep_base_for=start.keep_base_for, stage_weights=start.stage_weights,
        volumes=start.volumes if find(args.method).needs_data or start.polish or start.fit_head else None,
        fit_head=start.fit_head, polish=start.polish, polish_lr=start.polish_lr, same_channels=start.same_channels)
    recipe = replace(recipe, parameters={**recipe.parameters, **given})
    for name in ("weights", "keep_base_for", "stage_weights", "fit_head", "polish", "polish_lr", "share",
                 "same_channels"):
        if getattr(args, name, None) is not None:
            recipe = replace(recipe, **{name: getattr(args, name)})
    if args.d is not None:
        recipe = replace(recipe, volumes=Volumes(args.d, args.n_cases, args.cases, args.data_device))
    return recipe


def merge_from(args: Namespace, per_fold: bool = False) -> dict[str, MergedModel]:
    """The merge that the arguments of `add_merge_arguments` ask for."""
    use_our_trainers()
    earlier = Earlier([], Recipe(), None) if args.earlier is None else read_merge(args.earlier)
    if earlier.per_fold and getattr(args, "out_fold", None) is not None:
        raise TransplantError("-out_fold names the one fold that is written; that earlier merge has several: "
                              + " ".join(earlier.folds))
    kept = earlier.without(args.drop)
    recipe = recipe_from(args, earlier.recipe)
    if args.weights is None and recipe.weights is not None and (args.m or args.drop):
        raise TransplantError("the earlier merge had -weights of its own: give new ones for the models of this one, "
                              f"{len(kept.inputs)} kept and {len(args.m)} new")
    base = args.base or earlier.base
    theta_0 = None if base is None else open_theta_0(base, args.chk, args.trust_checkpoints)
    groups = _open(args, kept, theta_0)
    if recipe.share:
        if not hasattr(args, "share"):
            raise TransplantError("models that share only a part are several: nnunet_transplant_merge writes them")
        if per_fold or args.out_fold is not None:
            raise TransplantError("-share writes a model for each input: leave out --per_fold and -out_fold")
        return merge_shared(groups, recipe, theta_0, base, progress=True)
    return merge_groups(groups, recipe, theta_0, base, per_fold or earlier.per_fold, progress=True)


def _open(args: Namespace, kept: Earlier, theta_0: dict | None) -> list[list[TrainedModel]]:
    groups = []
    for each in kept.inputs:
        each.check()
        groups.append([model for path in each.files
                       for model in open_models(path, trust=args.trust_checkpoints, theta_0=theta_0)])
    groups += [open_models(path, args.f, args.chk, args.trust_checkpoints, theta_0) for path in args.m]
    if not groups:
        raise TransplantError("no model is left to merge" if args.drop else "give the models to merge with -m")
    return groups


def run(args: Namespace) -> None:
    if args.show_spec:
        use_our_trainers()
        model = _open(args, Earlier([], Recipe(), None), None)[0][0]
        print(network_spec(model, model.trainer).text())
        return
    if args.o is None:
        raise TransplantError("give the model folder to write with -o")
    if args.per_fold and args.out_fold is not None:
        raise TransplantError("-out_fold names the one fold that is written; with --per_fold there are several")
    check_merge_output(args.o, args.overwrite, [*args.m, *([] if args.earlier is None else [args.earlier])])
    merged = merge_from(args, args.per_fold)
    if next(iter(merged.values())).provenance["share"]:
        write_shared(merged, args.o, args.overwrite)
        print(f"wrote {', '.join(str(args.o / name) for name in merged)}")
        return
    if args.out_fold is not None:
        merged = {str(args.out_fold): merged["all"]}
    write_merge(merged, args.o, args.overwrite)
    for model in merged.values():
        report(model)
    done = model.provenance
    if len(done["inputs"]) > 1 and not done["fit_head"] and not done["polish"]:
        print("note: the heads were trained on other networks than the merged one: --fit_head -d DATASET fits them "
              "with a few images, without labels, and mostly helps much")
    print(f"wrote {args.o} ({', '.join('fold_' + fold for fold in merged)})\n"
          f"predict with it: nnUNetv2_predict_from_modelfolder -i IMAGES -o PREDICTIONS -m {args.o} "
          f"-f {' '.join(merged)}")


def report(model: MergedModel) -> None:
    inputs = model.provenance["inputs"]
    print(f"merged {len(inputs)} model{'s' if len(inputs) > 1 else ''} by {model.provenance['method']}; structures: "
          + ", ".join(name for name in model.dataset_json["labels"] if name not in ("background", "ignore")))
    for note in model.notes:
        print(f"note: {note}")
