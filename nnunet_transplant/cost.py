"""How long looking at volumes takes, said beforehand."""
import time

from nnunet_transplant.device import forward_only
from nnunet_transplant.errors import note
from nnunet_transplant.experts import Experts
from nnunet_transplant.recipe import Recipe

WORTH_SAYING = 20.0  # seconds
SLOW = 2.0  # seconds


def say_cost(recipe: Recipe, experts: Experts, held_back: int, base: bool) -> None:
    """From one forward pass; and what makes it less. held_back: patches that the merge is checked on. base: whether the
    base is checked beside it."""
    settings = recipe.settings()
    passes = sum(step.passes(experts, settings[step.name]) for step in recipe.steps if step.passes is not None)
    passes += (len(experts.models) + 1 + base) * (held_back or len(experts.patches))
    if base:  # its head learns as -fit head does, from what the experts say
        passes += (1 + len(experts.models) * (not recipe.fit)) * len(experts.patches)
    seconds = passes * seconds_of_a_pass(experts)
    if seconds >= WORTH_SAYING:
        size = "x".join(map(str, experts.configuration.patch_size))
        note(f"{len(experts.patches)} patches of {size} voxels, about {passes:.0f} passes of a network: about "
             f"{in_words(seconds)} on {experts.device.type}. Fewer patches (-n_patches)"
             + " or a GPU (-device cuda)" * (experts.device.type == "cpu") + " make it less")


def seconds_of_a_pass(experts: Experts) -> float:
    """Of the second pass: a first one also finds memory and algorithms. Where it is slow, that hardly counts."""
    network, images = experts.network(0), experts.images(experts.patches[:1])
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with forward_only(experts.device):
            network(images).sum().item()
        seconds = time.perf_counter() - start
        if seconds > SLOW:
            break
    return seconds


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
