"""What analysis costs beside training and prediction, side by side in one run.

    python benchmarks/analysis_speed.py CHECKPOINT -d 4 [-f 0] [-device cpu]

A Hessian-vector product and the Fisher information of every patch, beside a training step of the same batch (forward,
backward, AdamW). An evaluation of a sweep (merge two models into the network, predict, Dice), beside nnU-Net's own
prediction of the same preprocessed cases.
"""
import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nnunet_transplant.analysis.curvature import Hessian, fisher_diagonal
from nnunet_transplant.analysis.risk import open_risk
from nnunet_transplant.analysis.scoring import MergedNetwork, open_labelled_cases
from nnunet_transplant.data.cases import evaluation_cases
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import predictor
from nnunet_transplant.targets import name_targets
from nnunet_transplant.volumes import volumes_of


def seconds(work: Callable[[], object], times: int) -> float:
    """The median of several runs, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-f", dest="fold", default="0", help="look at the validation cases of this fold")
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-times", type=int, default=5)
    args = parser.parse_args()
    model = open_models(args.checkpoint)[0]
    size = model.plans["configurations"][model.configuration]["batch_size"]
    risk = open_risk(model, volumes_of(args.dataset, args.fold, 2), size, device=args.device)
    hessian = Hessian(risk, size)
    vector = torch.randn(hessian.size, device=args.device)
    optimizer = torch.optim.AdamW(risk.network.parameters(), 1e-9)

    def step() -> None:
        optimizer.zero_grad()
        risk.loss(risk.patches).backward()
        optimizer.step()

    times = {"training step": seconds(step, args.times),
             "Hessian-vector product": seconds(lambda: hessian @ vector, args.times),
             "Fisher, patch by patch": seconds(lambda: fisher_diagonal(risk), args.times)}
    print(f"{hessian.size / 1e6:.1f} M parameters, {size} patches of {list(risk.patches[0].image.shape[1:])}, "
          f"{args.device}, {torch.get_num_threads()} threads")
    for name, value in times.items():
        print(f"  {name}: {value:.3f} s, {value / times['training step']:.2f} times the training step")

    network = MergedNetwork(Merger([[model], [model]]), torch.device(args.device))
    nnunet = predictor([model], torch.device(args.device), mirroring=False, progress_bar=False)
    cases = evaluation_cases(args.dataset, args.fold, n_cases=4)
    labelled = open_labelled_cases(cases, model)
    (targets,), _ = name_targets(["merged"], [[network.merged]], cases)

    def evaluate() -> None:
        network.set([0.4, 0.6])
        network.dice(labelled, targets)

    def predict() -> None:
        for case in labelled:
            nnunet.predict_logits_from_preprocessed_data(case.image)

    merged, plain = seconds(evaluate, args.times), seconds(predict, args.times)
    print(f"  an evaluation of {len(labelled)} cases: {merged:.2f} s, {60 / merged:.0f} a minute, {merged / plain:.2f} "
          f"times nnU-Net's prediction of them ({plain:.2f} s)")


if __name__ == "__main__":
    main()
