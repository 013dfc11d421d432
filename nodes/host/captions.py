"""A wired CLIP that can look at pictures and write, as the `generate` of a captioner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from ..pictures import to_image

LONGEST_CAPTION_TOKENS = 256


def generator_of(clip) -> Callable[[Image.Image, str], str]:
    """(picture, instruction) -> answer; ValueError saying why when this CLIP cannot look at pictures."""
    if not hasattr(clip, "generate") or not hasattr(clip.cond_stage_model, "generate"):
        raise ValueError(
            f"The connected CLIP ({type(clip.cond_stage_model).__name__}) only encodes text and cannot describe pictures: "
            "load a vision-language model such as Qwen3-VL with Load CLIP, or choose 'trigger word only'."
        )
    if not _sees(clip):
        raise ValueError(
            f"The connected CLIP ({type(clip.cond_stage_model).__name__}) writes text but cannot look at pictures: load a "
            "vision-language model such as Qwen3-VL with Load CLIP, or choose 'trigger word only'."
        )

    def generate(picture: Image.Image, instruction: str) -> str:
        with torch.inference_mode():
            tokens = clip.tokenize(instruction, image=to_image(picture), min_length=1, skip_template=False)
            # Without sampling the same picture always gets the same caption.
            written = clip.generate(tokens, do_sample=False, max_length=LONGEST_CAPTION_TOKENS)
            return clip.decode(written)

    return generate


def _sees(clip) -> bool:
    """Whether its tokenizer places a picture among the tokens of a text."""
    tokens = clip.tokenize("x", image=torch.zeros(1, 64, 64, 3))
    batches = tokens.values() if isinstance(tokens, dict) else [tokens]
    return any(isinstance(token[0], dict) for batch in batches for row in batch for token in row)
