"""Fisher-weighted averaging: each weight counts as much as the model's predictions depend on it."""
import torch
from torch import nn

from nnunet_transplant.architecture import canonical_parameters
from nnunet_transplant.labels import has_regions
from nnunet_transplant.merging.calibration import IGNORED, Calibration
from nnunet_transplant.merging.linear import average
from nnunet_transplant.merging.registry import SEED, SHARES, Method, Parameter, register
from nnunet_transplant.merging.vectors import TaskVectors, Tensors

FLOOR = 1e-6  # of a model's mean Fisher value: where nothing depends on a weight, the models are averaged

Fisher = dict[str, torch.Tensor]


def fishers(vectors: TaskVectors, calibration: Calibration, labels: str, seed: int) -> list[Fisher]:
    """The diagonal Fisher information of each model, by tensor name, scaled to mean 1: the mean over patches of the
    squared gradient of the log-likelihood (mean over voxels) of labels drawn from the model's own predictions, or with
    labels "dataset" of the dataset's."""
    return [diagonal(calibration, model, vectors.names, labels, seed) for model in range(len(vectors.thetas))]


def diagonal(calibration: Calibration, model: int, names: list[str], labels: str, seed: int) -> Fisher:
    network = calibration.network(model)
    dataset_json = calibration.models[model].dataset_json
    regions = has_regions(dataset_json["labels"])
    parameters = {name: parameter.requires_grad_() for name, parameter in canonical_parameters(network).items()
                  if name in names}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator(calibration.device).manual_seed(seed)
    for patch in calibration.bar(calibration.patches, f"Fisher information of model {model + 1}"):
        logits = network(calibration.images([patch]))
        target = sampled(logits.detach(), regions, generator) if labels == "model" \
            else calibration.targets([patch], dataset_json)
        network.zero_grad()
        log_likelihood(logits, target, regions).backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:  # the heads of deep supervision take no part
                total[name].addcmul_(parameter.grad, parameter.grad)
    mean = sum(float(fisher.double().sum()) for fisher in total.values()) / sum(map(torch.numel, total.values()))
    return {name: (fisher / max(mean, 1e-30)).cpu() for name, fisher in total.items()}


def sampled(logits: torch.Tensor, regions: bool, generator: torch.Generator) -> torch.Tensor:
    """Labels drawn voxel by voxel from what the network predicts."""
    if regions:
        return torch.bernoulli(logits.sigmoid(), generator=generator).long()
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(1) / noise).argmax(1)  # the Gumbel-max trick


def log_likelihood(logits: torch.Tensor, target: torch.Tensor, regions: bool) -> torch.Tensor:
    """Mean over the voxels that are not ignored; a voxel of regions is the sum of its regions."""
    if not regions:
        return -nn.functional.cross_entropy(logits, target, ignore_index=IGNORED)
    counted = (target != IGNORED).float()
    each = nn.functional.binary_cross_entropy_with_logits(logits, target.float().clamp(min=0), reduction="none")
    return -(each * counted).sum() / counted[:, 0].sum().clamp(min=1)


def fisher(tensors: Tensors, state: list[Fisher], **_: object) -> torch.Tensor:
    """sum_t w_t F_t theta_t / sum_t w_t F_t, entry by entry."""
    if tensors.name not in state[0]:  # running statistics
        return average(tensors)
    merged, total = torch.zeros_like(tensors.thetas[0]), torch.zeros_like(tensors.thetas[0])
    for theta, weight, of_model in zip(tensors.thetas, tensors.weights, state, strict=True):
        information = weight * (of_model[tensors.name] + FLOOR)
        merged.addcmul_(information, theta)
        total.add_(information)
    return merged.div_(total)


register(Method(
    name="fisher", summary="mean of the models weighted entry by entry by their diagonal Fisher information",
    reference="Merging Models with Fisher-Weighted Averaging, Matena and Raffel, NeurIPS 2022",
    merge=fisher, prepare=fishers, weights_rule=SHARES, needs_base=False, needs_data="volumes",
    parameters=(Parameter("labels", "model", "whose labels: drawn from each model's own predictions, or the dataset's",
                          choices=("model", "dataset")),
                SEED)))
