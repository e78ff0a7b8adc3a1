"""Two choices of matching, measured on folds from different random weights:

    python benchmarks/matching_choices.py DATA/Dataset004_Hippocampus WORK

What the weights around a unit count: concatenated as they are (MuDSC, Eq. 6, with kernels before a norm at length 1),
or each segment at a mean length of 1; numbers, one for each unit, with their mean or without it. And the budget and
decay of a zip. Three folds of `folds.py`, of the small plan (16 features, 500 steps) and of nnU-Net's own 32 features
(250 steps), merged with and without fitted heads. Mean Dice of both structures, at the resolution of preprocessing: on
every second of the 40 test cases, which the choice is made on, and on the others, which are reported.
"""
import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from folds import ALL, DATASET, HALF, PLANS, WHOLE, Steps, prepare

from nnunet_transplant.alignment import dual
from nnunet_transplant.alignment.aligners import put_together
from nnunet_transplant.alignment.dual import Solver, matcher, zipper
from nnunet_transplant.alignment.spec import Group, Segment
from nnunet_transplant.alignment.weight_space import Assignments, WeightSimilarity
from nnunet_transplant.analysis.scoring import dice, open_labelled_cases
from nnunet_transplant.data.cases import evaluation_cases
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.head import lessons_of, teach_head
from nnunet_transplant.heads import join
from nnunet_transplant.methods import METHODS
from nnunet_transplant.methods.apply import merge_tensors
from nnunet_transplant.model_folder import TrainedModel, open_models
from nnunet_transplant.prediction import BatchPredictor, predictor
from nnunet_transplant.targets import name_targets
from nnunet_transplant.volumes import Volumes, open_patches

FOLDS = (0, 1, 2)
# trainer, plans, and with how many orders of the layers the weights are matched (rows are means over these)
NETWORKS = {"16 features": (WHOLE, PLANS, 3), "32 features": (HALF, f"{PLANS}32", 1)}
ZIPS = ((0.3, 0.125), (0.3, 1.0), (0.5, 0.0), (0.5, 0.125), (0.5, 1.0), (0.9, 1.0))  # decay, budget


class EqualLengths(WeightSimilarity):
    """Each segment at a mean length of 1 over the units of all models."""

    def _rows(self, group: Group, segment: Segment, model: int, assignments: Assignments) -> torch.Tensor:
        rows = super()._rows(group, segment, model, assignments)
        if rows.shape[1] == 1:
            return rows
        parts = torch.cat([self._part(network[segment.tensor], group, segment) for network in self.networks])
        return rows / (parts.square().sum(1).mean().sqrt() or 1.0)


class WithMeans(WeightSimilarity):
    """Numbers, one for each unit, as they are."""

    def _mean(self, *_: object) -> float:
        return 0.0


WEIGHTS = {"as they are": WeightSimilarity, "equal lengths": EqualLengths, "with means": WithMeans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Dataset004_Hippocampus in nnU-Net raw format")
    parser.add_argument("work", type=Path, help="folder of folds.py")
    parser.add_argument("-networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="default: both")
    args = parser.parse_args()
    run = Steps(args.work)
    prepare(run, args.data)
    os.environ.update(run.environment)
    for name in args.networks:
        trainer, plans, seeds = NETWORKS[name]
        folder = run.model(DATASET, trainer, plans)
        for fold in (*FOLDS, ALL):
            run(folder / f"fold_{fold}" / "checkpoint_final.pth",
                f"nnUNetv2_train {DATASET} 3d_fullres {fold} -tr {trainer} -p {plans} -device cpu")
        *models, joint = open_models(folder, [str(fold) for fold in (*FOLDS, ALL)])
        table = measure(models, joint, seeds)
        print(f"\n{name}\n{table.to_string(float_format='{:.3f}'.format)}", flush=True)


def measure(models: list[TrainedModel], joint: TrainedModel, seeds: int) -> pd.DataFrame:
    """joint: the model of all training cases."""
    weights_of_folds = [1 / len(models)] * len(models)
    experts = Experts(models, [model.tensors() for model in models], join(models, weights_of_folds), models[0].trainer,
                      open_patches(Volumes([4], 6, f"train:{ALL}", n_patches=1000), models[0]))
    score = scorer(models)
    lessons = lessons_of(experts)
    rows: dict[str, list[float]] = {}

    def with_and_without_fit(tensors: Mapping[str, torch.Tensor]) -> list[float]:
        network = experts.merged_network(tensors)
        unfitted = score([network.state_dict()])
        teach_head(experts, network, lessons)  # in place
        return [*unfitted, *score([network.state_dict()])]

    def merge(name: str, solver: Solver, alpha: float, weights: str, pearson: bool = True,
              patience: int = dual.PATIENCE, seeds: int = 1) -> None:
        found = []
        for seed in range(seeds):
            with patch.object(dual, "WeightSimilarity", WEIGHTS[weights]):
                together = put_together(experts, solver, alpha, seed, pearson, patience).result
            found.append(with_and_without_fit(
                merge_tensors(METHODS["average"], {}, weights_of_folds, None, together).result))
            print(name, seed, *(f"{value:.3f}" for value in found[-1]), flush=True)
        rows[name] = np.mean(found, axis=0).tolist()

    for fold, model in zip(FOLDS, models, strict=True):
        rows[f"fold {fold}"] = with_and_without_fit(model.tensors())
    rows["all cases"] = [*score([joint.state_dict()]), np.nan, np.nan]
    rows["ensemble"] = [*score([model.state_dict() for model in models]), np.nan, np.nan]
    for weights in WEIGHTS:
        merge(f"rebasin, {weights}", matcher(False), 1.0, weights, pearson=False, patience=1, seeds=seeds)
        merge(f"mudsc_align, {weights}", matcher(False), 0.5, weights, seeds=seeds)
        merge(f"weight_zip, {weights}", zipper(0.5, 1.0), 1.0, weights, seeds=seeds)
        merge(f"mudsc_zip, {weights}", zipper(0.5, 1.0), 0.5, weights, seeds=seeds)
    for alpha, name in ((0.0, "zipit"), (0.5, "mudsc_zip")):
        for decay, budget in ZIPS:
            merge(f"{name}, decay {decay}, budget {budget}", zipper(decay, budget), alpha, "as they are")
    columns = [f"{part}, {head}" for head in ("average", "head fitted") for part in ("chosen on", "reported")]
    return pd.DataFrame(rows, index=columns).T


def scorer(models: list[TrainedModel]) -> Callable[[list[dict[str, torch.Tensor]]], list[float]]:
    """The mean Dice of networks (of several, of their ensemble) on the cases to choose on and on those to report."""
    cases = evaluation_cases(DATASET, ALL)
    labelled = open_labelled_cases(cases, models[0])
    (targets,), _ = name_targets(["model"], [models[:1]], cases)
    nnunet = predictor(models[:1], torch.device("cpu"), progress_bar=False, kind=BatchPredictor)

    def score(parameters: list[dict[str, torch.Tensor]]) -> list[float]:
        nnunet.list_of_parameters = parameters
        found = [np.mean(list(dice(case.reference, nnunet.predict_logits_from_preprocessed_data(case.image).argmax(0),
                                   targets).values())) for case in labelled]
        return [float(np.mean(found[start::2])) for start in (0, 1)]
    return score


if __name__ == "__main__":
    main()
