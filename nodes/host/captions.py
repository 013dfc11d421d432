"""A wired CLIP that can look at pictures and write, as the `generate` of a captioner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from ..pictures import to_image

LONGEST_CAPTION_TOKENS = 300
LONGEST_SIDE = 1024
"""What a model reads grows with the area of the picture, and captions do not get better beyond this."""


def generator_of(clip) -> Callable[[Image.Image, str], str]:
    """(picture, instruction) -> answer; ValueError saying why when this CLIP cannot look at pictures and write."""
    if not _writes(clip):
        raise ValueError(_refusal(clip, "only encodes text and cannot describe pictures"))
    if not _sees(clip):
        raise ValueError(_refusal(clip, "writes text but cannot look at pictures"))

    def generate(picture: Image.Image, instruction: str) -> str:
        with torch.inference_mode():
            # Without sampling the same picture always gets the same caption.
            written = clip.generate(
                _tokens(clip, instruction, _shrunk(picture)), do_sample=False, max_length=LONGEST_CAPTION_TOKENS
            )
            return clip.decode(written)

    return generate


def _refusal(clip, failing: str) -> str:
    return (
        f"The connected CLIP ({type(clip.cond_stage_model).__name__}) {failing}: load a vision-language model such as "
        "Qwen3-VL with Load CLIP, or choose 'trigger word only'."
    )


def _writes(clip) -> bool:
    """Whether its network generates text and knows where a text ends."""
    encoder = clip.cond_stage_model
    network = getattr(getattr(encoder, getattr(encoder, "clip", None) or "", None), "transformer", None)
    config = getattr(getattr(network, "model", None), "config", None)
    return hasattr(clip, "generate") and hasattr(network, "generate") and hasattr(config, "stop_tokens")


def _sees(clip) -> bool:
    """Whether its tokenizer places a picture among the tokens of a text."""
    tokens = _tokens(clip, "x", Image.new("RGB", (64, 64)))
    batches = tokens.values() if isinstance(tokens, dict) else [tokens]
    return any(isinstance(token[0], dict) for batch in batches for row in batch for token in row)


def _tokens(clip, text: str, picture: Image.Image):
    """The text and the picture in the model's own chat template, as ComfyUI's Generate Text node passes them."""
    return clip.tokenize(text, image=to_image(picture), skip_template=False, min_length=1, thinking=False)


def _shrunk(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture
