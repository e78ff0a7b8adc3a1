"""How long merging methods that look at volumes take, beside plain inference on the same volumes.

    python benchmarks/volumes_speed.py -m TASK_A TASK_B -f 0 -d DATASET [-cases val:0] [-n_cases 4] [-device cpu]

Plain inference is nnU-Net's own predictor with the first model and its default options (steps of half a patch, and
mirroring where the model allows it), without reading and writing files. The methods see the same volumes as patches
side by side and run every model on them; reading and preprocessing are the same for all and not counted. Prints
Markdown.
"""
import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nnunet_transplant.environment import use_our_trainers
from nnunet_transplant.experts import Experts
from nnunet_transplant.heads import join
from nnunet_transplant.methods import METHODS
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.prediction import predictor, torch_device
from nnunet_transplant.recipe import Recipe
from nnunet_transplant.vectors import TaskVectors
from nnunet_transplant.volumes import Volumes, open_patches, preprocessed

STEPS = 20  # of gradient descent, from which the time of the default number is computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", type=Path, nargs="+", required=True)
    parser.add_argument("-f", required=True)
    parser.add_argument("-d", required=True)
    parser.add_argument("-cases")
    parser.add_argument("-n_cases", type=int, default=4)
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    use_our_trainers()
    device = torch_device(args.device)
    models = [open_models(path, [args.f])[0] for path in args.m]
    weights = [1 / len(models)] * len(models)
    tensors = [model.tensors() for model in models]
    volumes = Volumes([args.d], args.n_cases, args.cases, n_patches=1000)
    experts = Experts(models, tensors, join(models, weights), models[0].trainer, open_patches(volumes, models[0]),
                      device)
    body = [{name: theta[name] for name in models[0].layout.body} for theta in tensors]
    vectors = TaskVectors(models[0].theta_0(), body, weights)

    nnunet = predictor([models[0]], device, progress_bar=False)
    images = [torch.from_numpy(data) for data, _, _ in preprocessed(volumes, models[0])]
    plain = seconds(lambda: [nnunet.predict_logits_from_preprocessed_data(image) for image in images])
    size = "x".join(map(str, experts.patches[0].image.shape[1:]))
    print(f"{args.n_cases} volumes, {len(experts.patches)} patches of {size}, {len(models)} models, "
          f"{torch.get_num_threads()} threads, {device}\n")
    print("| | seconds | x plain inference |\n| --- | --- | --- |")
    print(f"| plain inference, one model | {plain:.1f} | 1.0 |")
    for method in METHODS.values():
        if method.looks:
            took = of_method(method.name, vectors, experts)
            print(f"| `{method.name}` | {took:.1f} | {took / plain:.1f} |", flush=True)


def of_method(name: str, vectors: TaskVectors, experts: Experts) -> float:
    """Seconds with the default parameters; gradient descent is timed over few steps and scaled to their default."""
    method = METHODS[name]
    settings = Recipe(name).settings()[name]

    def took(**more: int) -> float:
        anew = replace(experts)  # without what an earlier run has kept
        return seconds(lambda: method.call(settings | more, vectors=vectors, experts=anew))
    if "iterations" not in settings:
        return took()
    start, more = (took(iterations=steps) for steps in (1, 1 + STEPS))
    return start + (more - start) / STEPS * (settings["iterations"] - 1)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
