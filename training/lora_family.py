"""Which family of models a LoRA file was made for, read from its metadata or from the names of its layers."""

import re
from collections.abc import Iterable, Mapping

TITLES = {
    "sd1": "SD 1.5",
    "sd2": "SD 2",
    "sdxl": "SDXL",
    "sd3": "SD 3",
    "flux": "FLUX",
    "flux2": "FLUX.2",
    "chroma": "Chroma",
    "qwen_image": "Qwen-Image",
    "lumina2": "Lumina 2",
    "z_image": "Z-Image",
    "hunyuan_image": "Hunyuan Image",
    "hidream": "HiDream",
    "aura_flow": "AuraFlow",
    "pixart": "PixArt",
}

# What trainers write. The first pattern that is found decides, so FLUX.2 stands before FLUX.
VERSIONS = {
    "chroma": r"chroma",
    "qwen_image": r"qwen[-_. ]?image",
    "z_image": r"z[-_. ]?image",
    "lumina2": r"lumina",
    "hunyuan_image": r"hunyuan[-_. ]?image",
    "hidream": r"hidream",
    "aura_flow": r"aura[-_. ]?flow",
    "pixart": r"pixart",
    "flux2": r"flux[-_. ]?2|klein",
    "flux": r"flux",
    "sd3": r"sd[-_]?3|stable-diffusion-v?3",
    "sdxl": r"sdxl|stable-diffusion-xl|illustrious|pony",
    "sd2": r"sd[-_]?v?2|stable-diffusion-v2",
    "sd1": r"sd[-_]?v?1|stable-diffusion-v1",
}

# Layers that one family has and those after it lack; `.` stands for a dot or an underscore. FLUX and Qwen-Image stand
# before SD 3, since their double blocks are called as SD 3's are. SDXL and SD 1 share their layer names, but SDXL has
# more than one transformer block in a place and a second text encoder, and SD 1 has attention at full resolution.
LAYERS = {
    "flux2": r"double_stream_modulation|single_stream_modulation",
    "chroma": r"distilled_guidance_layer",
    "hunyuan_image": r"individual_token_refiner",
    "hidream": r"(double|single)_stream_blocks",
    "aura_flow": r"(^|.)(double|single)_layers.\d",
    "flux": r"double_blocks.\d|single_blocks.\d|single_transformer_blocks.\d",
    "qwen_image": (
        r"transformer_blocks.\d+.(img|txt)_(mlp|mod)"
        r"|^(diffusion_model.|lora_unet_)?transformer_blocks.\d+.attn.(add_._proj|to_add_out)"
        # SD 3 has 38 double blocks at most, Qwen-Image 60.
        r"|transformer.transformer_blocks.(3[89]|[45]\d).attn.add_._proj"
    ),
    "sd3": r"joint_blocks.\d|transformer.transformer_blocks.\d+.attn.add_._proj",
    "lumina2": r"(noise|context)_refiner.\d|^(diffusion_model.|lora_unet_|transformer.)?layers.\d+.attention.",
    "pixart": r"cross_attn.(q|kv)_linear",
    "sdxl": (
        r"^lora_te2_text_model|^text_encoder_2\.text_model"
        r"|(down|up|mid|input|output|middle)_blocks?.(\d.){0,2}(attentions.\d.)?(\d.)?transformer_blocks.[1-9]"
    ),
    "sd1": r"down_blocks.0.attentions|up_blocks.3.attentions|input_blocks.[12].1.|output_blocks.(9|10|11).1.",
}

ALIKE = (
    {"sd1", "sd2"},
    {"flux", "flux2", "chroma", "hunyuan_image"},
    {"lumina2", "z_image"},
)
"""Families with layers of the same names, so that names cannot tell them apart."""


def family_of(file: Iterable[str] | Mapping[str, str]) -> str | None:
    """The family a LoRA file is for, such as "sdxl", from its metadata or its tensor names; None if unclear."""
    if isinstance(file, Mapping):
        named = " ".join(str(file.get(key, "")) for key in ("ss_base_model_version", "modelspec.architecture"))
        if named.strip():
            return _first_match(VERSIONS, [named.lower()])
    return _first_match(LAYERS, list(file))


def _first_match(patterns: Mapping[str, str], texts: list[str]) -> str | None:
    lines = "\n".join(texts)  # one search for each pattern; thousands of short ones take ten times as long
    return next((family for family, pattern in patterns.items() if re.search(pattern, lines, re.MULTILINE)), None)


def title(family: str) -> str:
    """How a family is called in a sentence; a model we have no name for keeps its own."""
    return TITLES.get(family, family.removeprefix("unknown:"))


def mismatch(lora: str | None, model: str) -> bool:
    """Whether a LoRA is surely of another family than the model; a family we do not know gets the benefit of doubt."""
    return lora in TITLES and model in TITLES and lora != model and not any({lora, model} <= group for group in ALIKE)
