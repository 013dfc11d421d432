"""Tiny text encoders of families beside SDXL and FLUX, out of ComfyUI's own classes, with random weights."""

from __future__ import annotations

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.sd3_clip
import folder_paths
import torch

from toyworld.node_pack.text import CLIP_CONFIG, T5_CONFIG

WIDE_T5 = {**T5_CONFIG, "d_model": 4096, "d_ff": 32, "d_kv": 16, "num_layers": 1}
"""SD 3 fills CLIP's text up to the width of the real T5, so that one must be as wide."""
SD3 = comfy.text_encoders.sd3_clip.SD3Tokenizer
KINDS = {
    "sd1": (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
    "sd3": (SD3, comfy.text_encoders.sd3_clip.sd3_clip()),
    "sd3 without t5": (SD3, comfy.text_encoders.sd3_clip.sd3_clip(t5=False)),
    "refiner": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLRefinerClipModel),
}


def clip(kind: str) -> comfy.sd.CLIP:
    """A CLIP of 64 wide encoders; its T5 knows the first two thousand words alone."""
    target = comfy.supported_models_base.ClipTarget(*KINDS[kind])
    options = {
        "dtype": torch.float32,
        "clip_l_model_config": CLIP_CONFIG,
        "clip_g_model_config": CLIP_CONFIG,
        "t5xxl_model_config": WIDE_T5,
    }
    with torch.inference_mode():
        made = comfy.sd.CLIP(
            target, embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options=options
        )
        random = torch.Generator().manual_seed(0)
        for name, weight in made.cond_stage_model.named_parameters():
            known = weight[:2000] if "shared" in name else weight  # all of it would take half a gigabyte
            with torch.no_grad():
                drawn = torch.randn(known.shape, generator=random)
                known.copy_(drawn * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 1 + 0.1 * drawn)
    return made
