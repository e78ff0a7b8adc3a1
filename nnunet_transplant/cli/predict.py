from argparse import ArgumentParser, Namespace
from pathlib import Path

from nnunetv2.inference.predict_from_raw_data import _getDefaultValue

from nnunet_transplant.cli.common import command_parser, run_command
from nnunet_transplant.cli.merge import add_merge_arguments, merge_from, report
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.prediction import (
    case_name,
    check_previous_stage,
    find_images,
    overflow_explained,
    predictor,
    torch_device,
)


def main() -> None:
    parser = command_parser(
        "predict", "Predicts with one merged model, or merges several on the fly and predicts with the result without\n"
                   "writing it. The options are those of nnunet_transplant_merge and of nnUNetv2_predict.",
        "nnunet_transplant_predict -i IMAGES -o PREDICTIONS -m TASK_901 TASK_902 -method ties")
    parser.add_argument("-i", type=Path, required=True, metavar="IMAGES",
                        help="folder of images, with channel numbers as nnU-Net wants them (CASE_0000.nii.gz)")
    parser.add_argument("-o", type=Path, required=True, metavar="PREDICTIONS", help="folder to write to")
    add_merge_arguments(parser)
    add_predict_arguments(parser)
    run_command(parser, run)


def add_predict_arguments(parser: ArgumentParser) -> None:
    """nnUNetv2_predict's options, by its names and defaults."""
    parser.add_argument("-step_size", type=float, default=0.5, help="sliding window step, at most 1; default 0.5")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring at test time: faster, less accurate")
    parser.add_argument("--verbose", action="store_true", help="let nnU-Net talk")
    parser.add_argument("--save_probabilities", action="store_true", help="also write the probabilities")
    parser.add_argument("--continue_prediction", "--c", action="store_true", help="do not predict what is there")
    parser.add_argument("-npp", type=int, default=_getDefaultValue("nnUNet_npp", int, 3),
                        help="processes for preprocessing; default 3. With -npp 0 -nps 0 none are started")
    parser.add_argument("-nps", type=int, default=_getDefaultValue("nnUNet_nps", int, 3),
                        help="processes for export; default 3")
    parser.add_argument("-prev_stage_predictions", metavar="FOLDER", help="for cascades: the previous stage's output")
    parser.add_argument("-num_parts", type=int, default=1, help="in how many calls the cases are predicted; default 1")
    parser.add_argument("-part_id", type=int, default=0, help="which of these calls this is, from 0")
    parser.add_argument("-device", default="cuda", help="cuda (default), cpu or mps")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    parser.add_argument("--not_on_device", action="store_true", help="keep results in RAM: volumes too big for VRAM")


def run(args: Namespace) -> None:
    if not 0 < args.step_size <= 1:
        raise TransplantError(f"-step_size must be above 0 and at most 1, not {args.step_size:g}")
    if not 0 <= args.part_id < args.num_parts:
        raise TransplantError(f"-part_id must lie between 0 and {args.num_parts - 1}, not {args.part_id}")
    device = torch_device(args.device)
    merged = list(merge_from(args).values())  # several where an earlier merge was of each fold: an ensemble
    for model in merged:
        report(model)
    nnunet = predictor(merged, device, args.step_size, not args.disable_tta, not args.not_on_device, args.verbose,
                       not args.disable_progress_bar)
    if nnunet.configuration_manager.previous_stage_name is not None and not args.prev_stage_predictions:
        raise TransplantError("this is the second stage of a cascade: give -prev_stage_predictions")
    cases = find_images(args.i, nnunet)
    ending = nnunet.dataset_json["file_ending"]
    names = [case_name(files, ending) for files in cases]
    if args.prev_stage_predictions:
        check_previous_stage(Path(args.prev_stage_predictions), names[args.part_id::args.num_parts], ending)
    args.o.mkdir(parents=True, exist_ok=True)
    options = {"save_probabilities": args.save_probabilities, "overwrite": not args.continue_prediction,
               "folder_with_segs_from_prev_stage": args.prev_stage_predictions}
    with overflow_explained():
        if args.npp == 0 and args.nps == 0:
            part = slice(args.part_id, None, args.num_parts)
            nnunet.predict_from_files_sequential(cases[part], [str(args.o / name) for name in names[part]], **options)
        else:
            nnunet.predict_from_files(str(args.i), str(args.o), num_processes_preprocessing=args.npp,
                                      num_processes_segmentation_export=args.nps, num_parts=args.num_parts,
                                      part_id=args.part_id, **options)
    print(f"wrote {args.o}")
