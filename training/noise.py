"""Noise, noisy latents and targets: what the network is asked to undo.

`sigma` is a noise level as the k-diffusion family of samplers uses it. The three predictions are

    eps    x = x0 + sigma n              the network answers n
    v      x = x0 + sigma n              the network answers alpha n - sqrt(1 - alpha^2) x0, alpha = 1/sqrt(1 + sigma^2)
    flow   x = (1 - sigma) x0 + sigma n  the network answers n - x0

(Ho et al. 2020, eq. 14; Salimans & Ho 2022, app. D; Lipman et al. 2022, eq. 23.) The noise n of training can be given
more of what is coarse, and the network something else than it is judged by; all as sd-scripts does, in this order:

    noise offset         n + a m, m one normal number for each picture and channel     (`apply_noise_offset`)
    multires noise       (n + sum of discount^i n_i) / std, n_i noise at sizes that shrink by r^i, r in [2, 4), brought
                         back to full size                                             (`pyramid_noise_like`)
    input perturbation   x is made with n + g n', the target with n                    (Ning et al. 2023; ip_noise)

Everything random is a function of (seed, purpose, number), so a resumed run needs no random state and no other code
can disturb it.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

EPS, V, FLOW = "eps", "v", "flow"


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A random generator that depends on nothing but its three arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def noise_like(latents: Tensor, seed: int, purpose: str, number: int) -> Tensor:
    """Standard normal noise of the latents' shape (B, C, h, w), float32 on the CPU."""
    return torch.randn(latents.shape, generator=generator(seed, purpose, number), dtype=torch.float32)


def with_offset(noise: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """The noise (B, C, h, w), every picture and channel of it a little lighter or darker as a whole."""
    return noise + strength * torch.randn(*noise.shape[:2], 1, 1, generator=rng)


def multires(noise: Tensor, iterations: int, discount: float, rng: torch.Generator) -> Tensor:
    """The noise (B, C, h, w) with coarser noise added, brought back to a standard deviation of 1 over the batch.

    It shrinks from one iteration to the next, by another factor each time, and is done when a side is 1.
    """
    height, width = full = noise.shape[-2:]
    total = noise
    for iteration in range(iterations):
        factor = (2 + 2 * torch.rand((), generator=rng, dtype=torch.float64).item()) ** iteration
        height, width = max(1, int(height / factor)), max(1, int(width / factor))
        coarse = torch.randn(*noise.shape[:2], height, width, generator=rng)
        total = total + discount**iteration * F.interpolate(coarse, size=full, mode="bilinear", align_corners=False)
        if 1 in (height, width):
            break
    return total / total.std()


def mix(prediction: str, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy latents (B, C, h, w) at noise levels `sigma` (B,)."""
    level = per_sample(sigma, latents)
    if prediction == FLOW:
        return (1 - level) * latents + level * noise
    return latents + level * noise


def target(prediction: str, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the network should answer (B, C, h, w); ValueError for a prediction type nobody here knows."""
    if prediction == EPS:
        return noise
    if prediction == FLOW:
        return noise - latents
    if prediction == V:
        level = per_sample(sigma, latents)
        return (noise - level * latents) / (level**2 + 1).sqrt()
    raise ValueError(f"Prediction type '{prediction}' cannot be trained: it must be eps, v or flow.")


def per_sample(sigma: Tensor, latents: Tensor) -> Tensor:
    """One number for each picture (B,), to be multiplied with latents (B, C, h, w)."""
    return sigma.view(-1, *[1] * (latents.ndim - 1))
