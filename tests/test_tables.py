"""Tables of Dice against ones made by hand."""
import numpy as np
from factory import dice_frame

from nnunet_transplant.tables import cases_table, means_table


def test_tables() -> None:
    scores = dice_frame([("A", "liver", "c1", 0.5), ("A", "liver", "c2", np.nan), ("A", "spleen", "c1", 0.25),
                    ("A", "spleen", "c2", 0.75), ("A", "rare", "c1", np.nan), ("A", "rare", "c2", np.nan),
                    ("B", "liver", "c1", 1.0), ("B", "liver", "c2", 0.0), ("B", "rare", "c1", 0.0),
                    ("B", "rare", "c2", np.nan)])
    assert [line.split() for line in means_table(scores).splitlines()] == [
        ["structure", "A", "B"], ["liver", "0.5000", "0.5000"], ["spleen", "0.5000", "-"], ["rare", "nan", "0.0000"],
        ["mean", "of", "1", "0.5000", "0.5000"]]
    assert [line.split() for line in cases_table(scores).splitlines()] == [
        ["case", "structure", "A", "B"], ["c1", "liver", "0.5000", "1.0000"], ["c1", "spleen", "0.2500", "-"],
        ["c1", "rare", "nan", "0.0000"], ["c2", "liver", "nan", "0.0000"], ["c2", "spleen", "0.7500", "-"],
        ["c2", "rare", "nan", "nan"]]


def test_models_without_a_common_structure_have_no_mean() -> None:
    table = means_table(dice_frame([("A", "liver", "c1", 0.5), ("B", "spleen", "c1", 0.5)]))
    assert "mean" not in table and len(table.splitlines()) == 3


def test_wide_tables_number_the_models() -> None:
    names = [f"Dataset90{i}_AnOrganWithAName__nnUNetTrainerTaskVector" for i in range(4)]
    lines = means_table(dice_frame([(name, "liver", "c1", 0.5) for name in names])).splitlines()
    assert lines[:4] == [f"[{i}] {name}" for i, name in enumerate(names, 1)]
    assert lines[4].split() == ["structure", "[1]", "[2]", "[3]", "[4]"]
    assert max(map(len, lines)) < 120
