"""How an answer of the network is judged.

The order is that of sd-scripts (`train_network.py`): the error of every element in float32, counted by the mask, then
its mean over the picture, times the weight of the picture, times what its noise level counts. With d the difference,
c the threshold, sigma the noise level as a ratio of noise to picture, and SNR = 1 / sigma^2:

    l2           d^2
    huber        2 c (sqrt(d^2 + c^2) - c)
    smooth l1    2 (sqrt(d^2 + c^2) - c)                             (`conditional_loss`)
    threshold    snr: (1 - c) / (1 + sigma)^2 + c; exponential: c^p, p from clean (0) to noise (1); constant: c
    min-SNR      eps: min(SNR, gamma) / SNR; v: min(SNR, gamma) / (SNR + 1)       (Hang et al. 2023, 3.4)
    debiased     eps: 1 / sqrt(SNR); v: 1 / (SNR + 1), SNR at most 1000           (Yu et al. 2023)

The levels come from the model's own table, so SNR is right for models with zero terminal SNR as well. A flow model
mixes (1 - sigma) of the picture with sigma of noise: there the ratio is sigma / (1 - sigma), which makes the snr
threshold (1 - c) (1 - sigma)^2 + c. Weights by SNR were derived for eps and v and are refused for flow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import HUBER, L2, ObjectiveConfig
from .noise import FLOW, V, per_sample

HIGHEST_DEBIASED_SNR = 1000.0


def check(config: ObjectiveConfig, prediction: str) -> None:
    """ValueError naming the setting when the prediction type has no such loss."""
    if prediction != FLOW:
        return
    for name, chosen in (("min_snr_gamma", config.min_snr_gamma > 0), ("debiased", config.debiased)):
        if chosen:
            raise ValueError(
                f"{name} weighs noise levels of eps and v models, and this is a flow model, where all levels count "
                f"alike: turn {name} off, or choose which levels are trained with timesteps."
            )


def element_errors(config: ObjectiveConfig, predicted: Tensor, wanted: Tensor, threshold: Tensor | None) -> Tensor:
    """The error of every element (B, C, h, w), in float32; from `threshold` (B,) on huber is a line, below a square."""
    difference = predicted.float() - wanted.float()
    if config.loss == L2:
        return difference.square()
    c, square = per_sample(threshold.float(), difference), difference.square()
    # sqrt(d^2 + c^2) - c, without the small difference of two large numbers.
    root = 2 * square / ((square + c.square()).sqrt() + c)
    return c * root if config.loss == HUBER else root


def huber_threshold(config: ObjectiveConfig, sigma: Tensor, table: Tensor | None) -> Tensor | None:
    """The huber threshold of each noise level (B,), None for l2; `table` as in `training_sigmas`."""
    if config.loss == L2:
        return None
    c = config.huber_c
    if config.huber_schedule == "constant":
        return torch.full_like(sigma, c)
    if config.huber_schedule == "exponential":
        return c ** (sigma if table is None else _place(sigma, table))
    clean = 1 - sigma if table is None else 1 / (1 + sigma)
    return (1 - c) * clean.square() + c


def _place(sigma: Tensor, table: Tensor) -> Tensor:
    return torch.searchsorted(table.to(sigma), sigma).to(sigma) / len(table)


def mean_errors(errors: Tensor, masks: Tensor | None = None, floor: float = 0.0) -> Tensor:
    """The mean error of each picture (B,); with masks (B, 1, h, w) the mean over what they leave.

    So a small masked part teaches as strongly as a whole picture. What a mask leaves out counts `floor`, and so does
    all of a picture whose mask leaves nothing.
    """
    if masks is None:
        return errors.flatten(1).mean(1)
    counted = masks.to(errors).clamp(min=floor).expand_as(errors)
    averaged = (errors * counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1e-6)
    return torch.where(masks.to(errors).flatten(1).amax(1) > 0, averaged, floor * averaged)


def outside(masks: Tensor) -> Tensor:
    """How far each place of masks (B, 1, h, w) is left out, 0 to 1, beside the brightest place of the same mask.

    In `mean_errors` a faint mask is a white one, and so it is here; one that is black all over leaves out everything.
    """
    brightest = masks.flatten(1).amax(1).clamp(min=1e-6).view(-1, 1, 1, 1)
    return 1 - masks / brightest


def level_weights(config: ObjectiveConfig, prediction: str, sigma: Tensor) -> Tensor:
    """What each noise level (B,) counts."""
    weights, snr = torch.ones_like(sigma), sigma.double() ** -2
    offset = 1.0 if prediction == V else 0.0
    if config.min_snr_gamma > 0:
        weights = weights * (snr.clamp(max=config.min_snr_gamma) / (snr + offset)).to(sigma)
    if config.debiased:
        bounded = snr.clamp(max=HIGHEST_DEBIASED_SNR)
        weights = weights * (1 / (bounded + 1) if prediction == V else bounded.rsqrt()).to(sigma)
    return weights
