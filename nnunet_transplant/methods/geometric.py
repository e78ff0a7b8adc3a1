"""Methods that look at angles: between models on a sphere (slerp, Karcher mean), between task vectors (Model Stock)."""
import math
from collections.abc import Sequence
from typing import Annotated

import torch

from nnunet_transplant.methods.linear import average
from nnunet_transplant.methods.registry import CONVEX, method
from nnunet_transplant.steps import Range
from nnunet_transplant.vectors import Tensors, add_weighted, blocks

PARALLEL = 1e-6  # radians below which an arc is its chord


@method("slerp", "two models: the point between them on a sphere instead of on a line, tensor by tensor",
        reference="Animating Rotation with Quaternion Curves, Shoemake, SIGGRAPH 1985",
        url="https://doi.org/10.1145/325165.325242", weights=CONVEX, max_models=2)
def slerp(tensors: Tensors) -> torch.Tensor:
    """The point at w_2 of the great arc from theta_1 to theta_2:
    sin(w_1 a) / sin(a) theta_1 + sin(w_2 a) / sin(a) theta_2, with a the angle between them; the weighted mean where
    they are parallel, opposite or zero.
    """
    if len(tensors.thetas) == 1:
        return average(tensors)
    products = inner_products(tensors.thetas)
    a = float(torch.arccos(cosines(products)[0, 1].clamp(-1, 1)))
    if not products.diagonal().all() or not PARALLEL < a < math.pi - PARALLEL:
        return average(tensors)
    return combined(tensors.thetas, [math.sin(weight * a) / math.sin(a) for weight in tensors.weights])


@method("karcher", "Riemannian mean: slerp for any number of models",
        reference="Riemannian Center of Mass and Mollifier Smoothing, Karcher, 1977",
        url="https://doi.org/10.1002/cpa.3160300502", weights=CONVEX)
def karcher(tensors: Tensors, iterations: Annotated[int, "steps at most", Range(1, 100000)] = 100) -> torch.Tensor:
    """The mean length times the Riemannian mean of the directions: the point of the sphere whose tangent vectors to the
    models, weighted, sum to zero. Found by steps along their sum; models that are zero have no direction.

    Every point on the way is sum_t c_t theta_t, so only the products of the models with each other are needed. Where
    the mean is not unique it is the last point reached, or where directions cancel out, the weighted mean.
    """
    products = inner_products(tensors.thetas)
    lengths = products.diagonal().sqrt()
    shares = torch.tensor(tensors.weights, dtype=torch.float64) * (lengths > 0)
    if int((shares > 0).sum()) < 2:
        return average(tensors)
    cosine = cosines(products)
    shares = shares / shares.sum()
    point = shares.clone()  # coefficients of the directions
    if not float(point @ cosine @ point) > PARALLEL ** 2:
        return average(tensors)
    for _ in range(iterations):
        point = point / (point @ cosine @ point).sqrt()
        to_models = (cosine @ point).clamp(-1, 1)
        arcs = torch.arccos(to_models)
        # log map: direction t minus its part along the point, at the arc's length
        rates = shares * torch.where((arcs > PARALLEL) & (arcs < math.pi - PARALLEL), arcs / arcs.sin(), 1.0)
        step = rates - (rates @ to_models) * point
        size = float((step @ cosine @ step).clamp(min=0).sqrt())
        if size < 1e-9:
            break
        point = math.cos(size) * point + math.sin(size) / size * step
    length = float(torch.tensor(tensors.weights, dtype=torch.float64) @ lengths)
    point = length * point / (point @ cosine @ point).sqrt() / lengths.clamp(min=1e-300)
    return combined(tensors.thetas, (point * (lengths > 0)).tolist())


def inner_products(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(T, T) in float64, summed block by block."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for start, stop in blocks(flat[0].numel()):
        part = torch.stack([tensor[start:stop] for tensor in flat]).double()
        products.addmm_(part, part.T)
    return products


def cosines(products: torch.Tensor) -> torch.Tensor:
    """(T, T) from inner products; those with a zero vector are 0."""
    lengths = products.diagonal().sqrt()
    return products / torch.outer(lengths, lengths).clamp(min=1e-300)


def combined(tensors: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """sum_t c_t theta_t, in float64 where coefficients are large: they cancel out, as models are nearly opposite."""
    dtype = torch.float64 if max(map(abs, coefficients)) > 10 else torch.float32
    return add_weighted(torch.zeros_like(tensors[0], dtype=dtype), tensors, coefficients).float()


@method("model_stock", "mean of the models drawn towards theta_0 the more, the less the task vectors agree",
        reference="Model Stock: All We Need Is Just a Few Fine-Tuned Models, Jang et al., ECCV 2024",
        url="https://arxiv.org/abs/2403.19522", weights=CONVEX, needs=("base",))
def model_stock(tensors: Tensors) -> torch.Tensor:
    """t times the weighted mean of the models plus (1 - t) theta_0, with t = T c / (1 + (T - 1) c) and c the mean
    cosine between two task vectors, at least 0."""
    count = len(tensors.thetas)
    if count == 1:
        return average(tensors)
    pairs = cosines(inner_products(tensors.taus)).fill_diagonal_(0)
    cosine = max(0.0, float(pairs.sum()) / (count * (count - 1)))
    t = count * cosine / (1 + (count - 1) * cosine)
    return average(tensors).mul_(t).add_(tensors.theta_0, alpha=1 - t)

