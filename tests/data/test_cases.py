"""The cases of a dataset, its folds and lists of cases, above all those that people write by hand."""
import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factory import write_volumes

from nnunet_transplant.data.cases import choose_cases, new_splits, open_cases, open_splits, read_splits, splits_of_cases
from nnunet_transplant.errors import TransplantError

CASES = [f"case_{i:02d}" for i in range(12)]


def test_splits_of_chosen_cases() -> None:
    splits = new_splits(CASES)
    assert sorted(case for fold in splits for case in fold["val"]) == CASES
    assert splits == new_splits(CASES[::-1])

    without_one, new = splits_of_cases(splits, CASES[1:])
    assert not new
    for fold, parent_fold in zip(without_one, splits, strict=True):
        assert fold == {part: [case for case in parent_fold[part] if case != CASES[0]] for part in ("train", "val")}

    of_fold, new = splits_of_cases(splits, splits[0]["train"])  # leaves nothing to validate fold 0 on
    assert new and of_fold == new_splits(splits[0]["train"])
    for fold in of_fold:
        assert not set(fold["train"]) & set(fold["val"])
        assert sorted(fold["train"] + fold["val"]) == sorted(splits[0]["train"])

    with pytest.raises(TransplantError, match="cannot split fewer than 5 cases"):
        splits_of_cases(splits, splits[0]["val"])


def test_choose_cases(tmp_path: Path) -> None:
    splits = new_splits(CASES)
    lines, as_json = tmp_path / "cases.txt", tmp_path / "cases.json"
    lines.write_text(f"{CASES[3]}\n\n {CASES[1]} \n{CASES[3]}\n")
    as_json.write_text(json.dumps(CASES[:2]))
    assert choose_cases(lines, CASES, splits) == [CASES[1], CASES[3]]
    assert choose_cases(str(as_json), CASES, splits) == CASES[:2]
    assert choose_cases("val:4", CASES, splits) == sorted(splits[4]["val"])
    assert choose_cases("train:0", CASES, splits) == sorted(splits[0]["train"])
    assert choose_cases(CASES[:3], CASES, splits) == CASES[:3]


@pytest.mark.parametrize(("text", "message"), [
    ("case_01\ncase_99\n", "1 of the chosen cases are not in the dataset: case_99"),
    ("\n", "no case was chosen"),
    ("[1, ", "is not valid JSON"), ("[1, 2]", "must list case ids, each in quotes"),
    ("[{}]", "must list case ids"),
])
def test_choose_cases_refuses_a_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "cases.txt"
    file.write_text(text)
    with pytest.raises(TransplantError, match=message):
        choose_cases(file, CASES, new_splits(CASES))


@pytest.mark.parametrize(("cases", "message"), [("train:5", "has 5 folds"), ("missing.txt", "no file missing.txt")])
def test_choose_cases_refuses(cases: str, message: str) -> None:
    with pytest.raises(TransplantError, match=message):
        choose_cases(cases, CASES, new_splits(CASES))


@pytest.mark.parametrize("encoded", [
    lambda text: text.encode(), lambda text: codecs.BOM_UTF8 + text.encode(), lambda text: text.encode("utf-16"),
    lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"), lambda text: text.replace("\n", "\r\n").encode()])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_list_of_cases_may_be_written_by_windows(tmp_path: Path, encoded: Callable[[str], bytes],
                                                   as_json: bool) -> None:
    cases = ["fälle_1", "病例_2"]
    file = tmp_path / "cases.txt"
    file.write_bytes(encoded(json.dumps(cases, ensure_ascii=False) if as_json else "\n".join(cases)))
    assert choose_cases(file, [*cases, "other"], None) == sorted(cases)


@pytest.mark.parametrize("content", [
    "fälle_1\n".encode("latin-1"), "fall_1\nfall_2\n".encode("utf-16-le"), b"\xff\xfea", b"\x89PNG\r\n\x1a\n\0\0"])
def test_other_encodings_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cases.txt"
    file.write_bytes(content)
    with pytest.raises(TransplantError, match="is not text in UTF-8: save it as such"):
        choose_cases(file, CASES, None)


@pytest.mark.parametrize(("content", "message"), [
    ({"train": ["a"], "val": ["b"]}, "holds no JSON list"), ([], "holds no fold"), ("", "is not valid JSON"),
    ('[{"train": ["a"], "val": ["b"]}', "is not valid JSON"),
    ([{"train": ["a"]}], "fold 0 in .* must have two lists of cases, 'train' and 'val'"),
    ([{"train": ["a"], "val": ["b"]}, {"train": "a", "val": ["b"]}], "fold 1 in .* must have two lists"),
    ([{"train": [1, 2], "val": [3]}], "fold 0 in .* must have two lists"),
    ([["a"], ["b"]], "fold 0 in .* must have two lists")])
def test_folds_that_are_none_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(TransplantError, match=f"splits_final.json {message}|{message}"):
        read_splits(file)


def test_folds_may_say_more_and_have_a_byte_order_mark(tmp_path: Path, nnunet_folders: None) -> None:
    folder = tmp_path / "preprocessed" / "Dataset501_Boxes"
    folder.mkdir(parents=True)
    folds = [{"train": ["a", "b"], "val": []}]
    (folder / "splits_final.json").write_bytes(
        codecs.BOM_UTF8 + json.dumps([fold | {"comment": "mine"} for fold in folds]).encode())
    assert open_splits("Dataset501_Boxes") == folds
    assert open_splits("Dataset502_None") is None


def test_a_fold_of_a_dataset_without_folds_is_refused() -> None:
    with pytest.raises(TransplantError, match=r"-cases val:0: the dataset has no splits_final\.json"):
        choose_cases("val:0", CASES, None)


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content.pop("file_ending"), "has no 'file_ending'"),
    (lambda content: content.update(labels=["liver"]), "'labels' in"),
    (lambda content: content.update(dataset={"a": {"images": "a.nii.gz", "label": "b.nii.gz"}}), "'dataset' in"),
    (lambda content: content.update(dataset={"a": {"images": ["a.nii.gz"]}}), "'dataset' in"),
    (lambda content: content.update(dataset=["a"]), "'dataset' in")])
def test_a_dataset_json_that_nnunet_cannot_use_is_refused(tmp_path: Path, nnunet_folders: None,
                                                          change: Callable[[dict], object], message: str) -> None:
    folder = write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "liver": 1})
    content = json.loads((folder / "dataset.json").read_text())
    change(content)
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(TransplantError, match=message) as raised:
        open_cases(501)
    assert str(folder / "dataset.json") in str(raised.value)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(TransplantError, match="is not valid JSON"):
        open_cases(501)
