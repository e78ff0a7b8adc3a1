"""Time and memory of alignment, on networks of nnU-Net's usual size (31 M parameters, six stages, 3d).

    python benchmarks/alignment_speed.py [-threads 2] [-patch 64]

Matching: seconds until it has converged, activations given, for two and five models that are permuted copies of one
with as much noise as signal. Activations: collecting them beside plain inference of the same patches with the same
models, pair by pair in one run; memory beyond the networks' own.
"""
import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet

from nnunet_transplant.alignment.activation_space import activation_similarity
from nnunet_transplant.alignment.dual import match, matcher, zipper
from nnunet_transplant.alignment.graph import exported
from nnunet_transplant.alignment.spec import permute
from nnunet_transplant.alignment.tracer import derive
from nnunet_transplant.architecture import canonical_names

FEATURES = (32, 64, 128, 256, 320, 320)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return PlainConvUNet(1, 6, FEATURES, torch.nn.Conv3d, 3, (1, 2, 2, 2, 2, 2), 2, 3, 2, True,
                         torch.nn.InstanceNorm3d, {"affine": True}, None, None, torch.nn.LeakyReLU, {"inplace": True},
                         deep_supervision=True).eval()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-threads", type=int, default=2)
    parser.add_argument("-patch", type=int, default=64, help="voxels along each axis")
    parser.add_argument("-patches", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    original = network()
    canonical = canonical_names(original)
    tensors = {canonical[name]: tensor.detach() for name, tensor in original.state_dict().items()}
    spec = derive(network(), (1, 1, 64, 64, 64))
    rng = np.random.default_rng(0)
    models = []
    for _ in range(5):
        moved = permute(tensors, spec, {name: rng.permutation(group.size) for name, group in spec.groups.items()})
        models.append({name: tensor + tensor.std(correction=0) * torch.randn_like(tensor) * (tensor.dim() > 1)
                       for name, tensor in moved.items()})
    print(f"{sum(t.numel() for t in tensors.values()) / 1e6:.1f} M parameters, {args.threads} threads, patches "
          f"of {args.patch}^3")
    program = exported(network(), (1, 1, *[args.patch] * 3))
    images = [torch.randn(1, 1, *[args.patch] * 3) for _ in range(args.patches)]
    for count in (2, 5):
        networks = models[:count]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        collecting = seconds(lambda networks=networks: activation_similarity(spec, program, networks, iter(images)))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        activations = activation_similarity(spec, program, networks, iter(images[:1]))

        def infer(networks: list[dict[str, torch.Tensor]] = networks) -> None:
            with torch.no_grad():
                for weights in networks:
                    original.load_state_dict({name: weights[canonical[name]] for name in canonical})
                    for image in images:
                        original(image)
        inference = seconds(infer)
        print(f"{count} models: activations {collecting:.1f} s, plain inference {inference:.1f} s, ratio "
              f"{collecting / inference:.2f}, {memory / 1024:.0f} MB more")
        for name, solve, alpha, options in (("rebasin", matcher(False), 1.0, {"pearson": False, "patience": 1}),
                                            ("mudsc", matcher(False), 0.5, {}),
                                            ("mudsc -to mean", matcher(True), 0.5, {}),
                                            ("mudsc -units zip -budget 0.125", zipper(0.5, 0.125), 0.5, {})):
            start = time.perf_counter()
            found = match(spec, networks, solve, alpha, activations if alpha < 1 else None, **options)
            print(f"  {name}: {time.perf_counter() - start:.1f} s, best after {found.sweeps} sweeps", flush=True)


if __name__ == "__main__":
    main()
