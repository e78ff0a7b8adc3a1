"""nnUNet_extTrainer keeps what it holds."""
import os
from pathlib import Path

import pytest

from nnunet_transplant.environment import ext_trainer_value, trainers_folder, use_our_trainers


def test_our_folder_is_joined_to_others_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = str(trainers_folder())
    assert Path(ours, "nnUNetTrainerStable.py").is_file()
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert ext_trainer_value() == ours
    monkeypatch.setenv("nnUNet_extTrainer", f"/one{os.pathsep}/two")
    use_our_trainers()
    use_our_trainers()
    assert os.environ["nnUNet_extTrainer"] == os.pathsep.join([ours, "/one", "/two"])
