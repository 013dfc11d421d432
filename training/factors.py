"""Changes of weights as products of two small matrices, and the nearest such product of any change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import generator

ZERO = 1e-6
"""Singular values below this share of the largest are rounding, and no part of a change."""
EXTRA_COLUMNS, ROUNDS, SMALL = 16, 4, 512


@dataclass(frozen=True)
class Factors:
    """A change of a weight as a product: up (out, n) times down (n, in h w)."""

    up: Tensor
    down: Tensor

    def placed(self, shape: tuple[int, int], side: int, start: int) -> Factors:
        """The same as part of a larger change of zeros: from row (side 0) or column (side 1) `start` on."""
        up, down = self.up, self.down
        if side == 0:
            up = F.pad(up, (0, 0, start, shape[0] - start - len(up)))
        else:
            down = F.pad(down, (start, shape[1] - start - down.shape[1]))
        return Factors(up, down)

    def plus(self, other: Factors) -> Factors:
        """The sum of two changes, its rank the sum of theirs."""
        return Factors(torch.cat([self.up, other.up], 1), torch.cat([self.down, other.down], 0))

    def squared_norm(self) -> float:
        """The squared Frobenius norm, |B A|^2 = tr((B^T B)(A A^T)), without forming the product."""
        up, down = self.up.double(), self.down.double()
        return max(((up.t() @ up) * (down @ down.t())).sum().item(), 0.0)

    def reduced(self, rank: int) -> tuple[Factors, float, float]:
        """The nearest change of at most `rank`, and the squared Frobenius norms of it and of this one."""
        left, right = torch.linalg.qr(self.up.double()), torch.linalg.qr(self.down.double().t())
        u, sizes, v = torch.linalg.svd(left.R @ right.R.t())
        whole = sizes.square().sum().item()
        kept = min(rank, int((sizes > ZERO * sizes.max()).sum()))
        roots = sizes[:kept].sqrt()
        up, down = (left.Q @ u[:, :kept]) * roots, roots[:, None] * (v[:kept] @ right.Q.t())
        return Factors(up.float(), down.float()), sizes[:kept].square().sum().item(), whole


def factors_of(change: Tensor, rank: int) -> tuple[Factors, float]:
    """A change (out, in h w) in factors of at most `rank`, and the squared norm of all of it.

    Large ones by subspace iteration (Halko et al. 2011), exact where the change has no more than that rank.
    """
    whole = change.double().square().sum().item()
    if min(change.shape) <= SMALL:
        u, sizes, v = torch.linalg.svd(change.double(), full_matrices=False)
        roots = sizes[:rank].sqrt()
        return Factors((u[:, :rank] * roots).float(), (roots[:, None] * v[:rank]).float()), whole
    columns = min(rank + EXTRA_COLUMNS, *change.shape)
    draw = torch.randn(change.shape[1], columns, generator=generator(0, "warm start", 0)).to(change)
    basis = torch.linalg.qr(change @ draw).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.t() @ basis).Q).Q
    factors, _, _ = Factors(basis, basis.t() @ change).reduced(rank)
    return factors, whole
