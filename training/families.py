"""What differs between model families, as one table, and the same facts read off a network that is not in it.

Prediction type (eps, v, flow) and noise levels are not here: they are read from the loaded model.

The layers of `full` are those that kohya's sd-scripts adapts unless told otherwise: for SD 1.5 and SDXL every linear
layer (and 1 x 1 convolution) of the transformers, for SD 3 and FLUX every linear layer of the blocks, modulation
included, and never what comes before the first block or after the last. ai-toolkit takes the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .structure import structure_of

ATTENTION = "attention"
ATTENTION_AND_FEED_FORWARD = "attention + feed-forward"
FULL = "full"
LAYER_PRESETS = (ATTENTION_AND_FEED_FORWARD, ATTENTION, FULL)


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
    """What a guidance embedding is fed during training; None leaves it to ComfyUI, or the family has none."""


_UNET_LAYERS = {
    ATTENTION: r"\.attn[12]\.to_(q|k|v|out\.0)$",
    ATTENTION_AND_FEED_FORWARD: r"\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))$",
    FULL: r"\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out)$",
}

SDXL = Family(
    name="sdxl",
    title="SDXL",
    layers=_UNET_LAYERS,
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

SD15 = replace(
    SDXL,
    name="sd1",
    title="SD 1.5",
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1/lora",
    activations_gib=3.0,
)

SD2 = replace(
    SD15,
    name="sd2",
    title="SD 2",
    base_model_version="sd_v2",
    architecture="stable-diffusion-v2-512/lora",
)

SD3 = Family(
    name="sd3",
    title="SD 3",
    layers={
        ATTENTION: r"^joint_blocks\.\d+\.(x|context)_block\.attn2?\.(qkv|proj)$",
        ATTENTION_AND_FEED_FORWARD: r"^joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])$",
        FULL: r"^joint_blocks\.\d+\.(x|context)_block\.(attn2?\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)$",
    },
    blocks=("JointBlock",),
    adds_in_place=False,
    same_input=(),
    base_model_version="sd3_medium",
    architecture="stable-diffusion-3-medium/lora",
    activations_gib=6.5,
    sampler="euler",
    scheduler="sgm_uniform",
    cfg=4.5,
)

SD35_MEDIUM = replace(
    SD3,
    title="SD 3.5",
    base_model_version="sd3.5_medium",
    architecture="stable-diffusion-3-5-medium/lora",
    activations_gib=9.5,
)

SD35_LARGE = replace(
    SD35_MEDIUM,
    base_model_version="sd3.5_large",
    architecture="stable-diffusion-3-5-large/lora",
    activations_gib=18.5,
)

FLUX = Family(
    name="flux",
    title="FLUX.1",
    layers={
        ATTENTION: r"^(double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12])$",
        ATTENTION_AND_FEED_FORWARD: (
            r"^(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])|single_blocks\.\d+\.linear[12])$"
        ),
        FULL: (
            r"^(double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02]|mod\.lin)"
            r"|single_blocks\.\d+\.(linear[12]|modulation\.lin))$"
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

SCHNELL = replace(FLUX, architecture="flux-1-schnell/lora")

CHROMA = replace(
    FLUX,
    name="chroma",
    title="Chroma",
    base_model_version="chroma",
    architecture="chroma/lora",
    cfg=4.0,
    # Its guidance is no knob: the released model was distilled with 0, which is what ComfyUI feeds.
    guidance=None,
)

FAMILIES = {family.name: family for family in (SDXL, FLUX, SD15, SD2, SD3, CHROMA)}


def family_by_structure(
    network: nn.Module,
    name: str,
    title: str,
    *,
    base_model_version: str,
    architecture: str,
    cfg: float,
    guidance: float | None = None,
) -> Family | None:
    """The row of a network that has none: layers and blocks by structure, copies wherever a block might add in place.

    None when the network is not made of repeated blocks with attention in them.
    """
    structure = structure_of(network)
    if structure is None:
        return None
    return Family(
        name=name,
        title=title,
        layers={
            ATTENTION: structure.attention,
            ATTENTION_AND_FEED_FORWARD: structure.attention_and_feed_forward,
            FULL: structure.full,
        },
        blocks=structure.blocks,
        adds_in_place=True,
        same_input=(),
        base_model_version=base_model_version,
        architecture=architecture,
        activations_gib=structure.activations_gib,
        sampler="euler",
        scheduler="simple",
        cfg=cfg,
        guidance=guidance,
    )
