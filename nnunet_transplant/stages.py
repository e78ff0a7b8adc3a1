"""Which tensors of a U-Net a merge holds back: whole tensors by name, or the stages of encoder and decoder."""
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from nnunet_transplant.architecture import Layout
from nnunet_transplant.errors import TransplantError


def scales(layout: Layout, keep_base_for: Sequence[str] = (),
           stage_weights: Sequence[float] | None = None) -> dict[str, float]:
    """Factors for the merged task vector by canonical tensor name: those of the stages, 0 for what stays at theta_0.

    keep_base_for: shell patterns; a tensor stays at theta_0 if one of them matches one of its names.
    stage_weights: one for each stage of the encoder, from full to lowest resolution, then one for each stage of the
    decoder, from low to full resolution; a decoder stage has its upsampling. Raises TransplantError for a pattern that
    matches nothing, a wrong number of weights, and networks without such stages.
    """
    factors: dict[str, float] = {}
    if stage_weights is not None:
        stage = {name: found for name in layout.body if (found := stage_of(name)) is not None}
        odd = next((name for name in layout.body if name not in stage), None)
        if odd is not None:
            raise TransplantError(f"-stage_weights needs a U-Net with encoder and decoder stages; this network's {odd} "
                                  "is in none")
        order = sorted(set(stage.values()), key=lambda part: (part[0] == "decoder", part[1]))
        if len(stage_weights) != len(order):
            encoder = sum(part == "encoder" for part, _ in order)
            raise TransplantError(f"-stage_weights has {len(stage_weights)} numbers; this network has {encoder} stages "
                                  f"in the encoder and {len(order) - encoder} in the decoder")
        if not all(-10 <= weight <= 10 for weight in stage_weights):  # also refuses NaN
            raise TransplantError("-stage_weights must lie between -10 and 10")
        weight_of = dict(zip(order, stage_weights, strict=True))
        factors = {name: weight_of[number] for name, number in stage.items()}
    for pattern in keep_base_for:
        factors |= dict.fromkeys(matching(layout, pattern, "-keep_base_for"), 0.0)
    return factors


def matching(layout: Layout, pattern: str, option: str) -> set[str]:
    """The tensors outside the heads, by canonical name, of which a shell pattern matches one of the names. Raises
    TransplantError where there is none."""
    found = {layout.canonical[name] for name in layout.shapes if fnmatchcase(name, pattern)} & set(layout.body)
    if not found:
        raise TransplantError(f"{option} {pattern} matches no tensor outside the heads; names look like "
                              f"{layout.body[0]}")
    return found


def stage_of(name: str) -> tuple[str, int] | None:
    """("encoder", i) or ("decoder", i) for a tensor of nnU-Net's U-Nets."""
    if found := re.search(r"encoder\.(?:stem|stages\.(\d+))\.", name):
        return "encoder", int(found[1] or 0)
    if found := re.search(r"decoder\.(?:stages|transpconvs)\.(\d+)\.", name):
        return "decoder", int(found[1])
    return None
