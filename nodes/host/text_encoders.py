"""What the CLIP of an image model says about captions, and how it reads them word for word."""

from __future__ import annotations

from torch import Tensor, nn

from ...captioning.style import SENTENCES, style_of
from .conditions import UNBATCHED

CLIP_ENCODERS = ("clip_l", "clip_g")
"""Names of the text encoders that can be trained, in ComfyUI's words; they are those of embedding files too."""


def style_for(clip) -> str:
    """The caption style that suits the image model of a CLIP; sentences when there is none."""
    if clip is None:
        return SENTENCES
    return style_of({name for name, _ in clip.cond_stage_model.named_children()})


def encoders_of(clip) -> dict[str, nn.Module]:
    """Name -> text encoder, in the order of the CLIP; each holds its network as `transformer`."""
    named = clip.cond_stage_model.named_children()
    return {name: encoder for name, encoder in named if hasattr(encoder, "transformer")}


def literal_tokens(clip, text: str) -> dict:
    """The tokens of a text, word for word: brackets are letters here, not prompt weights."""
    try:
        return clip.tokenize(text, disable_weights=True)
    except TypeError as error:
        if "disable_weights" not in str(error):
            raise
    # Tokenizers of chat models disable weights themselves, and then refuse to be told. Escaped brackets are letters
    # to every tokenizer, whether it knows weights or not.
    unescaped = text.replace("\\(", "(").replace("\\)", ")")
    return clip.tokenize(unescaped.replace("(", "\\(").replace(")", "\\)"))


def entries_of(encoded: dict) -> dict[str, Tensor]:
    """What the network is told about one text, by name, without the dimension of the batch.

    Numbers are float32; masks and token numbers stay integers, since networks tell masks from numbers by that.
    """
    named = {"cross_attn": encoded["cond"], **{name: value for name, value in encoded.items() if name != "cond"}}
    tensors = {
        name: value if name in UNBATCHED else value[0] for name, value in named.items() if isinstance(value, Tensor)
    }
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
