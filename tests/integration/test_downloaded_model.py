"""A model folder that is alone on the machine, without the data it was planned and trained on, is a base."""
import json
import re
import shutil
from pathlib import Path

import pytest
from commands import fork_command
from factory import write_planned_phantom

from nnunet_transplant.data.phantom import write_phantom_dataset
from nnunet_transplant.data.task_dataset import split_tasks
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.model_folder import open_models

pytestmark = pytest.mark.slow

SHORT = "1epochs_2iterations"
OURS = "Dataset842_Ours"


@pytest.fixture(scope="module")
def downloaded(nnunet: Path) -> Path:
    """A trained model of stock nnU-Net's kind, moved away from a machine whose datasets are gone; and data of our own
    that nobody has planned or preprocessed."""
    name = write_planned_phantom(nnunet, 841)
    plans = nnunet / "preprocessed" / name / "nnUNetPlans.json"
    plans.write_text(json.dumps(json.loads(plans.read_text()) | {"plans_name": "TheirPlans"}))
    plans.rename(plans.with_name("TheirPlans.json"))
    trainer = f"nnUNetTrainerStable_{SHORT}"
    fork_command("nnUNetv2_train", 841, "3d_fullres", 0, "-tr", trainer, "-p", "TheirPlans", "-device", "cpu")
    model = nnunet / "downloads" / "a model"
    shutil.move(nnunet / "results" / name / f"{trainer}__TheirPlans__3d_fullres", model)
    for folder in ("raw", "preprocessed", "results"):
        shutil.rmtree(nnunet / folder / name)
    write_phantom_dataset(nnunet / "raw" / OURS, 5, "B", seed=3, labels="plain", shape=(24, 28, 36))
    return model


def test_from_a_downloaded_model_to_a_merged_one(nnunet: Path, downloaded: Path) -> None:
    done = fork_command("nnunet_transplant_split_tasks", "-d", 842, "-plans_from", downloaded, "-np", 1,
                        "-tasks", "Liver=Liver", "Kidney=Kidney", "-ids", 843, 844)
    assert "note" not in done.stdout and not (nnunet / "preprocessed" / OURS).exists()
    base = downloaded / "fold_0" / "checkpoint_final.pth"
    commands = re.findall("train: (nnUNetv2_train .*)", done.stdout)
    assert commands == [f"nnUNetv2_train {number} 3d_fullres 0 -p TheirPlans -tr nnUNetTrainerTaskVector "
                        f"-pretrained_weights {base}" for number in (843, 844)]
    for number in (843, 844):
        fork_command("nnUNetv2_train", number, "3d_fullres", 0, "-p", "TheirPlans", "-tr",
                     f"nnUNetTrainerTaskVector_{SHORT}", "-pretrained_weights", base, "-device", "cpu")
    experts = [nnunet / "results" / name / f"nnUNetTrainerTaskVector_{SHORT}__TheirPlans__3d_fullres"
               for name in ("Dataset843_Liver", "Dataset844_Kidney")]
    fork_command("nnunet_transplant_merge", "-m", *experts, "-method", "ties", "-o", nnunet / "merged")
    (merged,) = open_models(nnunet / "merged")
    assert set(merged.dataset_json["labels"]) == {"background", "Liver", "Kidney"}


def split(nnunet: Path, **changes: object) -> object:
    return split_tasks(**{"dataset": 842, "tasks": ["Spleen=Spleen"], "ids": [845], "num_processes": 1,
                          **changes})


def listing(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_model_without_a_fingerprint_takes_that_of_the_data(nnunet: Path, downloaded: Path) -> None:
    fingerprint = downloaded / "dataset_fingerprint.json"
    content = fingerprint.read_bytes()
    fingerprint.unlink()
    before = listing(nnunet)
    try:
        with pytest.raises(TransplantError, match=f"{OURS} has no dataset_fingerprint.json .*Run: "
                                                  "nnUNetv2_extract_fingerprint -d 842"):
            split(nnunet, plans_from=downloaded)
        assert listing(nnunet) == before
        fork_command("nnUNetv2_extract_fingerprint", "-d", 842, "-np", 1)
        own = nnunet / "preprocessed" / OURS / "dataset_fingerprint.json"
        (task,) = split(nnunet, plans_from=str(downloaded / "fold_0" / "checkpoint_final.pth")).tasks
        assert (task.preprocessed_folder / "dataset_fingerprint.json").read_bytes() == own.read_bytes()
        shutil.rmtree(task.raw_folder)
        shutil.rmtree(task.preprocessed_folder)
    finally:
        fingerprint.write_bytes(content)


def test_what_does_not_fit_is_said_before_training(nnunet: Path, downloaded: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(nnunet)
    for changes, message in (
            ({"plans_name": "nnUNetPlans"}, "are called TheirPlans: leave out -p nnUNetPlans"),
            ({"plans_from": nnunet / "downloads"}, "Give one of the models in it: a model"),
            ({"plans_from": "downloads"}, "Give one of the models in it: a model"),
            ({"plans_from": nnunet / "nowhere"}, "there is no model folder"),
            ({"plans_from": 999}, "-plans_from 999: Could not find a dataset with the ID 999")):
        with pytest.raises(TransplantError, match=message):
            split(nnunet, **{"plans_from": downloaded} | changes)
    plans = downloaded / "plans.json"
    content = plans.read_text()
    plans.write_text(json.dumps(json.loads(content) | {"plans_name": "../../mine"}))
    with pytest.raises(TransplantError, match="no usable plans_name: ../../mine"):
        split(nnunet, plans_from=downloaded)
    plans.write_text(content)
    dataset = nnunet / "raw" / OURS / "dataset.json"
    content = dataset.read_text()
    for name, noted in (("ct ", False), ("T1", True)):
        dataset.write_text(json.dumps(json.loads(content) | {"channel_names": {"0": name}}))
        made = split(nnunet, plans_from=downloaded)
        assert any("--same_channels" in note and "T1" in note and "CT" in note for note in made.notes) == noted
        shutil.rmtree(made.tasks[0].raw_folder)
        shutil.rmtree(made.tasks[0].preprocessed_folder)
    dataset.write_text(content)
