"""Pictures through a CLIP_VISION model, and prompts through the CLIP where the two share a space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .progress import throw_if_cancelled
from .text_encoders import encoders_of, literal_tokens

CLIP_KIND = "clip_vision_model"
"""ComfyUI's name for the kind of image encoder that was trained together with a text encoder of the CLIP family."""


def embeddings(clip_vision, pictures: Iterable[Tensor]) -> Tensor:
    """Pictures (H, W, 3) in 0..1, each of its own size -> (N, D) float32 rows of length 1, one picture at a time.

    So an embedding does not depend on what else is asked for. Encoders that give no single vector for a picture, as
    SigLIP without its head, give the mean over its patches. ValueError when there is no picture.
    """
    rows = []
    with torch.inference_mode():
        for picture in pictures:
            throw_if_cancelled()
            encoded = clip_vision.encode_image(picture[None, ..., :3])["image_embeds"].float().cpu()
            rows.append(encoded.flatten(1, -2).mean(1)[0] if encoded.ndim > 2 else encoded[0])
    if not rows:
        raise ValueError("There is no picture to compare: wire a dataset, or give at least one prompt.")
    return _unit(torch.stack(rows))


def text_embeddings(clip, clip_vision, texts: Sequence[str]) -> tuple[Tensor | None, str]:
    """The texts as (N, D) float32 rows of length 1 in the space of the image encoder, and "".

    None and the reason in a sentence where the CLIP has no text encoder that shares a space with it. Sharing a width is
    all that can be seen, so the caller tests on the dataset whether they really do. Of long texts the first 75 tokens
    count.
    """
    if clip_vision.model_type != CLIP_KIND:
        return None, "The connected CLIP_VISION knows no words, so how well pictures follow prompts is not judged."
    projection = getattr(clip_vision.model.visual_projection, "weight", None)
    if projection is None:
        return None, "The connected CLIP_VISION has no projection, so how well pictures follow prompts is not judged."
    width = len(projection)
    clip.load_model()
    for name, encoder in encoders_of(clip).items():
        if _projects_to(encoder, width):
            return _unit(torch.stack([_encoded(clip, name, encoder, text) for text in texts])), ""
    return None, (
        f"No text encoder of the CLIP belongs to this CLIP_VISION ({width} wide), so how well pictures follow prompts "
        "is not judged."
    )


def _projects_to(encoder, width: int) -> bool:
    """Whether a text encoder projects to this width; files that lack the projection are given the identity."""
    weight = getattr(getattr(encoder.transformer, "text_projection", None), "weight", None)
    if weight is None or len(weight) != width:
        return False
    return not torch.equal(weight.float().cpu(), torch.eye(*weight.shape))


def _encoded(clip, name: str, encoder, text: str) -> Tensor:
    throw_if_cancelled()
    tokens = literal_tokens(clip, text)[name.removeprefix("clip_")]
    encoder.reset_clip_options()
    try:
        encoder.set_clip_options({"projected_pooled": True, "execution_device": clip.patcher.load_device})
        with torch.inference_mode():
            return encoder.encode_token_weights(tokens)[1][0].float().cpu()
    finally:
        encoder.reset_clip_options()


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)
