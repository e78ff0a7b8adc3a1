"""The demo at a toy scale: the same commands, hardly any training."""
from pathlib import Path

import matplotlib.image
import pytest

from nnunet_transplant.data.phantom import ORGANS
from nnunet_transplant.demo import DemoSize, run_demo
from nnunet_transplant.errors import TransplantError

pytestmark = pytest.mark.slow


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"):
        monkeypatch.setenv(name, "set by the demo itself")  # and undone after the test
    table = run_demo(tmp_path / "demo", DemoSize(cases=5, features=2, variant="_1epochs_2iterations"))
    assert list(table.index) == list(ORGANS)
    assert list(table.columns) == ["LiverSpleen", "KidneyAorta", "average", "ties", "Joint"]
    assert table[["average", "ties", "Joint"]].notna().all(axis=None)
    assert table["LiverSpleen"].isna().tolist() == [False, False, True, True]  # an expert knows its organs only
    image = matplotlib.image.imread(tmp_path / "demo" / "demo.png")
    assert image.shape[0] > 400 and image.shape[1] > 1500 and image[..., :3].std() > 0.1
    with pytest.raises(TransplantError, match="exists already"):
        run_demo(tmp_path / "demo")
