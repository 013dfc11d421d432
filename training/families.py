"""What differs between model families, as one table.

Prediction type (eps, v, flow) and noise levels are not here: they are read from the loaded model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ATTENTION = "attention"
ATTENTION_AND_FEED_FORWARD = "attention + feed-forward"
LAYER_PRESETS = (ATTENTION_AND_FEED_FORWARD, ATTENTION)


@dataclass(frozen=True)
class Family:
    """One row: how a family of models is adapted, checkpointed, previewed and named in a file."""

    name: str
    title: str
    layers: dict[str, str]
    """Layer preset -> pattern over the network's layer names."""
    blocks: tuple[str, ...]
    """Class names of the blocks that gradient checkpointing recomputes one by one."""
    adds_in_place: bool
    """The blocks add into their inputs, so what they normalise and what they are given must be copies."""
    same_input: tuple[tuple[str, ...], ...]
    """Ends of the names of layers that are called in turn with one input, and so can be computed together."""
    base_model_version: str
    """`ss_base_model_version` in the file, the name by which other tools know the family."""
    architecture: str
    """`modelspec.architecture` in the file."""
    activations_gib: float
    """GiB kept for backward per image at 1024 x 1024 without checkpointing (docs/benchmarks.md)."""
    sampler: str
    scheduler: str
    cfg: float
    guidance: float | None = None
    """What a guidance embedding is fed during training; None when the family has none."""

    def layer_pattern(self, preset: str) -> re.Pattern[str]:
        """The compiled pattern of a layer preset; ValueError when the preset is unknown."""
        if preset not in self.layers:
            raise ValueError(f"Unknown layers '{preset}': choose one of {', '.join(map(repr, self.layers))}.")
        return re.compile(self.layers[preset])


SDXL = Family(
    name="sdxl",
    title="SDXL",
    layers={
        ATTENTION: r"\.attn[12]\.to_(q|k|v|out\.0)$",
        ATTENTION_AND_FEED_FORWARD: r"\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$",
    },
    blocks=("BasicTransformerBlock", "ResBlock"),
    adds_in_place=False,
    same_input=((".attn1.to_q", ".attn1.to_k", ".attn1.to_v"), (".attn2.to_k", ".attn2.to_v")),
    base_model_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base/lora",
    activations_gib=6.2,
    sampler="euler",
    scheduler="normal",
    cfg=7.0,
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    layers={
        ATTENTION: r"^(double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12])$",
        ATTENTION_AND_FEED_FORWARD: (
            r"^(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])$"
        ),
    },
    blocks=("DoubleStreamBlock", "SingleStreamBlock"),
    adds_in_place=True,
    same_input=(),
    base_model_version="flux1",
    architecture="flux-1-dev/lora",
    activations_gib=32.0,
    sampler="euler",
    scheduler="simple",
    cfg=1.0,
    guidance=1.0,
)

FAMILIES = {family.name: family for family in (SDXL, FLUX)}
