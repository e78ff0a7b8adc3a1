"""Learning without Forgetting (Li and Hoiem, ECCV 2016) as a rival of merging: a base's structures are kept while new
ones are learned, from what the base says of the images.

Of the labels only those count that the base does not know; the others are the base's own prediction, as hard labels for
nnU-Net's loss, and as soft ones: the divergence from its probabilities, where no new structure is. The base is the
checkpoint in the environment variable TRANSPLANT_BASE; start with it by -pretrained_weights, too.
"""
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import interpolate, kl_div

from nnunet_transplant.architecture import build_network
from nnunet_transplant.model_folder import open_models
from nnunet_transplant.training import TaskVectorTrainer, variants_of


class nnUNetTrainerWithoutForgetting(TaskVectorTrainer):
    def on_train_start(self) -> None:
        base = open_models(Path(os.environ["TRANSPLANT_BASE"]))[0]
        self.teacher = build_network(base.plans, base.configuration, base.dataset_json, deep_supervision=False)
        tensors = base.tensors()
        self.teacher.load_state_dict({name: tensors[canonical] for name, canonical in base.layout.canonical.items()})
        self.teacher.to(self.device).eval()
        values, rows = self.dataset_json["labels"], base.dataset_json["labels"]
        self.of_row = torch.tensor([values[name] for name in sorted(rows, key=rows.get)], device=self.device)
        known = torch.zeros(len(values), dtype=torch.bool, device=self.device)
        known[self.of_row] = True
        self.is_new = ~known
        super().on_train_start()

    def _backward(self, batch: dict) -> torch.Tensor:
        data, target = batch["data"].to(self.device), batch["target"]
        labels = (target[0] if isinstance(target, list) else target).to(self.device).long().clamp(min=0)
        with torch.no_grad():
            said = self.teacher(data)
        new = self.is_new[labels]
        hard = torch.where(new, labels, self.of_row[said.argmax(1, keepdim=True)]).float()
        output = self.network(data)
        outputs = output if isinstance(output, list) else [output]
        targets = [interpolate(hard, each.shape[2:], mode="nearest") for each in outputs]
        loss = self.loss(output, targets if isinstance(output, list) else hard)
        old = outputs[0][:, self.of_row].log_softmax(1)
        divergence = kl_div(old, said.log_softmax(1), reduction="none", log_target=True).sum(1, keepdim=True)
        loss = (loss + divergence[~new].mean()) / self.num_micro_batches
        loss.backward()
        return loss.detach()


def __getattr__(name: str) -> Callable:
    return variants_of(nnUNetTrainerWithoutForgetting)(name)
