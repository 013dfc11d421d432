"""The loss on held-out pictures at fixed noise and fixed noise levels: the same question to every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .batches import Batch
from .loop import Denoiser
from .noise import loss_per_sample, mix, noise_like, target, validation_sigmas

NOISE_SEED = 0
"""Not the user's seed: two runs with different seeds answer the same question."""


def validation_loss(denoiser: Denoiser, pictures: Iterable[Batch]) -> list[list[float]]:
    """Loss per picture and noise level, from batches of one picture each.

    All levels of a picture go through the network together, with the same noise; nothing is kept for backward.
    """
    return [_levels(denoiser, batch, number) for number, batch in enumerate(pictures)]


def _levels(denoiser: Denoiser, batch: Batch, number: int) -> list[float]:
    sigma = validation_sigmas(denoiser.sigmas, batch.size).to(denoiser.device)
    shape = (len(sigma), *batch.latents.shape[1:])
    noise = noise_like(batch.latents, NOISE_SEED, "validation", number).to(denoiser.device).expand(shape)
    latents = batch.latents.to(denoiser.device).expand(shape)
    with denoiser.adapted(), torch.no_grad():
        predicted = denoiser(
            mix(denoiser.prediction, latents, noise, sigma), sigma, batch.text * len(sigma), batch.size
        )
    masks = None if batch.masks is None else batch.masks.to(denoiser.device).expand(len(sigma), -1, -1, -1)
    return loss_per_sample(predicted, target(denoiser.prediction, latents, noise, sigma), masks).tolist()
