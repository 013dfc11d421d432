"""LoKr: the Kronecker product of a small matrix and a larger one, which may itself be of low rank (Yeh et al. 2024)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoraConfig
from .kind import Forward, Kind, Tensors, frozen_forward, kernel_of, numbers, peft_shapes, sides, steps_of

NAMES = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class Lokr(Kind):
    """dW = s w1 (x) w2 with w1 (l, m) and w2 (k, n), or w2 = w2_a w2_b with the rank between; out = l k, in = m n.

    `lokr_factor` is the most that l and m may be, -1 that they are near the square roots of the sides. Then the rank is
    that of w2, which is kept whole where the rank is half its larger side or more. With 0 the rank says how much room
    there is: w2 is whole, and the factor the smallest from 2 on with no more numbers than a LoRA of that rank. Loaders
    take no notice of alpha beside a whole w2, so s is 1 there. A convolution's window belongs to w2.

    w2 is zero at first, as in LyCORIS, so that all of it learns from the first step on. With a w1 of zero, as in peft,
    the few numbers of w1 have to grow before the gradient reaches w2.
    """

    zero = ("lokr_w2", "lokr_w2_b")
    factors = NAMES
    file_names = {name: name for name in NAMES}

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        size = (*sides(layer), kernel_of(layer))
        if config.lokr_factor:
            return peft_shapes("lokr", *size, rank, config.lokr_factor)
        return _roomy(*size, rank)

    def rank(self, tensors: Tensors) -> int:
        return tensors["lokr_w2_b"].shape[0] if "lokr_w2_b" in tensors else 1

    def scale(self, tensors: Tensors, config) -> float:
        return super().scale(tensors, config) if "lokr_w2_b" in tensors else 1.0

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        base, kernel = frozen_forward(layer, weights), kernel_of(layer)
        small = tensors["lokr_w1"]

        def forward(x: Tensor) -> Tensor:
            large = _large(tensors)
            if kernel:
                large = large.view(len(large), -1, *kernel)
                change = _convolved(thinned(x), small.to(x.dtype), large.to(x.dtype), layer)
            else:
                change = _multiplied(thinned(x), small.to(x.dtype), large.to(x.dtype))
            return base(x) + change * scale

        return forward

    def norm(self, tensors: Tensors, scale: float) -> Tensor:
        """|w1 (x) w2| = |w1| |w2|."""
        return scale * tensors["lokr_w1"].norm() * _large(tensors).norm()


def settings_for(layer: nn.Module, small: tuple[int, ...], rank: int | None) -> tuple[int, int] | None:
    """(`lokr_factor`, rank) that give a layer a w1 of this shape, and a w2 of that rank or, without one, a whole w2."""
    size = (*sides(layer), kernel_of(layer))
    for factor in (-1, max(small)):
        whole = peft_shapes("lokr", *size, max(size[:2]), factor)
        if whole["lokr_w1"] == tuple(small):
            return factor, rank or -(-max(whole["lokr_w2"][:2]) // 2)
    return None


@lru_cache
def _roomy(out: int, into: int, kernel: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The largest whole factors that have no more numbers than a LoRA of that rank, or else the smallest."""
    room, found = numbers(peft_shapes("lora", out, into, kernel, rank)), {}
    for factor in range(2, max(2, math.isqrt(max(out, into))) + 1):
        shapes = peft_shapes("lokr", out, into, kernel, max(out, into), factor)
        if not found or numbers(shapes) < numbers(found):
            found = shapes
        if numbers(found) <= room:
            break
    return found


def _large(tensors: Tensors) -> Tensor:
    return tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]


def _multiplied(x: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """(w1 (x) w2) x for x (..., m n), without forming the product: w2 from the right, then w1 from the left."""
    parts = F.linear(x.unflatten(-1, (small.shape[1], -1)), large)
    return F.linear(parts.transpose(-1, -2), small).transpose(-1, -2).flatten(-2)


def _convolved(x: Tensor, small: Tensor, large: Tensor, layer: nn.Conv2d) -> Tensor:
    """The same for pictures x (B, m n, h, w): every m-th of the channels through w2, then mixed by w1."""
    parts = F.conv2d(x.reshape(-1, large.shape[1], *x.shape[2:]), large, **steps_of(layer))
    parts = parts.view(len(x), small.shape[1], *parts.shape[1:])
    return torch.einsum("bmkhw,lm->blkhw", parts, small).flatten(1, 2)
