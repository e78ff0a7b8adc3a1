"""A merge repeated from its merge.json, with a task more or less, and recipes in files."""
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from factory import base_network, write_model, write_volumes

from nnunet_transplant.errors import TransplantError
from nnunet_transplant.extraction import extract
from nnunet_transplant.merged_model import write_side_by_side
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.record import read_merge, read_recipe, recipe_file
from nnunet_transplant.volumes import Volumes


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Path]:
    """Task folders in nnU-Net's layout; A has two folds."""
    base = base_network()
    folders = {name: tmp_path / f"Dataset90{i}_{name}" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
               for i, name in enumerate("ABC")}
    for i, (name, folder) in enumerate(folders.items()):
        for fold in ("0", "1") if name == "A" else ("0",):
            write_model(folder, {"background": 0, name: 1}, base=base, seed=10 * i + int(fold), fold=fold)
    return folders


@pytest.fixture
def merge(tmp_path: Path, run: Callable) -> Callable[..., str]:
    """nnunet_transplant_merge in this process: what it says on stderr."""
    def merge(output: str, *arguments: object) -> str:
        status, _, said = run("merge", "-o", tmp_path / output, *arguments)
        assert status in (0, 1)
        return said
    return merge


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merge_repeats_byte_for_byte(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    options = ["-method", "ties", "-density", "0.4", "-weights", "1", "2", "-stage_weights", "1", "1", "1", "0.5", "1",
               "-keep_base_for", "*norm*"]
    assert merge("first", "-m", tasks["A"], tasks["B"], *options) == ""
    assert merge("again", "-from", tmp_path / "first") == ""
    assert content(tmp_path / "again") == content(tmp_path / "first")


def test_per_fold_and_task_vector_files_repeat(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("folds", "-m", tasks["A"], "-f", "0", "1", "--per_fold", "-method", "average") == ""
    assert merge("folds_again", "-from", tmp_path / "folds") == ""
    assert content(tmp_path / "folds_again") == content(tmp_path / "folds")
    write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base_network().state_dict())
    extract(tasks["B"], tmp_path / "b.safetensors")
    assert merge("file", "-m", tmp_path / "b.safetensors", tasks["C"], "-base", tmp_path / "base",
                 "-method", "average") == ""
    assert merge("file_again", "-from", tmp_path / "file") == ""  # merge.json knows the base
    assert content(tmp_path / "file_again") == content(tmp_path / "file")


def test_tasks_are_added_and_dropped(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("ab", "-m", tasks["A"], tasks["B"], "-method", "ties") == ""
    assert merge("bc_by_hand", "-m", tasks["B"], tasks["C"], "-method", "ties") == ""
    for i, name in enumerate(("A", "Dataset900_A", tasks["A"])):
        assert merge(f"bc{i}", "-from", tmp_path / "ab", "-drop", name, "-m", tasks["C"]) == ""
        assert content(tmp_path / f"bc{i}") == content(tmp_path / "bc_by_hand")
    assert merge("abc_by_hand", "-m", *tasks.values(), "-method", "average") == ""
    assert merge("abc", "-from", tmp_path / "ab", "-method", "average", "-m", tasks["C"]) == ""
    assert content(tmp_path / "abc") == content(tmp_path / "abc_by_hand")  # A's folds still share one weight


def test_volumes_are_remembered(tmp_path: Path, tasks: dict[str, Path], merge: Callable,
                                nnunet_folders: None) -> None:
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", {"background": 0, "B": 1, "C": 2}, shape=(16, 16, 16))
    assert merge("fisher", "-m", tasks["B"], tasks["C"], "-method", "fisher", "-d", "501", "-n_cases", "1",
                 "-device", "cpu") == ""
    assert read_merge(tmp_path / "fisher").recipe.volumes == Volumes(["501"], 1, n_patches=32)
    assert merge("again", "-from", tmp_path / "fisher", "-device", "cpu") == ""
    assert content(tmp_path / "again") == content(tmp_path / "fisher")


def test_what_cannot_be_repeated_is_refused(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("ab", "-m", tasks["A"], tasks["B"]) == ""
    assert merge("weighted", "-m", tasks["A"], tasks["B"], "-weights", "0.4", "0.6") == ""
    for arguments, message in (
            (["-from", tmp_path / "ab", "-drop", "Liver"], "-drop Liver: the merge has no such model (it has A, B)"),
            (["-from", tmp_path / "ab", "-drop", "A", "B"], "-drop left no models to merge"),
            (["-from", tmp_path / "nowhere"], "merge.json"), ([], "no models to merge: give them with -m"),
            (["-drop", "A", "-m", tasks["A"]], "-drop leaves out models of an earlier merge: give it with -from"),
            (["-from", tmp_path / "weighted", "-drop", "A"], "had -weights of its own")):
        error = merge("out", *arguments)
        assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    path = tasks["B"] / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes() + b" ")
    assert "has changed since it was merged" in merge("out", "-from", tmp_path / "ab")
    path.unlink()
    assert "is not there any more" in merge("out", "-from", tmp_path / "ab")


def test_damaged_records_are_refused(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    assert merge("ab", "-m", tasks["A"], tasks["B"]) == ""
    record = tmp_path / "ab" / "merge.json"
    whole = json.loads(record.read_text())
    fold = whole["folds"]["all"]
    for damage in ({}, {"folds": {}}, {"folds": []}, {"folds": {"all": {}}}, {"folds": {"all": {"inputs": [3]}}},
                   {"folds": {"all": fold | {"inputs": [{}]}}}, {"folds": {"all": fold | {"base": 3}}},
                   {"folds": {"all": fold | {"inputs": [fold["inputs"][0] | {"weight": 10 ** 400}]}}},
                   {"folds": {"all": {key: value for key, value in fold.items() if key != "recipe"}}}):
        record.write_text(json.dumps(damage))
        with pytest.raises(TransplantError, match="is not the record of a merge"):
            read_merge(tmp_path / "ab")
    for damage in ({"volumes": 3}, {"stage_weights": "x"}, {"method": "magic"}, {"weights": ["x"]}, {"more": 1}):
        record.write_text(json.dumps({"folds": {"all": fold | {"recipe": fold["recipe"] | damage}}}))
        with pytest.raises(TransplantError, match=f"^{record} is no recipe: "):
            read_merge(tmp_path / "ab")
        assert merge("out", "-from", tmp_path / "ab").count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Recipes in files

def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_a_recipe_file_is_read_from_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"method": "ties", "parameters": {"density": 0.3}, "weights": [1, 2]}
    expected = Recipe("ties", [1, 2], {"density": 0.3})
    path = write(tmp_path / "recipes" / "mine.json", content)
    for where in (path, str(path)):
        file = read_recipe(where)
        assert file.recipe == expected and not file.models and file.base is None
    write(path, content | {"models": ["a", "../b", "/abs/c"], "base": "base"})
    file = read_recipe(path)
    assert file.recipe == expected
    assert file.models == [path.parent / "a", path.parent / "../b", Path("/abs/c")]
    assert file.base == path.parent / "base"
    monkeypatch.chdir(path.parent)
    assert read_recipe("mine.json").models == [Path("a"), Path("../b"), Path("/abs/c")]


def test_a_recipe_file_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By absolute paths: it may lie anywhere."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("dare", [1.0, 0.5], {"density": 0.4, "dare.seed": 3}, "rebasin", ["head"], Volumes(["501"], 2),
                    ["*norm*"], [1.0] * 5, [], True)
    for base in (None, Path("base")):
        path = write(tmp_path / "elsewhere" / "recipe.json", recipe_file(recipe, [Path("a"), tmp_path / "b"], base))
        file = read_recipe(path)
        assert file.recipe == recipe
        assert file.models == [tmp_path / "a", tmp_path / "b"]
        assert file.base == (None if base is None else tmp_path / "base")


def test_what_is_no_recipe_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    with pytest.raises(TransplantError, match=f"there is no file {path}"):
        read_recipe(path)
    path.write_text("{")
    with pytest.raises(TransplantError, match=f"{path} is not valid JSON"):
        read_recipe(path)
    for content, message in (
            ({"models": "a"}, "'models' is no list of paths"), ({"models": [3]}, "'models' is no list of paths"),
            ({"models": {"a": 1}}, "'models' is no list of paths"), ({"base": 3}, "'base' is no path"),
            ({"models": ["a"], "metod": "ties"}, "nobody knows 'metod' (did you mean method?)"),
            ({"method": "ties", "parameters": {"density": 2}}, "-density must lie between 0 and 1")):
        with pytest.raises(TransplantError) as error:
            read_recipe(write(path, content))
        assert str(error.value).startswith(f"{path} is no recipe: {message}")


def test_recipe_files_merge(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    """What is given beside one goes before."""
    options = ["-method", "ties", "-density", "0.4", "-weights", "1", "2"]
    assert merge("by_hand", "-m", tasks["B"], tasks["C"], *options) == ""
    said = {"method": "ties", "parameters": {"density": 0.4}, "weights": [1.0, 2.0]}
    path = write(tmp_path / "recipe.json", said)
    assert merge("of_any", "-recipe", path, "-m", tasks["B"], tasks["C"]) == ""
    named = write(tmp_path / "named.json", said | {
        "models": [str(tasks[name].relative_to(tmp_path)) for name in "BC"]})
    assert merge("of_named", "-recipe", named) == ""
    other = write(tmp_path / "other.json", said | {
        "models": ["nowhere"], "parameters": {"ties.density": 0.9}, "weights": [5, 5]})
    assert merge("over", "-recipe", other, "-m", tasks["B"], tasks["C"], "-density", "0.4", "-weights", "1", "2") == ""
    for name in ("of_any", "of_named", "over"):
        assert content(tmp_path / name) == content(tmp_path / "by_hand")
    assert merge("none", "-recipe", path) == \
        "nnunet_transplant_merge: error: no models to merge: give them with -m, or an earlier merge with -from\n"
    assert "give either -from or -recipe" in merge("none", "-recipe", path, "-from", tmp_path / "by_hand")
    assert "-drop leaves out models of an earlier merge" in merge("none", "-recipe", named, "-drop", "B")
    assert not (tmp_path / "none").exists()


def test_a_recipe_file_may_name_the_base(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    write_model(tmp_path / "base", {"background": 0, "all": 1}, change=base_network().state_dict())
    extract(tasks["B"], tmp_path / "b.safetensors")
    assert merge("by_hand", "-m", tmp_path / "b.safetensors", tasks["C"], "-base", tmp_path / "base",
                 "-method", "average") == ""
    path = write(tmp_path / "recipe.json", {"models": ["b.safetensors", str(tasks["C"])], "base": "base"})
    assert merge("merged", "-recipe", path) == ""
    assert content(tmp_path / "merged") == content(tmp_path / "by_hand")


def test_a_record_is_a_recipe(tmp_path: Path, tasks: dict[str, Path], merge: Callable) -> None:
    """For other models, wherever it lies."""
    assert merge("ab", "-m", tasks["A"], tasks["B"], "-method", "ties", "-density", "0.4", "-weights", "1", "2") == ""
    assert merge("bc", "-m", tasks["B"], tasks["C"], "-method", "ties", "-density", "0.4", "-weights", "1", "2") == ""
    record = tmp_path / "ab" / "merge.json"
    copy = tmp_path / "kept.json"
    copy.write_bytes(record.read_bytes())
    (tmp_path / "merge.json").write_text("{}")  # beside the copy: not what it says
    for path in (record, copy):
        file = read_recipe(path)
        assert file.recipe == read_merge(tmp_path / "ab").recipe and not file.models and file.base is None
        assert merge(f"by_{path.stem}", "-recipe", path, "-m", tasks["B"], tasks["C"]) == ""
        assert content(tmp_path / f"by_{path.stem}") == content(tmp_path / "bc")
    copy.write_text('{"folds": {}}')
    with pytest.raises(TransplantError, match=f"{copy} is not the record of a merge"):
        read_recipe(copy)


def test_models_side_by_side_are_named_one_by_one(tmp_path: Path, tasks: dict[str, Path]) -> None:
    """Their own record says only their names: it is neither a merge nor a recipe for these models."""
    merged = merge_folders([tasks["B"], tasks["C"]], recipe=Recipe("ties"))["all"]
    write_side_by_side({"one": merged, "two": merged}, tmp_path / "both")
    for read in (lambda: read_merge(tmp_path / "both"), lambda: read_recipe(tmp_path / "both" / "merge.json")):
        with pytest.raises(TransplantError, match="several models side by side: name the folder of one"):
            read()
    assert read_merge(tmp_path / "both" / "two").recipe.method == "ties"
