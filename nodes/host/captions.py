"""A wired CLIP that can look at pictures and write, as the `generate` of a captioner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image

from ...captioning.asking import LONGEST_CAPTION_TOKENS, shrunk
from ..pictures import to_image

SUGGESTED = "Qwen3-VL, Qwen3.5 or Gemma 3 or 4"


def generator_of(clip) -> Callable[[Image.Image, str], str]:
    """(picture, instruction) -> answer; ValueError saying why when this CLIP cannot look at pictures and write."""
    if failing := why_not(clip):
        raise ValueError(
            f"The connected CLIP ({type(clip.cond_stage_model).__name__}) {failing}: load a vision-language model such "
            f"as {SUGGESTED} with Load CLIP, or choose 'trigger word only'."
        )

    def generate(picture: Image.Image, instruction: str) -> str:
        with torch.inference_mode():
            # Without sampling the same picture always gets the same caption.
            written = clip.generate(
                _tokens(clip, instruction, shrunk(picture)),
                do_sample=False,
                max_length=LONGEST_CAPTION_TOKENS,
            )
            return clip.decode(written)

    return generate


def why_not(clip) -> str:
    """What keeps this CLIP from describing pictures, to go on from its name; "" when nothing does.

    Most text encoders of image models are language models, but ComfyUI lets few of them write.
    """
    if not hasattr(clip, "generate"):
        return "cannot write in this version of ComfyUI, which is too old"
    encoder = clip.cond_stage_model
    network = _network(encoder)
    has_eyes = any(hasattr(network, part) for part in ("visual", "vision_model"))
    if not hasattr(network, "generate"):
        if any(hasattr(getattr(part, "transformer", None), "generate") for part in encoder.children()):
            return "keeps its language model inside the text encoder of another model, where it cannot be asked"
        return "only encodes text and cannot describe pictures"
    config = network.model.config
    if not hasattr(config, "stop_tokens"):
        return (
            f"{'looks at pictures' if has_eyes else 'encodes text'} for an image model, but ComfyUI cannot let it write"
        )
    if not getattr(config, "final_norm", True):
        return "has lost the layers that write, because its image model does without them"
    if not has_eyes or not _places_pictures(clip):
        return "writes text but cannot look at pictures"
    return ""


def _network(encoder) -> torch.nn.Module | None:
    """The language model of a text encoder, which has it directly or under the name it gives; None for several."""
    inner = getattr(encoder, getattr(encoder, "clip", None) or "", encoder)
    return getattr(inner, "transformer", None)


def _places_pictures(clip) -> bool:
    """Whether its tokenizer places a picture among the tokens of a text."""
    tokens = _tokens(clip, "x", Image.new("RGB", (64, 64)))
    batches = tokens.values() if isinstance(tokens, dict) else [tokens]
    return any(isinstance(token[0], dict) for batch in batches for row in batch for token in row)


def _tokens(clip, text: str, picture: Image.Image):
    """The text and the picture in the model's own chat template, as ComfyUI's Generate Text node passes them."""
    return clip.tokenize(text, image=to_image(picture), skip_template=False, min_length=1, thinking=False)
