"""Which noise levels training asks about.

A noise level is a place p on the model's schedule, from clean (0) to noise (1): the level itself for flow models, and
an entry of the model's table for eps and v. Each distribution of p is known by its quantiles, u being uniform:

    uniform           p = u
    logit-normal      p = sigmoid(mean + std N(u)), N the quantiles of the normal distribution (Esser et al. 2024, 3.1)
    shift             p = s q / (1 + (s - 1) q), q logit-normal (0, 1) (Esser et al. 2024, eq. 23; sd-scripts "shift")
    resolution shift  the same with s = e^mu, mu growing with the picture (`resolution_shift`; sd-scripts "flux_shift")
    content, style    p = 1 - (1 - u)^3 towards noise, p = u^3 towards the picture (T2I-Adapter, Mou et al. 2023, 3.4)
    automatic         resolution shift for flow, uniform for eps and v: what the models were trained with

Of a range low..high the same density is drawn from, cut off outside of it. Stratified draws take their u from the
equal slices of [0, 1] in turn, so that a window of them always covers the distribution evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .config import AUTOMATIC, CONTENT, LOGIT_NORMAL, RESOLUTION_SHIFT, SHIFT, STYLE, UNIFORM, ObjectiveConfig
from .noise import generator

VALIDATION_PLACES = (0.15, 0.38, 0.62, 0.85)
"""How far along the schedule the fixed levels of validation lie, from clean (0) to noise (1)."""


@dataclass(frozen=True)
class Distribution:
    """Of places on the schedule: `place` gives the quantiles, `share` is its inverse, the share that lies below."""

    place: Callable[[Tensor], Tensor]
    share: Callable[[Tensor], Tensor]


def training_sigmas(
    config: ObjectiveConfig, table: Tensor | None, count: int, size: tuple[int, int], seed: int, number: int
) -> Tensor:
    """The noise levels (count,) of micro-batch `number`, of pictures of `size` = (width, height) in pixels.

    `table` holds the levels of an eps or v model, lowest first; a flow model has none.
    """
    distribution = distribution_of(config, size, flow=table is None)
    ends = torch.tensor([config.timestep_low, config.timestep_high], dtype=torch.float64)
    low, high = distribution.share(ends)
    shares = low + (high - low) * even_shares(count, seed, number, config.stratify)
    places = distribution.place(shares).clamp(*ends.tolist())
    if table is None:
        return places.float()
    return table[(places * len(table)).long().clamp(max=len(table) - 1)].float()


def validation_sigmas(
    table: Tensor | None, size: tuple[int, int], levels: Sequence[float] = VALIDATION_PLACES
) -> Tensor:
    """The fixed noise levels at which checkpoints are compared, four of them unless other places are given."""
    places = torch.tensor(levels)
    if table is None:
        return with_odds(places, resolution_shift(size))
    return table[(places * (len(table) - 1)).round().long()].float()


def even_shares(count: int, seed: int, number: int, window: int) -> Tensor:
    """Shares (count,) between 0 and 1, each uniform; `window` of them in a row lie in as many slices, one in each.

    Draws are counted over batches of one size, so a batch that is shorter takes its slices out of turn.
    """
    shares = torch.rand(count, generator=generator(seed, "sigma", number), dtype=torch.float64)
    if window == 0:
        return shares
    draws = range(number * count, (number + 1) * count)
    slices = [_order(seed, draw // window, window)[draw % window] for draw in draws]
    return (torch.tensor(slices, dtype=torch.float64) + shares) / window


@lru_cache(maxsize=8)
def _order(seed: int, number: int, window: int) -> list[int]:
    """In which order the slices of a window come."""
    return torch.randperm(window, generator=generator(seed, "order of noise levels", number)).tolist()


def distribution_of(config: ObjectiveConfig, size: tuple[int, int], *, flow: bool) -> Distribution:
    """The distribution that is chosen, for pictures of this size."""
    chosen = config.timesteps
    if chosen == AUTOMATIC:
        chosen = RESOLUTION_SHIFT if flow else UNIFORM
    return {
        UNIFORM: lambda: Distribution(lambda u: u, lambda p: p),
        LOGIT_NORMAL: lambda: logit_normal(config.timestep_mean, config.timestep_std),
        SHIFT: lambda: moved(logit_normal(), config.timestep_shift),
        RESOLUTION_SHIFT: lambda: moved(logit_normal(), resolution_shift(size)),
        CONTENT: lambda: Distribution(lambda u: 1 - (1 - u) ** 3, lambda p: 1 - (1 - p) ** (1 / 3)),
        STYLE: lambda: Distribution(lambda u: u**3, lambda p: p ** (1 / 3)),
    }[chosen]()


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Distribution:
    """The sigmoid of a normal distribution."""
    return Distribution(
        lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u)),
        lambda p: torch.special.ndtr((torch.logit(p) - mean) / std),
    )


def moved(distribution: Distribution, shift: float) -> Distribution:
    """The distribution moved towards noise: the odds of every place are multiplied by `shift`."""
    return Distribution(
        lambda u: with_odds(distribution.place(u), shift),
        # Rounding may put the last place a trifle above 1, where there is no share.
        lambda p: distribution.share(with_odds(p, 1 / shift).clamp(max=1)),
    )


def with_odds(place: Tensor, factor: float) -> Tensor:
    """s p / (1 + (s - 1) p): the place whose odds p / (1 - p) are s times as high."""
    return factor * place / (1 + (factor - 1) * place)


def resolution_shift(size: tuple[int, int]) -> float:
    """e^mu, mu on the line through (256 tokens, 0.5) and (4096 tokens, 1.15), one token per 16 x 16 pixels.

    (Black Forest Labs' FLUX.1 sampling code, `get_lin_function` and `time_shift`.)
    """
    width, height = size
    tokens = (width // 16) * (height // 16)
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
