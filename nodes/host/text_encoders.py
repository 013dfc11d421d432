"""What the CLIP of an image model says about the captions that the model was trained on."""

from __future__ import annotations

from ...captioning.style import SENTENCES, style_of


def style_for(clip) -> str:
    """The caption style that suits the image model of a CLIP; sentences when there is none."""
    if clip is None:
        return SENTENCES
    return style_of({name for name, _ in clip.cond_stage_model.named_children()})
