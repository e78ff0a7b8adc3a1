"""Pull random weights towards an ensemble, as nnunet_transplant_merge -polish pulls merged ones: what polishing by
itself is worth.

    python benchmarks/polish_random.py CHECKPOINT CHECKPOINT ... -d 4 -cases train:5 -n_cases 6 -polish 150 -o OUTPUT
"""
import argparse
from dataclasses import replace
from pathlib import Path

import torch

from nnunet_transplant.architecture import build_network
from nnunet_transplant.heads import join
from nnunet_transplant.merging.calibration import Volumes, open_calibration
from nnunet_transplant.merging.ensemble import polish
from nnunet_transplant.merging.merge import Recipe, merge_folders, write_merge
from nnunet_transplant.model_folder import open_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-cases")
    parser.add_argument("-n_cases", type=int, default=8)
    parser.add_argument("-polish", type=int, required=True)
    parser.add_argument("-o", dest="output", type=Path, required=True)
    args = parser.parse_args()
    models = [model for path in args.checkpoints for model in open_models(path)]
    whole = merge_folders(args.checkpoints)["all"]  # for everything but its weights
    calibration = open_calibration(Volumes([args.dataset], args.n_cases, args.cases), models, whole.dataset_json, {},
                                   whole.trainer, progress=True)
    torch.manual_seed(0)
    first = models[0]
    network = build_network(first.plans, first.configuration, whole.dataset_json, whole.trainer, deep_supervision=True)
    state = network.state_dict()
    canonical = first.layout.canonical
    start = {canonical[name]: state[name] for name in first.layout.shapes}
    polished = polish(calibration, join(models, [1 / len(models)] * len(models)), start, args.polish,
                      Recipe().polish_lr)
    write_merge({"all": replace(whole, weights={name: polished[canonical[name]] for name in whole.weights},
                                provenance=whole.provenance | {"method": "random weights", "polish": args.polish})},
                args.output)


if __name__ == "__main__":
    main()
