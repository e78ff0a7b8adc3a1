"""The analyses that a page can show, and what it says of each."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Analysis:
    """A kind of folder with a table.txt, figures, or both."""
    title: str
    reading: str  # how to read it
    shows: str    # what its figures show, for who cannot see them


ANALYSES = {
    "interference": Analysis(
        "Interference: where the tasks collide",
        "Weights alone, no data. Tasks get in each other's way where the large entries of their task vectors are the "
        "same (overlap) and disagree in sign (conflict), in stages that hold much of their norm. A cosine near 0, and "
        "an overlap no larger than chance, mean that the tasks go their own ways and add up.",
        "norm, overlap, sign conflicts and cosine of the task vectors, stage by stage through the U-Net"),
    "flatness": Analysis(
        "Flatness: how wide the minimum is",
        "Curvature of the loss at the model: the smaller the trace and the largest eigenvalues λ₁, λ₂, ... of the "
        "Hessian and of the Fisher information are, the wider the minimum, and the further weights can be moved before "
        "the loss rises. The bound of Eq. 7 (U-Net Transplant), ½ λ₁ ‖τ‖², limits what a task vector τ adds to the "
        "loss of its base; ½ τᵀHτ is what the same curvature predicts for τ's own direction.",
        "bars of the largest eigenvalues and Fisher entries on a logarithmic axis, models side by side"),
    "sweep": Analysis(
        "Sweep: which weights are best",
        "Dice of the merged model for many weights. A diamond marks the default weights, a star the best ones. A large "
        "bright area around the diamond means that the weights hardly matter; a star far away from it, that they do. "
        "Believe the score on the cases that were kept back, not that on the cases the weights were tuned on.",
        "Dice over the weights of the models, with the default weights as a diamond and the best as a star"),
    "landscape": Analysis(
        "Landscape: the loss between the models",
        "The loss over the plane through the models, and along the lines between them. Models in one basin merge well; "
        "a ridge between two (a barrier) is what their average has to pay.",
        "contours of the loss over the plane through the models, with every model marked"),
}
