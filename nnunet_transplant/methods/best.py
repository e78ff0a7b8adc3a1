"""One of the models, whole: where models have nothing in common that could be averaged."""
import torch

from nnunet_transplant.ensemble import agreement, ensemble_targets
from nnunet_transplant.experts import Experts
from nnunet_transplant.methods.registry import EQUAL, method
from nnunet_transplant.steps import Found
from nnunet_transplant.vectors import TaskVectors, Tensors


@method("best", "the model that agrees best with all of them: merges nothing, a start for a fit",
        reference="this package; after Model soups, Wortsman et al., ICML 2022",
        url="https://arxiv.org/abs/2203.05482", weights=EQUAL, needs=("volumes",),
        passes=lambda experts, settings: 2 * len(experts.models) * len(experts.patches), by_entry=True,
        strangers=True)
def best(vectors: TaskVectors, experts: Experts) -> Found:
    """theta_t of the model t whose labels, mean Dice over all structures, are nearest to those of the ensemble. A model
    of some of the structures has nothing of the others: those who know most come first. Of equals the first."""
    targets = experts.once("ensemble targets", lambda: ensemble_targets(experts))
    count = len(vectors.thetas)
    scores = []
    for model in experts.bar(range(count), "agreement with all"):
        network = experts.merged_network({**experts.tensors[model], **experts.heads(only(model, count))})
        scores.append(agreement(experts, network, targets))
    chosen = scores.index(max(scores))

    def merge(tensors: Tensors) -> torch.Tensor:
        return tensors.thetas[chosen].clone()
    return Found(merge, {"weights": only(chosen, count), "agreement": [round(score, 6) for score in scores]})


def only(model: int, count: int) -> list[float]:
    """Weights of one of the models alone."""
    return [float(each == model) for each in range(count)]
