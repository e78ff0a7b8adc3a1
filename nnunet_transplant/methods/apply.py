"""Apply a method to whole networks: block by block, on all cores, with the same result on any number of them."""
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from nnunet_transplant.architecture import Network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.methods.registry import Method
from nnunet_transplant.steps import Found, arguments
from nnunet_transplant.vectors import TaskVectors, Tensors, blocks, in_parallel, is_finite


class Piece(NamedTuple):
    """A tensor, or the entries start to stop of it flattened."""
    name: str
    start: int = 0
    stop: int | None = None


def merge_tensors(method: Method, settings: Mapping[str, Any], weights: Sequence[float], theta_0: Network | None,
                  thetas: Sequence[Network], experts: Any = None, scales: Mapping[str, float] | None = None,
                  check: Callable[[Tensors], None] = lambda tensors: None, progress: bool = False) -> Found:
    """The merged network of networks given by the names of their tensors (floats of any type, all of one layout), and
    what the method found out.

    settings: every option of the method. experts: what methods that need volumes look at (an `Experts`).
    scales: factors for the merged task vector of single tensors; 0 leaves them at theta_0.
    check: sees every piece of the inputs before the method does, and raises for what must not be merged.
    Returns tensors of the types of the first network; they are computed in float32. Raises TransplantError where they
    are beyond the range of their type.
    """
    vectors = TaskVectors(theta_0, thetas, weights)
    if method.inputs == ("tensors",):
        made = Found(partial(method.function, **arguments(settings)), {})
    else:
        made = method.call(settings, vectors=vectors, experts=experts)
    merged = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in thetas[0].items()}

    def merge_piece(piece: Piece) -> None:
        tensors = vectors.block(*piece)
        check(tensors)
        scale = (scales or {}).get(piece.name, 1.0)
        if scale == 0.0:
            result = tensors.theta_0
        else:
            result = made.result(tensors)
            if scale != 1.0:
                result = torch.lerp(tensors.theta_0, result, scale)
        target = merged[piece.name]
        if piece.stop is not None:
            target = target.view(-1)[piece.start:piece.stop]
        target.copy_(result)
        if not is_finite(target):
            raise TransplantError(f"the merged {piece.name} goes beyond the range of {target.dtype}: merge with "
                                  "smaller -weights or -lambda")

    pieces = [piece for name, tensor in merged.items() for piece in _pieces(name, tensor.numel(), method.by_entry)]
    done = in_parallel(merge_piece, pieces)
    for _ in tqdm(done, desc=method.name, total=len(pieces), delay=3, disable=not progress):
        pass
    return Found(merged, made.found)


def _pieces(name: str, size: int, by_entry: bool) -> list[Piece]:
    return [Piece(name, *block) for block in blocks(size)] if by_entry else [Piece(name)]
