"""In-memory merges against what the merge command would write, and Dice against its definition."""
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from factory import base_network, small_plans, write_model, write_volumes
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

from nnunet_transplant.analysis.scoring import MergedNetwork, dice, open_labelled_cases
from nnunet_transplant.data.cases import evaluation_cases
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.evaluation import score
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import predictor
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.targets import Target, name_targets
from nnunet_transplant.volumes import Volumes

DATASET = "Dataset700_Small"
LABELS = {"background": 0, "one": 1, "two": 2, "three": 3}
REGIONS = {"background": 0, "all": [1, 2], "two": [2]}
CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path, nnunet_folders: None) -> Path:
    folder = write_volumes(tmp_path / "raw", DATASET, LABELS, cases=4, shape=(16, 18, 20))
    splits = tmp_path / "preprocessed" / DATASET / "splits_final.json"
    splits.parent.mkdir(parents=True)
    splits.write_text(json.dumps([{"train": ["case_3"], "val": ["case_2", "case_0", "case_1"]}]))
    return folder


def plans() -> dict:
    content = small_plans()
    content["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0, "std": 1.0}}
    return content


def tasks(folder: Path, *labels: dict, **more: object) -> list[list]:
    """Opened models of one base, one for each of the labels."""
    base = base_network()
    return [open_models(write_model(folder / f"task_{i}", each, seed=i, base=base, plans=plans(), **more))
            for i, each in enumerate(labels)]


SETS = {"tasks": [{"background": 0, "one": 1}, {"background": 0, "two": 1, "three": 2}],
        "one structure in both": [{"background": 0, "one": 1}, {"background": 0, "two": 1, "one": 2}],
        "same labels": [LABELS, LABELS], "regions": [REGIONS, REGIONS]}


@pytest.mark.parametrize(("method", "labels"), [
    *itertools.product(["task_arithmetic", "average"], SETS),
    ("ties", "tasks"), ("dare", "tasks"), ("karcher", "tasks")])
def test_weights_in_memory_are_those_of_the_merge(tmp_path: Path, method: str, labels: str) -> None:
    """Whatever was in the network before, for folds too; heads and all."""
    orders = {"order": [1, 2]} if labels == "regions" else {}
    groups = tasks(tmp_path, *SETS[labels], **orders)
    write_model(tmp_path / "task_0", SETS[labels][0], seed=7, fold="1", plans=plans(), base=base_network(), **orders)
    groups[0] = open_models(tmp_path / "task_0")
    network = MergedNetwork(Merger(groups, Recipe(method)), CPU)
    free = method in ("task_arithmetic", "dare")
    for weights in ([1.3, 0.4], [0.0, 2.0], [0.0, 0.0]) if free else ([0.3, 0.7], [1.0, 0.0]):
        network.set(weights)
        expected = Merger(groups, Recipe(method, weights)).merge().state_dict
        found = network.predictor.network.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
            if method not in ("task_arithmetic", "average"):
                assert torch.equal(found[name], tensor)


def test_weights_in_memory_with_a_base_that_is_given(tmp_path: Path) -> None:
    """Of stock fine-tuning, which records none; and parameters of the method."""
    groups = tasks(tmp_path, *SETS["tasks"], record_base=False)
    theta_0 = {name: tensor.clone() for name, tensor in base_network().state_dict().items()
               if name in groups[0][0].layout.body}
    for method, parameters in (("task_arithmetic", {}), ("ties", {"density": 0.4})):
        network = MergedNetwork(Merger(groups, Recipe(method), theta_0, Path("base")), CPU)
        network.set([0.2, 0.9], parameters)
        recipe = Recipe(method, [0.2, 0.9], parameters)
        expected = Merger(groups, recipe, theta_0, Path("base")).merge().state_dict
        for name, tensor in network.predictor.network.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("method", "labels"), [("task_arithmetic", "tasks"), ("ties", "tasks"),
                                                ("average", "same labels"), ("average", "regions")])
def test_heads_in_memory_are_fitted_as_by_the_merge(dataset: Path, tmp_path: Path, method: str, labels: str) -> None:
    """Anew for each merge; what the ensemble says does not change with the weights."""
    groups = tasks(tmp_path, *SETS[labels], **({"order": [1, 2]} if labels == "regions" else {}))
    volumes = Volumes([DATASET], n_cases=2, cases="train:0")
    network = MergedNetwork(Merger(groups, Recipe(method, fit=["head"], volumes=volumes)), CPU)
    for weights in ([0.3, 0.7], [1.0, 0.0]):
        network.set(weights)
        fitted, plain = (Merger(groups, Recipe(method, weights, **options)).merge().state_dict
                         for options in ({"fit": ["head"], "volumes": volumes}, {}))
        for name, tensor in network.predictor.network.state_dict().items():
            torch.testing.assert_close(tensor, fitted[name], rtol=1e-3, atol=1e-3)  # an optimiser's end
        assert any((fitted[name] - plain[name]).abs().max() > 0.01 for name in groups[0][0].layout.heads)


@pytest.mark.parametrize("ignore", [None, 4])
def test_dice_is_that_of_the_evaluation_and_of_its_definition(ignore: int | None) -> None:
    rng = np.random.default_rng(0)
    reference, labels = rng.integers(0, 5, (2, 5, 6, 7))
    targets = [Target("one", 1, (1,), (2,), "one"), Target("union", (1, 3), (1, 3), (2, 4), "union"),
               Target("missing", 3, (3,), (9,), "missing"), Target("nowhere", 7, (7,), (9,), "nowhere")]
    found = dice(torch.from_numpy(reference), torch.from_numpy(labels), targets, ignore)
    metrics = score(reference, labels, targets, ignore)
    for target in targets:
        counted = reference != (-1 if ignore is None else ignore)
        a, b = np.isin(reference, target.reference) & counted, np.isin(labels, target.prediction) & counted
        expected = 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else np.nan
        assert found[target.row] == pytest.approx(expected, nan_ok=True)
        assert found[target.row] == pytest.approx(metrics[target.key]["Dice"], nan_ok=True)
    assert found["missing"] == 0 and np.isnan(found["nowhere"])


@pytest.mark.parametrize("labels", ["tasks", "regions"])
def test_scores_are_those_of_nnunets_logits(dataset: Path, tmp_path: Path, labels: str) -> None:
    """Of the merged model's own predictor, argmax and Dice in plain numpy."""
    orders = {"order": [1, 2]} if labels == "regions" else {}
    if labels == "regions":
        content = json.loads((dataset / "dataset.json").read_text())
        (dataset / "dataset.json").write_text(json.dumps(content | {"labels": REGIONS, "regions_class_order": [1, 2]}))
    groups = tasks(tmp_path, *SETS[labels], **orders)
    network = MergedNetwork(Merger(groups, Recipe("task_arithmetic")), CPU)
    cases = evaluation_cases(DATASET, 0)
    labelled = open_labelled_cases(cases, groups[0][0])
    assert [case.name for case in labelled] == ["case_0", "case_1", "case_2"]
    (targets,), _ = name_targets(["merged"], [[network.merged]], cases)
    network.set([0.8, 1.2])
    found = network.dice(labelled, targets)
    assert list(found) == ["one", "two", "three"] if labels == "tasks" else ["all", "two"]
    nnunet = predictor(Merger(groups, Recipe("task_arithmetic", [0.8, 1.2])).merge(), CPU, mirroring=False)
    assert type(nnunet) is nnUNetPredictor and not network.predictor.use_mirroring
    for index, case in enumerate(labelled):
        logits = nnunet.predict_logits_from_preprocessed_data(case.image)
        segmentation = nnunet.label_manager.convert_logits_to_segmentation(logits).numpy()
        reference = case.reference.numpy()
        for target in targets:
            a, b = np.isin(reference, target.reference), np.isin(segmentation, target.prediction)
            assert found[target.row][index] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert max(itertools.chain(*found.values())) > 0


def test_overflowing_logits_are_refused(dataset: Path, tmp_path: Path) -> None:
    groups = tasks(tmp_path, *SETS["tasks"])
    network = MergedNetwork(Merger(groups, Recipe("task_arithmetic")), CPU)
    (case,) = open_labelled_cases(evaluation_cases(DATASET, 0, n_cases=1), groups[0][0])
    for value, message in ((1e6, "half precision"), (float("nan"), "no numbers")):
        for name in groups[0][0].layout.heads:
            network.tensors[name].fill_(value)
        with pytest.raises(TransplantError, match=message):
            network.labels(case.image)
    network.set([0.5, 0.5])  # and nothing of it is left
    assert network.labels(case.image).shape == case.reference.shape


def test_cases_are_preprocessed_with_their_labels(dataset: Path, tmp_path: Path) -> None:
    """At the plans' spacing; spread over the sorted names; with fold all every case."""
    groups = tasks(tmp_path, {"background": 0, "one": 1})
    cases = evaluation_cases(DATASET, "all", n_cases=2)
    labelled = open_labelled_cases(cases, groups[0][0])
    assert [case.name for case in labelled] == list(cases.files) == ["case_0", "case_2"]
    for case in labelled:
        assert case.image.shape == (1, 16, 18, 20) and case.image.dtype == torch.float32
        assert set(np.unique(case.reference)) == {0, 1, 2, 3}
        assert case.image.std() == pytest.approx(1, abs=0.01)


def test_a_damaged_image_is_one_line(dataset: Path, tmp_path: Path) -> None:
    path = dataset / "imagesTr" / "case_1_0000.nii.gz"
    path.write_bytes(b"no image")
    groups = tasks(tmp_path, {"background": 0, "one": 1})
    with pytest.raises(TransplantError, match=f"SimpleITKIO cannot read {path}") as caught:
        open_labelled_cases(evaluation_cases(DATASET, 0), groups[0][0])
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_preprocessed_is_one_line(dataset: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("one\ntwo")
    monkeypatch.setattr(DefaultPreprocessor, "run_case", fail)
    groups = tasks(tmp_path, {"background": 0, "one": 1})
    with pytest.raises(TransplantError, match=f"preprocess case case_0 of {DATASET} .RuntimeError: one two"):
        open_labelled_cases(evaluation_cases(DATASET, 0), groups[0][0])
    assert evaluation_cases(DATASET, 0)
