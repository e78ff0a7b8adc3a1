"""The whole job from Python, as in a notebook: nnU-Net's commands train, all else are calls of the front door."""
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from commands import fork_command
from factory import write_planned_phantom
from matplotlib.image import imread

import nnunet_transplant as nt

pytestmark = pytest.mark.slow

SHORT = "1epochs_2iterations"
NUMBER = 851


class Trained(NamedTuple):
    base: Path
    experts: list[Path]
    images: Path


def train(root: Path, number: int, kind: str, *more: object) -> Path:
    trainer = f"nnUNetTrainer{kind}_{SHORT}"
    fork_command("nnUNetv2_train", number, "3d_fullres", 0, "-tr", trainer, "-device", "cpu", *more)
    (dataset,) = (root / "results").glob(f"Dataset{number}_*")
    return dataset / f"{trainer}__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="module")
def trained(nnunet: Path) -> Trained:
    name = write_planned_phantom(nnunet, NUMBER)
    base = train(nnunet, NUMBER, "Stable") / "fold_0" / "checkpoint_final.pth"
    split = nt.split_tasks(NUMBER, ["Solid=Liver,Spleen", "Both=Kidney+Aorta"], [852, 853], num_processes=1)
    assert [task.name for task in split.tasks] == ["Dataset852_Solid", "Dataset853_Both"] and split.notes == []
    experts = [train(nnunet, number, "TaskVector", "-pretrained_weights", base) for number in (852, 853)]
    images = nnunet / "images"
    images.mkdir()
    image = min((nnunet / "raw" / name / "imagesTr").iterdir())
    (images / image.name).symlink_to(image)
    return Trained(base, experts, images)


def voxels(folder: Path | str) -> dict[str, np.ndarray]:
    return {path.name: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
            for path in sorted(Path(folder).glob("*.nii.gz"))}


def test_merging_predicting_and_scoring(trained: Trained, tmp_path: Path) -> None:
    """What is saved predicts the same voxels as what is in memory, with nnU-Net's own command. Paths are strings."""
    experts = [*map(str, trained.experts)]
    merged = nt.merge(experts, method="fisher", fit="head", images=NUMBER, cases="train:0", n_cases=2, folds=[0],
                      device="cpu", **{"head.positions": 64})
    assert merged.structures == ["Solid", "Kidney", "Aorta"] and list(merged) == ["all"]
    folder = merged.save(f"{tmp_path}/merged")
    assert folder == tmp_path / "merged"
    record = json.loads((folder / "merge.json").read_text())["folds"]["all"]
    assert record["recipe"]["parameters"]["head.positions"] == 64
    assert [step["name"] for step in record["steps"]] == ["fisher", "head"]
    (cases,) = record["volumes"].values()
    assert len(cases) == 2

    quick = {"device": "cpu", "npp": 0, "nps": 0, "step_size": 1.0, "mirroring": False}
    assert nt.predict(merged, str(trained.images), f"{tmp_path}/memory", **quick) == tmp_path / "memory"
    nt.predict(folder, trained.images, tmp_path / "saved", **quick)
    fork_command("nnUNetv2_predict_from_modelfolder", "-i", trained.images, "-o", tmp_path / "stock", "-m", folder,
                 "-f", "all", "-device", "cpu", "-step_size", 1, "--disable_tta", "-npp", 1, "-nps", 1)
    stock = voxels(tmp_path / "stock")
    assert len(stock) == 1
    for name in ("memory", "saved"):
        found = voxels(tmp_path / name)
        assert found.keys() == stock.keys() and all(np.array_equal(found[case], stock[case]) for case in stock)

    scores = nt.evaluate([str(folder), experts[0]], NUMBER, 0, output=f"{tmp_path}/scores", n_cases=1, step_size=1.0,
                         mirroring=False, device="cpu")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "scores" / "evaluation.csv"), scores)
    assert scores.groupby("model")["structure"].nunique().sort_values().tolist() == [1, 3]
    page = nt.report(str(folder), f"{tmp_path}/report.html", evaluation=f"{tmp_path}/scores")
    assert page.read_text().count("<img") == 2


@pytest.mark.parametrize("path", [str, Path])
def test_a_merge_is_where_another_starts(trained: Trained, tmp_path: Path, path: Callable) -> None:
    """From a folder, from a recipe in Python or in a file, from files of task vectors: the same tensors."""
    experts = [*map(path, trained.experts)]
    merged = nt.merge(experts, method="ties", density=0.3, lambda_=0.5)
    merged.save(path(tmp_path / "merged"), fold=0)
    assert (tmp_path / "merged" / "fold_0").is_dir()
    recipe = nt.Recipe("ties", parameters={"density": 0.3, "lambda": 0.5})
    files = []
    for expert in experts:
        files.append(path(tmp_path / f"{Path(expert).parent.name}.safetensors"))
        header = nt.extract(expert, files[-1], fold=0)
        assert header.fold == "0" and Path(header.source["path"]).parents[1] == Path(expert)
    for same in (nt.merge(earlier=path(tmp_path / "merged")), nt.merge(experts, recipe=recipe),
                 nt.merge(experts, recipe=path(tmp_path / "merged" / "merge.json")),
                 nt.merge(files, recipe=recipe, base=path(trained.base))):
        assert same.structures == merged.structures
        assert all(torch.equal(tensor, same["all"].state_dict[name])
                   for name, tensor in merged["all"].state_dict.items())
    fewer = nt.merge(earlier=path(tmp_path / "merged"), drop=["Solid"])
    assert fewer.structures == ["Kidney", "Aorta"] and len(fewer.provenance["inputs"]) == 1
    assert nt.spec(experts[0]).text() == nt.spec(files[0], base=path(trained.base)).text() != ""


def test_analyses(trained: Trained, tmp_path: Path) -> None:
    """Small numbers of everything; the page holds all of it. Paths are strings."""
    backend = mpl.get_backend()
    base, experts = str(trained.base), [*map(str, trained.experts)]
    folders = {name: f"{tmp_path}/{name}" for name in ("interference", "flatness", "landscape", "sweep")}
    apart = nt.interference(experts, output=folders["interference"], density=0.1)
    assert len(apart.tasks) == 2
    flat = nt.flatness([base], NUMBER, output=folders["flatness"], tasks=experts, n_patches=1, n_eigenvalues=1,
                       n_probes=1, device="cpu")
    assert len(flat["models"]) == 1 and len(flat["tasks"]) == 2
    plane = nt.landscape(experts, NUMBER, output=folders["landscape"], also=[base], n_patches=1, points=2,
                         line_points=2, device="cpu")
    assert len(plane["plane"]["models"]) == 3
    found = nt.sweep(experts, NUMBER, "all", output=folders["sweep"], plan=nt.Plan(trials=2), n_cases=2,
                     step_size=1.0, device="cpu")
    best = nt.merge(recipe=f"{tmp_path}/sweep/recipe.json")
    assert best.provenance["recipe"]["weights"] == found["best"]["weights"]
    folder = best.save(tmp_path / "best")
    page = nt.report(folder, tmp_path / "report.html", **folders)
    figures = [figure for name in folders for figure in (tmp_path / name).glob("*.png")]
    assert page.read_text().count("<img") == len(figures) >= 5
    assert all(imread(figure).size > 1000 for figure in figures)
    assert mpl.get_backend() == backend


def test_what_a_user_can_mend_is_one_exception(trained: Trained, tmp_path: Path) -> None:
    for call in (lambda: nt.merge([]), lambda: nt.merge(trained.experts, method="tise"),
                 lambda: nt.merge(trained.experts, fit="head"),
                 lambda: nt.merge(trained.experts, densty=0.3),
                 lambda: nt.predict(trained.experts[0], tmp_path / "nowhere", tmp_path / "out", device="cpu"),
                 lambda: nt.evaluate(trained.experts, 999, output=tmp_path / "out", device="cpu"),
                 lambda: nt.extract(trained.experts[0], tmp_path / "vector.bin"),
                 lambda: nt.report(trained.experts[0], tmp_path / "out"),
                 lambda: nt.sweep(trained.experts[:1], NUMBER, output=tmp_path / "out", device="cpu"),
                 lambda: nt.split_tasks(NUMBER, ["A=Lung"], [854], num_processes=1)):
        with pytest.raises(nt.TransplantError):
            call()
    assert list(tmp_path.iterdir()) == []
