"""What a MODEL is: its family, or the sentence that says why it cannot be trained."""

from __future__ import annotations

import comfy.model_base

from ...training.families import FAMILIES, Family


def family_of(model) -> Family:
    """The family of a MODEL; ValueError saying why when it cannot be trained."""
    base = model.model
    kind = type(base)
    name = {comfy.model_base.SDXL: "sdxl", comfy.model_base.Flux: "flux"}.get(kind)
    if name is None:
        supported = " or ".join(family.title for family in FAMILIES.values())
        raise ValueError(f"This MODEL is a {kind.__name__}, which cannot be trained yet: load an {supported} model.")
    if base.concat_keys or _extra_channels(base):
        raise ValueError(
            f"This {FAMILIES[name].title} MODEL is an inpainting or control variant, which takes a second picture: "
            "load the plain model to train on."
        )
    return FAMILIES[name]


def _extra_channels(base) -> bool:
    config = base.model_config.unet_config
    return config["in_channels"] != config["out_channels"]
