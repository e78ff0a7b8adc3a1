from argparse import ArgumentParser, Namespace
from pathlib import Path

from nnunetv2.inference.predict_from_raw_data import _getDefaultValue

from nnunet_transplant.cli.common import add_checkpoint_arguments, add_device_argument, command_parser, run_command
from nnunet_transplant.cli.merge import say
from nnunet_transplant.cli.steps import (
    add_held_back_arguments,
    add_model_arguments,
    add_step_arguments,
    add_step_options,
    add_volume_arguments,
    help_of_steps,
    merge_options,
)
from nnunet_transplant.device import torch_device
from nnunet_transplant.merging import merge, predict
from nnunet_transplant.prediction import check_prediction_options


def main() -> None:
    parser = command_parser(
        "predict", "Predicts with one merged model, or merges several on the fly and predicts with the result without\n"
                   "writing it. The options are those of nnunet_transplant_merge and of nnUNetv2_predict.",
        "nnunet_transplant_predict -i IMAGES -o PREDICTIONS -m TASK_901 TASK_902 -method ties",
        "nnunet_transplant_predict -i IMAGES -o PREDICTIONS -m MODEL [MODEL ...] [-align NAME] [-method NAME]\n"
        "                                 [-fit NAME ...] [-d DATASET ...] [more options]")
    required = parser.add_argument_group("required")
    required.add_argument("-i", type=Path, required=True, metavar="IMAGES",
                          help="folder of images, with channel numbers as nnU-Net wants them (CASE_0000.nii.gz)")
    required.add_argument("-o", type=Path, required=True, metavar="PREDICTIONS", help="folder to write to")
    add_step_arguments(parser)
    models = parser.add_argument_group("models (required: -m, -from, or a -recipe that names them)")
    add_model_arguments(models)
    add_checkpoint_arguments(models)
    add_held_back_arguments(models)
    volumes = parser.add_argument_group("volumes, for steps that look at some")
    add_volume_arguments(volumes)
    add_predict_arguments(parser)
    add_step_options(parser)
    help_of_steps(parser)
    run_command(parser, run)


def add_predict_arguments(parser: ArgumentParser) -> None:
    """nnUNetv2_predict's options, by its names and defaults."""
    group = parser.add_argument_group("predicting, as nnUNetv2_predict")
    add_device_argument(group)
    group.add_argument("-step_size", type=float, default=0.5, help="sliding window step, at most 1; default 0.5")
    group.add_argument("--disable_tta", action="store_true", help="no mirroring at test time: faster, less accurate")
    group.add_argument("--verbose", action="store_true", help="let nnU-Net talk")
    group.add_argument("--save_probabilities", action="store_true", help="also write the probabilities")
    group.add_argument("--continue_prediction", "--c", action="store_true", help="do not predict what is there")
    group.add_argument("-npp", type=int, default=_getDefaultValue("nnUNet_npp", int, 3),
                       help="processes for preprocessing; default 3. With -npp 0 -nps 0 none are started")
    group.add_argument("-nps", type=int, default=_getDefaultValue("nnUNet_nps", int, 3),
                       help="processes for export; default 3")
    group.add_argument("-prev_stage_predictions", metavar="FOLDER", help="for cascades: the previous stage's output")
    group.add_argument("-num_parts", type=int, default=1, help="in how many calls the cases are predicted; default 1")
    group.add_argument("-part_id", type=int, default=0, help="which of these calls this is, from 0")
    group.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    group.add_argument("--not_on_device", action="store_true", help="keep results in RAM: volumes too big for VRAM")


def run(args: Namespace) -> None:
    check_prediction_options(args.step_size, args.num_parts, args.part_id)
    torch_device(args.device)  # before the work
    merged = merge(progress=not args.disable_progress_bar, **merge_options(args))
    say(merged)
    predict(
        merged, args.i, args.o, device=args.device, step_size=args.step_size, mirroring=not args.disable_tta,
        on_device=not args.not_on_device, save_probabilities=args.save_probabilities,
        continue_prediction=args.continue_prediction, npp=args.npp, nps=args.nps,
        prev_stage_predictions=args.prev_stage_predictions, num_parts=args.num_parts, part_id=args.part_id,
        verbose=args.verbose, progress=not args.disable_progress_bar)
    print(f"wrote {args.o}\nkeep this model: nnunet_transplant_merge with the same options and -o MERGED")
