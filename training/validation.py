"""The loss on held-out pictures at fixed noise and fixed noise levels: the same question to every checkpoint.

Nothing of how a training asks or judges enters, except what counts outside a mask: no distribution of noise levels, no
offset or perturbation of the noise, no huber, no weights. So runs with different settings can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .batches import Batch
from .config import ObjectiveConfig
from .loop import Denoiser
from .losses import element_errors, mean_errors
from .noise import mix, noise_like, target
from .timesteps import VALIDATION_PLACES, validation_sigmas

NOISE_SEED = 0
"""Not the user's seed: two runs with different seeds answer the same question."""
PLAIN = ObjectiveConfig()


def validation_loss(
    denoiser: Denoiser,
    pictures: Iterable[Batch],
    mask_floor: float = PLAIN.mask_floor,
    levels: Sequence[float] = VALIDATION_PLACES,
) -> list[list[float]]:
    """Loss per picture and noise level, from batches of one picture each; `levels` as in `validation_sigmas`.

    All levels of a picture go through the network together, with the same noise; nothing is kept for backward. What a
    mask leaves out counts `mask_floor`.
    """
    return [_losses(denoiser, batch, number, mask_floor, levels) for number, batch in enumerate(pictures)]


def _losses(denoiser: Denoiser, batch: Batch, number: int, mask_floor: float, levels: Sequence[float]) -> list[float]:
    sigma = validation_sigmas(denoiser.sigmas, batch.size, levels).to(denoiser.device)
    repeated = batch.at([0] * len(sigma))
    noise = noise_like(batch.latents, NOISE_SEED, "validation", number).to(denoiser.device).expand_as(repeated.latents)
    latents = repeated.latents.to(denoiser.device)
    noisy = mix(denoiser.prediction, latents, noise, sigma)
    with denoiser.adapted(), torch.no_grad():
        predicted = denoiser(noisy, sigma, denoiser.text_of(batch) * len(sigma), batch.size)
    errors = element_errors(PLAIN, predicted, target(denoiser.prediction, latents, noise, sigma), None)
    masks = None if repeated.masks is None else repeated.masks.to(errors.device)
    return mean_errors(errors, masks, mask_floor).tolist()
