"""A change of a weight by the sizes of its parts, largest first, and how many of them to keep (Eckart & Young 1936).

LoRA, LoHa and LoKr are taken apart in their own factors, exactly and without the dense change:

    lora   B A = (Q1 R1)(Q2 R2)^T, and R1 R2^T is as small as the rank
    loha   (B1 A1) * (B2 A2) is a product over all pairs of their columns and rows
    lokr   the parts of C (x) D are those of C times those of D
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.config import LOHA, LOKR, LORA
from ..training.factors import ZERO, Factors, factors_of
from .layers import Layer

MOST_PAIRS = 512
"""Pairs of columns of a LoHa up to which its factors are smaller than the dense change of usual layers."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values (float64, descending) of a change, its squared norm, and its largest parts as factors.

    Column i of up and row i of down both have the norm sqrt(sizes[i]).
    """

    sizes: Tensor
    whole: float
    first: Callable[[int], Factors]

    def kept(self, count: int) -> float:
        """The squared norm of the `count` largest parts."""
        return self.sizes[:count].square().sum().item()

    def count_for(self, rank: int = 0, energy: float = 1.0, ratio: float = 0.0) -> int:
        """How many parts to keep: the fewest whose squares make up the share `energy` of the whole.

        None is smaller than the share `ratio` of the largest, and there are at most `rank` (0: all). At least one,
        unless the change is nothing.
        """
        count = len(self.sizes)
        if energy < 1.0:
            count = int((self.sizes.square().cumsum(0) < energy * self.whole).sum()) + 1
        if ratio:
            count = min(count, int((self.sizes >= ratio * self.sizes[:1]).sum()))
        return min(count, rank or count, len(self.sizes))


def of_factors(factors: Factors) -> Spectrum:
    """The parts of a product of two matrices."""
    reduced, _, whole = factors.reduced(factors.up.shape[1])
    return _ordered(reduced, whole)


def of_change(change: Tensor, rank: int = 0) -> Spectrum:
    """The largest parts of a dense change (out, in h w), at most `rank` of them (0: all)."""
    return _ordered(*factors_of(change, rank or min(change.shape)))


def of_layer(layer: Layer, rank: int = 0) -> Spectrum | None:
    """The largest parts of what a layer of a file changes, `rank` of them or more (0: all).

    None for kinds without a change of their own, for whole differences, and for matrices with nothing in them.
    """
    if not all(part.numel() for part in layer.parts.values()):
        return None
    if layer.kind == LORA:
        return of_factors(layer.factors())
    if layer.kind == LOHA:
        factors = _pairs(layer)
        return of_factors(factors) if factors else of_change(layer.change(), rank)
    if layer.kind == LOKR:
        return _of_kronecker(*layer.kronecker_factors(), layer.scale)
    return None


def _ordered(factors: Factors, whole: float) -> Spectrum:
    sizes = factors.up.double().square().sum(0)
    sizes = sizes[sizes > ZERO * sizes[:1]]
    return Spectrum(sizes, whole, lambda count: Factors(factors.up[:, :count], factors.down[:count]))


def _pairs(layer: Layer) -> Factors | None:
    """A LoHa as one product; None with core tensors, and where the pairs are too many."""
    parts = layer.parts
    if "hada_t1" in parts or parts["hada_w1_b"].shape[0] * parts["hada_w2_b"].shape[0] > MOST_PAIRS:
        return None
    up = torch.einsum("or,os->ors", parts["hada_w1_a"].float(), parts["hada_w2_a"].float()).flatten(1)
    down = torch.einsum("ri,si->rsi", parts["hada_w1_b"].float(), parts["hada_w2_b"].float()).flatten(0, 1)
    return Factors(layer.scale * up, down)


def _of_kronecker(first: Tensor, second: Tensor, scale: float) -> Spectrum:
    left, right = (torch.linalg.svd(factor.flatten(1).double(), full_matrices=False) for factor in (first, second))
    table = abs(scale) * torch.outer(left.S, right.S)
    sizes, order = table.flatten().sort(descending=True)
    sizes = sizes[sizes > ZERO * sizes[:1]]

    def largest(count: int) -> Factors:
        i, j = order[:count] // table.shape[1], order[:count] % table.shape[1]
        roots = sizes[:count].sqrt() * (1.0 if scale >= 0 else -1.0)
        up = torch.einsum("an,bn->abn", left.U[:, i], right.U[:, j]).flatten(0, 1) * roots
        down = torch.einsum("na,nb->nab", left.Vh[i], right.Vh[j]).flatten(1) * sizes[:count].sqrt()[:, None]
        return Factors(up.float(), down.float())

    return Spectrum(sizes, table.square().sum().item(), largest)


def share(kept: float, whole: float) -> float:
    """How much of an effect is kept, the root of a part of a squared norm; 1 of nothing."""
    return min(1.0, (kept / whole) ** 0.5) if whole else 1.0
