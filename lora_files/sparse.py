"""Sums of changes of which a part is left out, so that they spoil each other less: TIES and DARE."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(changes: Sequence[Tensor], density: float) -> Tensor:
    """Trim, elect sign and disjoint merge, layer by layer (Yadav et al. 2023, section 3), lambda = 1.

    Of each change the `density` largest entries stay; the sign of their sum is elected; what bears it is averaged
    over those that bear it.
    """
    trimmed = [trim(change, density) for change in changes]
    elected = sum(trimmed[1:], trimmed[0]).sign()
    total, bearers = torch.zeros_like(elected), torch.zeros_like(elected)
    for change in trimmed:
        agrees = (change.sign() == elected) & (elected != 0)
        total += change * agrees
        bearers += agrees
    return total / bearers.clamp(min=1)


def trim(change: Tensor, density: float) -> Tensor:
    """The largest `density` of the entries by magnitude; zero for the others."""
    sizes = change.abs().flatten()
    left = max(1, round(density * sizes.numel()))
    return change * (change.abs() >= sizes.kthvalue(sizes.numel() - left + 1).values)


def dare(change: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Each entry is dropped with probability 1 - density and divided by density else (Yu et al. 2024, equation 3)."""
    stays = torch.rand(change.shape, generator=random) < density
    return change * stays / density
