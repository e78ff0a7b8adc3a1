"""Methods that look at angles: between models on a sphere (slerp, Karcher mean), between task vectors (Model Stock)."""
import itertools
import math

import torch

from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import SHARES, Method, Parameter, register
from nnunet_transplant.merging.vectors import Tensors

PARALLEL = 1e-6  # radians below which an arc is its chord


def slerp(tensors: Tensors, state: None = None) -> torch.Tensor:
    """The point at w_2 of the great arc from theta_1 to theta_2; their lengths change along it as the models' do.

    sin(w_1 a) / sin(a) theta_1 + sin(w_2 a) / sin(a) theta_2, with a the angle between them; the weighted mean where
    they are parallel, opposite or zero.
    """
    if len(tensors.thetas) == 1:
        return average(tensors)
    a = angle(*tensors.thetas)
    if not PARALLEL < a < math.pi - PARALLEL:
        return average(tensors)
    first, second = (math.sin(weight * a) / math.sin(a) for weight in tensors.weights)
    return first * tensors.thetas[0] + second * tensors.thetas[1]


def angle(first: torch.Tensor, second: torch.Tensor) -> float:
    """In radians, precise also where it is small; NaN where one of them is zero."""
    first, second = (unit(tensor.double()) for tensor in (first, second))
    return 2 * math.atan2(float((first - second).norm()), float((first + second).norm()))


def unit(tensor: torch.Tensor) -> torch.Tensor:
    return tensor / tensor.norm()


def karcher(tensors: Tensors, state: None = None, iterations: int = 100) -> torch.Tensor:
    """The mean length times the Riemannian mean of the directions: the point of the sphere whose tangent vectors to the
    models, weighted, sum to zero. Found by steps along their sum; models that are zero have no direction.

    Raises nothing where it is not unique (opposite models): it is then the last point reached.
    """
    lengths = [float(theta.double().norm()) for theta in tensors.thetas]
    pairs = [(weight, unit(theta.double())) for weight, theta, length in
             zip(tensors.weights, tensors.thetas, lengths, strict=True) if length > 0 and weight > 0]
    start = sum((weight * direction for weight, direction in pairs), torch.zeros(()))
    if len(pairs) < 2 or not start.norm() > 0:
        return average(tensors)
    total = sum(weight for weight, _ in pairs)
    point = unit(start)
    for _ in range(iterations):
        step = torch.zeros_like(point)
        for weight, direction in pairs:
            across = direction - (direction * point).sum() * point
            arc = angle(point, direction)
            if PARALLEL < arc < math.pi - PARALLEL:
                step.add_(across, alpha=weight / total * arc / float(across.norm()))
            elif arc <= PARALLEL:
                step.add_(across, alpha=weight / total)
        size = float(step.norm())
        if size < 1e-9:
            break
        point = unit(math.cos(size) * point + math.sin(size) / size * step)
    length = sum(weight * length for weight, length in zip(tensors.weights, lengths, strict=True))
    return (length * point).float()


def model_stock(tensors: Tensors, state: None = None) -> torch.Tensor:
    """t times the weighted mean of the models plus (1 - t) theta_0, with t = T c / (1 + (T - 1) c) and c the mean
    cosine between two task vectors, at least 0."""
    taus = [tau.reshape(-1).double() for tau in tensors.taus]
    cosines = [float(torch.dot(one, other) / (one.norm() * other.norm()).clamp(min=1e-300))
               for one, other in itertools.combinations(taus, 2)]
    cosine = max(0.0, sum(cosines) / len(cosines)) if cosines else 1.0
    t = len(taus) * cosine / (1 + (len(taus) - 1) * cosine)
    return average(tensors).mul_(t).add_(tensors.theta_0, alpha=1 - t)


register(Method(
    name="slerp", summary="two models: the point between them on a sphere instead of on a line, tensor by tensor",
    reference="Animating Rotation with Quaternion Curves, Shoemake, SIGGRAPH 1985",
    merge=slerp, weights_rule=SHARES, needs_base=False, max_models=2))
register(Method(
    name="karcher", summary="Riemannian mean: slerp for any number of models",
    reference="Riemannian Center of Mass and Mollifier Smoothing, Karcher, 1977",
    merge=karcher, weights_rule=SHARES, needs_base=False,
    parameters=(Parameter("iterations", 100, "steps at most", 1, 100000),)))
register(Method(
    name="model_stock", summary="mean of the models drawn towards theta_0 the more, the less the task vectors agree",
    reference="Model Stock: All We Need Is Just a Few Fine-Tuned Models, Jang et al., ECCV 2024",
    merge=model_stock, weights_rule=SHARES))
