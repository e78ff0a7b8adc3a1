"""How long scoring models takes: nnU-Net's own commands beside nnunet_transplant_evaluate.

    python benchmarks/evaluate_speed.py -m CHECKPOINT [CHECKPOINT ...] -d DATASET [-n_cases 8] [-device cpu]

The models are checkpoints in their folds (MODEL/fold_0/checkpoint_final.pth) with the dataset's own labels, as nnU-Net
scores no others; it must find their trainers (nnUNet_extTrainer). Stock is nnUNetv2_predict_from_modelfolder
(nnUNetv2_predict, but for how it finds the model) and nnUNetv2_evaluate_folder, once for each model, with their default
numbers of processes. Rows: one case and one model, n_cases and one model, n_cases and all models.

Commands as a user types them: Python and torch are started, too. The two take turns, and the fastest turn of each
counts: seconds, and in brackets seconds of processor time with all child processes. Stops where the label maps are not
the same files. Prints Markdown.
"""
import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from merge_speed import Seconds

from nnunet_transplant.data.cases import Cases, evaluation_cases

STOCK, OURS = "nnUNetv2_predict_from_modelfolder", "nnunet_transplant_evaluate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, nargs="+", required=True, help="checkpoints in their folds")
    parser.add_argument("-d", required=True, help="dataset")
    parser.add_argument("-n_cases", type=int, default=8)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-repeats", type=int, default=1)
    args = parser.parse_args()
    for program in (STOCK, "nnUNetv2_evaluate_folder", OURS):
        execute(program, "-h")  # so that what they import is in the file cache for both
    print("| | stock (s) | nnunet_transplant_evaluate (s) | ours / stock |\n|" + " --- |" * 4)
    for n_cases, models in ((1, args.m[:1]), (args.n_cases, args.m[:1]), (args.n_cases, args.m)):
        best = {STOCK: Seconds(), OURS: Seconds()}
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory() as folder:
                work = Path(folder)
                cases = write_cases(work, evaluation_cases(args.d, "all", None, n_cases))
                taken = {STOCK: stock(models, work, args.device), OURS: ours(models, args.d, work, args.device)}
                check_same(work, models, cases)
            best = {name: Seconds(*map(min, best[name], taken[name])) for name in best}
        ratio = best[OURS] / best[STOCK]
        print(f"| {n_cases} case{'s' * (n_cases > 1)}, {len(models)} model{'s' * (len(models) > 1)} | {best[STOCK]} | "
              f"{best[OURS]} | {ratio} |", flush=True)


def write_cases(work: Path, cases: Cases) -> list[str]:
    """What both want to see: folders of images and labels, and a list of cases. The names of their label maps."""
    ending = cases.dataset_json["file_ending"]
    for part in ("images", "labels"):
        (work / part).mkdir()
    for case, files in cases.files.items():
        for channel, image in enumerate(files["images"]):
            shutil.copy(image, work / "images" / f"{case}_{channel:04}{ending}")
        shutil.copy(files["label"], work / "labels" / f"{case}{ending}")
    (work / "cases.txt").write_text("\n".join(cases.files))
    return [f"{case}{ending}" for case in cases.files]


def stock(models: Sequence[Path], work: Path, device: str) -> Seconds:
    start = now()
    for index, checkpoint in enumerate(models):
        fold, model = checkpoint.parent, checkpoint.parents[1]
        predicted = work / f"stock_{index}"
        execute(STOCK, "-i", work / "images", "-o", predicted, "-m", model, "-f", fold.name.removeprefix("fold_"),
                "-chk", checkpoint.name, "-device", device)
        execute("nnUNetv2_evaluate_folder", work / "labels", predicted, "-djfile", model / "dataset.json",
                "-pfile", model / "plans.json")
    return since(start)


def ours(models: Sequence[Path], dataset: str, work: Path, device: str) -> Seconds:
    start = now()
    execute(OURS, "-m", *models, "-d", dataset, "-cases", work / "cases.txt", "-o", work / "ours", "-device", device)
    return since(start)


def check_same(work: Path, models: Sequence[Path], cases: Sequence[str]) -> None:
    for case in cases:
        found = sorted(path.read_bytes() for path in (work / "ours").glob(f"*/predictions/{case}"))
        expected = sorted((work / f"stock_{index}" / case).read_bytes() for index in range(len(models)))
        if found != expected:
            sys.exit(f"the label maps of {case} differ")


def execute(program: str, *arguments: Path | str) -> None:
    done = subprocess.run([str(Path(sys.executable).with_name(program)), *map(str, arguments)], capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"{program} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def now() -> Seconds:
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(time.perf_counter(), of_children.ru_utime + of_children.ru_stime)


def since(start: Seconds) -> Seconds:
    end = now()
    return Seconds(end.wall - start.wall, end.processor - start.processor)


if __name__ == "__main__":
    main()
