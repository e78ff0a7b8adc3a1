from argparse import Namespace
from pathlib import Path

from nnunet_transplant.cli.common import add_output_arguments, command_parser, run_command
from nnunet_transplant.report_page import ANALYSES, write_report


def main() -> None:
    parser = command_parser(
        "report", "Writes one HTML page about a merged model: what was merged and how, its scores, and the figures of\n"
                  "the analyses. The page needs nothing beside itself: mail it, archive it with the model, print it.",
        "nnunet_transplant_report -m MERGED -evaluation EVALUATION -interference INTERFERENCE -o report.html")
    parser.add_argument("-m", type=Path, required=True, metavar="MERGED",
                        help="merged model folder, of which the page is")
    parser.add_argument("-evaluation", type=Path, nargs="+", default=[], metavar="DIR",
                        help="folders of nnunet_transplant_evaluate")
    for kind, analysis in ANALYSES.items():
        parser.add_argument(f"-{kind}", type=Path, metavar="DIR",
                            help=f"folder of nnunet_transplant_{kind} ({analysis.title.partition(': ')[2]})")
    add_output_arguments(parser, "page to write, such as report.html", "FILE", "an earlier report")
    run_command(parser, run)


def run(args: Namespace) -> None:
    analyses = {kind: getattr(args, kind) for kind in ANALYSES if getattr(args, kind) is not None}
    write_report(args.m, args.o, args.evaluation, analyses, args.overwrite)
    print(f"wrote {args.o}: open it in any browser")
