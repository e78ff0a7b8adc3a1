"""Results in a folder: what they depend on, whole or not there, and shared by merges."""
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factory import base_network, write_model, write_volumes

from nnunet_transplant import experts as experts_module
from nnunet_transplant.cache import Cache
from nnunet_transplant.experts import Experts
from nnunet_transplant.merger import merge_folders
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.volumes import Volumes

LABELS = {"background": 0, "one": 1}


def made(count: list[int], value: float = 1.0) -> object:
    def make() -> dict[str, torch.Tensor]:
        count.append(1)
        return {"a": torch.tensor([value])}
    return make


def test_what_depends_on_the_same_is_made_once(tmp_path: Path) -> None:
    count: list[int] = []
    for _ in range(3):
        found = Cache(tmp_path / "cache").kept("fisher", ["model", 1], made(count))
        assert torch.equal(found["a"], torch.tensor([1.0]))
    assert len(count) == 1
    for depends in (["model", 2], ["other", 1], ["model"], ["model1"]):
        Cache(tmp_path / "cache").kept("fisher", depends, made(count))
    Cache(tmp_path / "cache").kept("grams", ["model", 1], made(count))
    assert len(count) == 6


def test_what_cannot_be_read_is_made_anew(tmp_path: Path) -> None:
    count: list[int] = []
    cache = Cache(tmp_path)
    cache.kept("fisher", [], made(count))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", b"nonsense", whole[:len(whole) // 2]):
        path.write_bytes(damaged)
        assert torch.equal(cache.kept("fisher", [], made(count))["a"], torch.tensor([1.0]))
        assert [each.name for each in tmp_path.iterdir()] == [path.name]
    assert len(count) == 4


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).kept("fisher", [], interrupted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("recipe", "entries"), [
    (Recipe("fisher"), ["fisher", "fisher", "lessons"]), (Recipe("regmean"), ["grams", "grams", "lessons"]),
    (Recipe("average", fit=["head"]), ["lessons"]), (Recipe("average", align="mudsc"), ["activations"]),
    (Recipe("fisher", align="activation", fit=["head"]), ["activations", "fisher", "fisher", "lessons"])])
def test_a_second_merge_pays_only_for_what_is_new(tmp_path: Path, nnunet_folders: None, recipe: Recipe,
                                                  entries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same bytes; with another network or other volumes everything is new. The check wants lessons, too,
    for the head of the base."""
    write_volumes(tmp_path / "raw", "Dataset501_Boxes", LABELS, shape=(16, 16, 16))
    base = base_network()
    models = [write_model(tmp_path / name, LABELS, base=base, seed=i) for i, name in enumerate("abc")]
    made_now: list[str] = []
    kept = Cache.kept

    def watched(self: Cache, what: str, depends: object, make: object) -> object:
        def now() -> object:
            made_now.append(what)
            return make()
        return kept(self, what, depends, now)
    monkeypatch.setattr(experts_module.Cache, "kept", watched)

    def merged(paths: list[Path], cases: int, cache: Path | None) -> dict[str, torch.Tensor]:
        chosen = Recipe(recipe.method, align=recipe.align, fit=recipe.fit, volumes=Volumes([501], cases))
        return merge_folders(paths, recipe=chosen, cache=cache)["all"].state_dict

    cache = tmp_path / "cache"
    expected = merged(models[:2], 2, None)
    assert not made_now
    for expected_now in (entries, []):
        made_now.clear()
        found = merged(models[:2], 2, cache)
        assert sorted(made_now) == expected_now
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    made_now.clear()
    merged(models[:2], 1, cache)
    assert sorted(made_now) == entries
    made_now.clear()
    merged([models[0], models[2]], 2, cache)
    assert sorted(made_now) == sorted(set(entries))  # what is known of the first model alone is known


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    assert Experts.__dataclass_fields__["cache"].default is None


@pytest.mark.parametrize(("flags", "said"), [
    (["-d", "501", "-fit", "head", "-cache", "DIR"], "interrupted; what was found out is in DIR: the same command goes "
                                                     "on from there\n"),
    (["-d", "501", "-fit", "head"], "interrupted; with -cache DIR the same command would go on where it was\n"),
    ([], "interrupted\n")])
def test_an_interrupted_merge_says_what_is_kept(flags: list[str], said: str, run: Callable,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*models: object, **options: object) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr("nnunet_transplant.cli.merge.merge", interrupted)
    status, _, error = run("merge", "-m", "A", "-o", "OUT", *flags)
    assert status == 130 and error.endswith(said)
