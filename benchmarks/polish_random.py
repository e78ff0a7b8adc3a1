"""Pull random weights towards an ensemble, as nnunet_transplant_merge -fit polish pulls merged ones: what polishing by
itself is worth.

    python benchmarks/polish_random.py CHECKPOINT CHECKPOINT ... -d 4 -cases train:5 -n_cases 6 -steps 150 -o OUTPUT
"""
import argparse
from dataclasses import replace
from pathlib import Path

import torch

from nnunet_transplant.architecture import build_network
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.polish import polish
from nnunet_transplant.heads import join
from nnunet_transplant.merged_model import Merged
from nnunet_transplant.merger import Merger
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import torch_device
from nnunet_transplant.volumes import N_CASES, Volumes, open_patches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-cases")
    parser.add_argument("-n_cases", type=int, default=N_CASES)
    parser.add_argument("-steps", type=int, required=True)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("-o", dest="output", type=Path, required=True)
    args = parser.parse_args()
    models = [model for path in args.checkpoints for model in open_models(path)]
    whole = Merger([[model] for model in models]).merge()  # for everything but its weights
    first, volumes = models[0], Volumes([args.dataset], args.n_cases, args.cases, n_patches=1000)
    experts = Experts(models, [model.tensors() for model in models], join(models, [1 / len(models)] * len(models)),
                      whole.trainer, open_patches(volumes, first, progress=True), torch_device(args.device),
                      progress=True)
    torch.manual_seed(0)
    network = build_network(first.plans, first.configuration, whole.dataset_json, whole.trainer, deep_supervision=True)
    state, canonical = network.state_dict(), first.layout.canonical
    polished = polish({canonical[name]: state[name] for name in first.layout.shapes}, experts, args.steps)
    record = whole.provenance["recipe"] | {"method": "random weights", "fit": ["polish"],
                                           "parameters": {"polish.steps": args.steps}}
    Merged({"all": replace(whole, state_dict={name: polished[canonical[name]] for name in whole.state_dict},
                           provenance=whole.provenance | {"recipe": record, "steps": []})}).save(args.output)


if __name__ == "__main__":
    main()
