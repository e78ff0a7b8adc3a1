"""What merges with what: models of the same preprocessing, network and base."""
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_transplant import checkpoint as checkpoints
from nnunet_transplant.architecture import Network
from nnunet_transplant.errors import TransplantError
from nnunet_transplant.labels import channel_names, same_channels
from nnunet_transplant.model_folder import TrainedModel, shortened
from nnunet_transplant.vectors import is_finite


def check_finite(tensor: torch.Tensor, name: str, model: TrainedModel) -> None:
    """Raise TransplantError where a model's tensor holds NaN or Inf."""
    if not is_finite(tensor):
        raise TransplantError(f"{model.path} holds NaN or Inf in {name}")


def check_base(theta_0: Network, model: TrainedModel) -> None:
    """Raise TransplantError where theta_0 is of another network than the model's."""
    expected = {name: model.layout.shapes[name] for name in model.layout.body}
    if {name: tuple(tensor.shape) for name, tensor in theta_0.items()} != expected:
        raise TransplantError(f"the base is another network than {model.name}")


# What must agree for the same weights to mean the same: nnU-Net's preprocessing, field by field. What else plans and
# dataset.json say is about training (batch_size, batch_dice, augmentation), about the output (transpose_backward,
# resampling_fn_probabilities, regions_class_order, file_ending), about how the plans were found (median sizes and
# spacings, the planner), about where files lie (data_identifier, names), or about the network, whose modules are
# compared themselves. The patch size is that of the first model: the networks take any.
_CONFIGURATION_FIELDS = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name",
                         "resampling_fn_data", "resampling_fn_data_kwargs", "previous_stage")
_OF_EACH_IMAGE = {"ZScoreNormalization", "RescaleTo01Normalization", "RGBTo01Normalization", "NoNormalization"}
# Readers by how they turn the axes of a file; others are like themselves alone.
_TURNED = {"SimpleITKIO": "as stored", "NibabelIO": "as stored", "SimpleITKIOWithReorient": "to RAS",
           "NibabelIOWithReorient": "to RAS"}


class Planned(Protocol):
    """What says how images are preprocessed: a model, or the plans of a dataset."""
    @property
    def plans(self) -> dict[str, Any]: ...

    @property
    def dataset_json(self) -> dict[str, Any]: ...

    @property
    def configuration(self) -> str: ...


def preprocessing_fields(model: Planned, channels: bool = True) -> dict[str, Any]:
    """What the model's input goes through before the network, by names a user finds in the plans; with `channels` the
    names of the image channels, else their number."""
    manager = PlansManager(model.plans)
    configuration = manager.get_configuration(model.configuration).configuration
    names = channel_names(model.dataset_json)
    reader = str(model.plans.get("image_reader_writer"))
    fields = {"configuration": model.configuration, "channels": names if channels else len(names),
              "image_reader_writer": reader, "transpose_forward": model.plans.get("transpose_forward")}
    fields |= {field: configuration.get(field) for field in _CONFIGURATION_FIELDS}
    if not _OF_EACH_IMAGE.issuperset(configuration.get("normalization_schemes") or ["unknown"]):
        by_modality = model.plans.get("foreground_intensity_properties_by_modality")  # as old plans call it
        fields["CT intensity statistics"] = model.plans.get("foreground_intensity_properties_per_channel", by_modality)
    if configuration.get("previous_stage"):  # the labels of the previous stage are input channels
        fields["labels"] = model.dataset_json["labels"]
        fields |= {field: configuration.get(field) for field in ("resampling_fn_seg", "resampling_fn_seg_kwargs")}
    return fields


def _agree(field: str, one: Any, other: Any) -> bool:
    """Whether two models see the same numbers where a field says this to the one and that to the other."""
    if field == "channels" and isinstance(one, list):
        return same_channels(one, other)
    if field == "image_reader_writer":
        return _TURNED.get(one, one) == _TURNED.get(other, other)
    return one == other


def preprocess_alike(one: Planned, other: Planned) -> bool:
    """Whether both see the same numbers of the same image, whatever they call its channels."""
    ours, theirs = preprocessing_fields(one, channels=False), preprocessing_fields(other, channels=False)
    return all(_agree(field, ours.get(field), theirs.get(field)) for field in ours | theirs)


def check_mergeable(models: Sequence[TrainedModel], same_base: bool = True, channels: bool = True) -> None:
    """Raise TransplantError with a table of what differs, unless all models preprocess their input in the same way,
    have the same network, and with same_base come from the same theta_0 where it is known. channels: False where
    somebody knows that image channels of different names are the same."""
    first = models[0]
    for other in models[1:]:
        ours, theirs = preprocessing_fields(first, channels), preprocessing_fields(other, channels)
        rows = [(field, ours.get(field), theirs.get(field)) for field in ours | theirs
                if not _agree(field, ours.get(field), theirs.get(field))]
        named = channels and any(row[0] == "channels" for row in rows) and len(ours["channels"]) == len(
            theirs["channels"])
        body = {name: first.layout.shapes[name] for name in first.layout.body}
        other_body = {name: other.layout.shapes[name] for name in other.layout.body}
        rows += [(name, body.get(name, "none"), other_body.get(name, "none")) for name in body | other_body
                 if body.get(name) != other_body.get(name)][:5]
        if body == other_body:  # the same tensors can stand in another network
            modules, other_modules = first.layout.modules, other.layout.modules
            rows += [(name, modules.get(name, "none"), other_modules.get(name, "none"))
                     for name in modules | other_modules if modules.get(name) != other_modules.get(name)][:5]
        known, known_too = first.theta_0_sha256, other.theta_0_sha256
        if same_base and known is not None and known_too is not None and known != known_too:
            rows.append(("theta_0 (SHA-256)", known[:16], known_too[:16]))
        if rows:
            table = "\n".join(f"  {field}: {shortened(a)} | {shortened(b)}" for field, a, b in rows)
            raise TransplantError(f"{first.name} and {other.name} cannot merge; they differ in\n{table}"
                                  + "\nIf these channels are the same, pass --same_channels" * named)


def common_theta_0_sha256(models: Sequence[TrainedModel]) -> str | None:
    """The theta_0 that the models record (after check_mergeable at most one), None where none does."""
    return next((model.theta_0_sha256 for model in models if model.theta_0_sha256), None)


def common_theta_0(models: Sequence[TrainedModel], given: Network | None, needing: str) -> Network:
    """The base of models that can merge, by canonical names: the given one, else the one that a folder keeps.

    needing: who needs it, for the message. Raises TransplantError where the given one is another than recorded or of
    another network, or none is given and a model records none.
    """
    if given is not None:
        check_base(given, models[0])
        recorded = common_theta_0_sha256(models)
        if recorded is not None and checkpoints.tensors_sha256(given) != recorded:
            raise TransplantError(f"the base given by -base is not the one these models were fine-tuned from "
                                  f"(theta_0 with SHA-256 {recorded[:16]}...)")
        return given
    kept = next((theta_0 for theta_0 in (model.theta_0() for model in models) if theta_0 is not None), None)
    if kept is None:
        raise TransplantError(f"{needing} theta_0, the base these models were fine-tuned from: the model folders keep "
                              "none (stock fine-tuning does not), so give it with -base")
    unknown = model_of_unknown_base(models)
    if unknown is not None:
        raise TransplantError(f"{unknown.name} does not record the base it was fine-tuned from: give it with -base")
    check_base(kept, models[0])
    return kept


def model_of_unknown_base(models: Sequence[TrainedModel]) -> TrainedModel | None:
    """The first that does not record its base, and is not the base itself of the others."""
    recorded = common_theta_0_sha256(models)
    return next((model for model in models if model.theta_0_sha256 is None and (
        recorded is None or checkpoints.tensors_sha256(model.body()) != recorded)), None)


# ---------------------------------------------------------------------------------------------------------------------
# Whether models have a base in common.

SAME_BASE_COSINE = 0.5  # fine-tuned siblings lie above 0.9, independently trained networks near 0


def have_one_base(models: Sequence[TrainedModel]) -> bool:
    """Whether models that can merge come from one base: as they record it, or where they do not, as their weights
    look."""
    recorded = {model.theta_0_sha256 for model in models}
    if len(recorded - {None}) > 1:
        return False
    return None not in recorded or least_cosine(models, [model.tensors() for model in models]) >= SAME_BASE_COSINE


def least_cosine(models: Sequence[TrainedModel], tensors: Sequence[Network]) -> float:
    """Of the first model's largest tensor with those of the others; 1 for a model alone."""
    name = max(models[0].layout.body, key=lambda n: tensors[0][n].numel())
    first, *others = (theta[name].float().reshape(-1) for theta in tensors)
    return min((float(torch.cosine_similarity(first, other, dim=0)) for other in others), default=1.0)


def unrelated(models: Sequence[TrainedModel], tensors: Sequence[Network]) -> list[str]:
    """A note where models that record no common base look as if they had none."""
    if not tensors or common_theta_0_sha256(models) is not None:
        return []
    cosine = least_cosine(models, tensors)
    if cosine >= SAME_BASE_COSINE:
        return []
    return [f"these models do not seem to come from one base (cosine of their weights {cosine:.2f}): their merge is "
            "likely useless. Aligned models need no common base (-align mudsc -d DATASET). Score either with "
            "nnunet_transplant_evaluate before you use it"]
