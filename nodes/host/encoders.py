"""The wired VAE and CLIP as the Encoder of the cache."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from .identity import identity_of
from .new_tokens import NewTokens
from .progress import throw_if_cancelled
from .text_encoders import entries_of, literal_tokens


class GraphEncoder:
    """Pictures through the VAE into the model's own latent space, captions through the CLIP as at inference."""

    def __init__(self, model, clip, vae, new_tokens: NewTokens | None = None) -> None:
        """With `new_tokens` captions are encoded with these, as they begin, in place of trigger words."""
        self._model, self._clip, self._new_tokens = model, clip, new_tokens
        # On a shallow copy the fallback to tiles can be refused without touching the user's VAE.
        self._vae = copy.copy(vae)
        for name in ("encode_tiled", "encode_tiled_", "encode_tiled_1d", "encode_tiled_3d"):
            setattr(self._vae, name, _refuse_tiles)
        self.latents_key = f"{identity_of(vae.patcher)}-{type(model.model.latent_format).__name__}"
        self.text_key = f"{identity_of(clip.patcher)}-{clip.layer_idx}"
        if new_tokens is not None:
            self.text_key += f"-{new_tokens.key}"

    def latents(self, pixels: Tensor) -> Tensor:
        """(H, W, 3) float in 0..1 -> (C, H/8, W/8) float32 in model space: the mean of the posterior, scaled.

        Some VAEs divide sides by 16 or 32; those for videos give one frame, whose dimension is dropped.
        """
        throw_if_cancelled()
        with torch.inference_mode():
            encoded = self._vae.encode(pixels[None])
            latents = self._model.model.process_latent_in(encoded)[0].float().cpu()
            return latents.squeeze(1) if latents.ndim == 4 else latents

    def text(self, caption: str) -> dict[str, Tensor]:
        """The conditioning of a caption, word for word: brackets are letters here, not prompt weights."""
        throw_if_cancelled()
        with torch.inference_mode():
            encoded = self._clip.encode_from_tokens(self._tokens(caption), return_pooled=True, return_dict=True)
            return {name: value.cpu() for name, value in entries_of(encoded).items()}

    def _tokens(self, caption: str) -> dict:
        if self._new_tokens is None:
            return literal_tokens(self._clip, caption)
        return self._new_tokens.filled(caption, self._new_tokens.rows())

    def check(self, family_title: str, network_context: int | None, pooled: int | None) -> None:
        """ValueError when this VAE or this CLIP does not give what the model takes, before anything is encoded."""
        channels = self._model.model.latent_format.latent_channels
        if self._vae.latent_channels != channels:
            raise ValueError(
                f"The VAE gives pictures of {self._vae.latent_channels} channels, but this {family_title} model takes "
                f"{channels}: wire the VAE that belongs to the model."
            )
        found = self.text("")
        if network_context is not None and found["cross_attn"].shape[-1] != network_context:
            raise ValueError(
                f"The CLIP gives text {found['cross_attn'].shape[-1]} wide, but this {family_title} model takes "
                f"{network_context}: wire the CLIP that belongs to the model."
            )
        pooled_found = found["pooled_output"].shape[-1] if "pooled_output" in found else 0
        if pooled is not None and pooled_found != pooled:
            raise ValueError(
                f"The CLIP gives a pooled text {pooled_found} wide, but this {family_title} model takes {pooled}: "
                "wire the CLIP that belongs to the model."
            )


def _refuse_tiles(*_args, **_kwargs):
    raise MemoryError(
        "There was too little memory to encode a picture in one piece, and tiles would give other latents: "
        "free memory, or lower the resolution of the dataset."
    )
