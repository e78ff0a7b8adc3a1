"""What a merge kept of its experts: a free check on patches that no step learned from, without labels."""
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from nnunet_transplant.architecture import Network
from nnunet_transplant.device import forward_only
from nnunet_transplant.ensemble import labels_of
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.experts import Experts
from nnunet_transplant.fitting.head import head
from nnunet_transplant.heads import head_rows
from nnunet_transplant.labels import has_regions
from nnunet_transplant.volumes import Patch

ENOUGH = 0.9  # agreement below which a structure is worth a warning
MOST_NAMED = 5
MERGED, BASE, BEST = "merged", "base, head fitted", "best, head fitted"


@dataclass(frozen=True)
class Check:
    """Agreement with the experts: for each structure the Dice of a network's labels with those of the models that know
    it, over the voxels of all patches; None where neither sees it.

    held_back: whether no step of the merge looked at these patches.
    """
    agreement: dict[str, dict[str, float | None]]  # network -> structure -> Dice
    patches: int
    held_back: bool

    def to_json(self) -> dict[str, Any]:
        return {"agreement": self.agreement, "patches": self.patches, "held_back": self.held_back}

    def notes(self) -> list[str]:
        """A warning, where too little is left of a structure."""
        agreement = self.agreement[MERGED].items()
        lost = sorted((dice, name) for name, dice in agreement if dice is not None and dice < ENOUGH)
        if not lost:
            return []
        worst = ", ".join(f"{name} ({dice:.2f})" for dice, name in lost[:MOST_NAMED])
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        return [f"the merged model often disagrees with the experts about {worst}{more}: more volumes "
                "(-n_cases), a fit with more steps (-fit head entries -steps 600), or fewer models may help"]


def table_of(agreement: Mapping[str, Mapping[str, float | None]]) -> str:
    """The structures by row, the networks by column."""
    columns = list(agreement)
    rows = [["", *columns]] + [
        [structure, *("-" if (dice := agreement[column][structure]) is None else f"{dice:.3f}" for column in columns)]
        for structure in agreement[columns[0]]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(
        row[1:], widths[1:], strict=True))]) for row in rows)


def check(experts: Experts, held_back: Sequence[Patch], merged: Network, beside: Mapping[str, Network]) -> Check:
    """A merged network (tensors by canonical name), on the patches that were held back, or where there are none on all.
    Beside it by name networks in which nothing is merged, the base or one of the models, with the heads fitted to the
    experts: a merge that is no better has merged nothing."""
    networks = {MERGED: merged}
    for name, body in beside.items():
        with suppress(TransplantError):  # a network that ends in no convolution of single voxels
            networks[name] = head({**merged, **body}, experts)
    seen = replace(experts, patches=held_back or experts.patches)
    return Check(agreement(seen, networks), len(seen.patches), bool(held_back))


def agreement(experts: Experts, networks: Mapping[str, Network]) -> dict[str, dict[str, float | None]]:
    """See `Check`."""
    of_experts = [_said(experts, experts.network(model), trained.dataset_json)
                  for model, trained in enumerate(experts.models)]
    found: dict[str, dict[str, float | None]] = {}
    for name, tensors in networks.items():
        network = _said(experts, experts.merged_network(tensors), experts.dataset_json)
        found[name] = {structure: _dice(network, [expert for expert in of_experts if structure in expert.rows],
                                        structure) for structure in network.rows}
    return found


class _Said(NamedTuple):
    """What a network says of every patch."""
    labels: list[torch.Tensor]  # see `labels_of`
    rows: dict[str, int]        # of its head, by structure
    regions: bool

    def mask(self, patch: int, structure: str) -> torch.Tensor:
        labels, row = self.labels[patch], self.rows[structure]
        return labels[row] if self.regions else labels == row


def _said(experts: Experts, network: nn.Module, dataset_json: Mapping[str, Any]) -> _Said:
    regions = has_regions(dataset_json["labels"])
    with forward_only(experts.device):
        labels = [labels_of(network(experts.images([patch])), regions)[0].cpu() for patch in experts.patches]
    return _Said(labels, head_rows(experts.plans, dataset_json), regions)


def _dice(merged: _Said, experts: Sequence[_Said], structure: str) -> float | None:
    both = sizes = 0
    for expert in experts:
        for patch in range(len(merged.labels)):
            mine, theirs = merged.mask(patch, structure), expert.mask(patch, structure)
            both += int((mine & theirs).sum())
            sizes += int(mine.sum()) + int(theirs.sum())
    return 2 * both / sizes if sizes else None
