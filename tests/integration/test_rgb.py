"""Photographs with their three channels in one PNG, in 2d: the whole job by the real commands."""
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import fork_command
from factory import write_json, write_narrow_plans
from skimage import io

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:skimage")]

PARENT = "Dataset831_Photographs"
SHORT = "1epochs_2iterations"


def write_photographs(folder: Path, cases: int = 6) -> None:
    """A red and a blue square on noise. The file has no name for its channels but R, G and B."""
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for case in range(cases):
        image = rng.integers(0, 60, (34, 38, 3)).astype(np.uint8)
        label = np.zeros((34, 38), np.uint8)
        for value, channel in ((1, 0), (2, 2)):
            row, column = rng.integers(0, 22), rng.integers(0, 9) + 19 * (value - 1)
            image[row:row + 10, column:column + 10, channel] += 180
            label[row:row + 10, column:column + 10] = value
        io.imsave(folder / "imagesTr" / f"photo_{case}_0000.png", image, check_contrast=False)
        io.imsave(folder / "labelsTr" / f"photo_{case}.png", label, check_contrast=False)
    write_json(folder / "dataset.json", {
        "channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "Red": 1, "Blue": 2},
        "numTraining": cases, "file_ending": ".png"})


def test_the_whole_job_on_rgb(nnunet: Path) -> None:
    write_photographs(nnunet / "raw" / PARENT)
    fork_command("nnUNetv2_plan_and_preprocess", "-d", 831, "-c", "2d", "-npfp", 1, "-np", 1)
    write_narrow_plans(nnunet / "preprocessed" / PARENT / "nnUNetPlans.json", "2d")

    def train(number: int, kind: str, *more: object) -> Path:
        trainer = f"nnUNetTrainer{kind}_{SHORT}"
        fork_command("nnUNetv2_train", number, "2d", 0, "-tr", trainer, "-device", "cpu", *more)
        (dataset,) = (nnunet / "results").glob(f"Dataset{number}_*")
        return dataset / f"{trainer}__nnUNetPlans__2d"

    base = train(831, "Stable") / "fold_0" / "checkpoint_final.pth"
    fork_command("nnunet_transplant_split_tasks", "-d", 831, "-tasks", "Red=Red", "Blue=Blue", "-ids", 832, 833,
                 "-np", 1)
    experts = [train(number, "TaskVector", "-pretrained_weights", base) for number in (832, 833)]
    look = ["-d", 831, "-cases", "train:0", "-n_cases", 2]
    merged = nnunet / "merged"
    fork_command("nnunet_transplant_merge", "-m", *experts, "-method", "fisher", "-fit", "head", *look, "-device",
                 "cpu", "-o", merged)

    images = nnunet / "raw" / PARENT / "imagesTr"
    options = ["-i", images, "-m", merged, "-device", "cpu"]
    fork_command("nnunet_transplant_predict", *options, "-o", nnunet / "ours", "-npp", 0, "-nps", 0)
    fork_command("nnUNetv2_predict_from_modelfolder", *options, "-o", nnunet / "stock", "-f", "all", "-npp", 1,
                 "-nps", 1)
    names = sorted(path.name for path in (nnunet / "stock").glob("*.png"))
    assert names == [f"photo_{case}.png" for case in range(6)]
    for name in names:
        np.testing.assert_array_equal(io.imread(nnunet / "ours" / name), io.imread(nnunet / "stock" / name))

    done = fork_command("nnunet_transplant_evaluate", "-m", merged, *experts, "-d", 831, "-f", 0, "-device", "cpu",
                        "-o", nnunet / "scores")
    assert re.search(r"^Red +\d", done.stdout, re.M) and re.search(r"^Blue +\d", done.stdout, re.M)
    fork_command("nnunet_transplant_sweep", "-m", *experts, "-d", 831, "-f", "all", "-n_cases", 2, "-trials", 2,
                 "-device", "cpu", "-o", nnunet / "sweep")
    assert (nnunet / "sweep" / "recipe.json").is_file()

    few = nnunet / "grey"
    few.mkdir()
    io.imsave(few / "grey_0000.png", io.imread(images / "photo_0_0000.png")[..., 0], check_contrast=False)
    refused = fork_command("nnunet_transplant_predict", "-i", few, "-o", nnunet / "none", "-m", merged,
                           "-device", "cpu", expect=1)
    assert refused.stderr == (f"nnunet_transplant_predict: error: the model takes 3 channels, but case grey of {few} "
                              "has 1\n")
    shutil.rmtree(few)
    assert not (nnunet / "none").exists() and os.listdir(nnunet / "ours")
