"""LoKr: the Kronecker product of a small matrix and a larger one, which may itself be of low rank (Yeh et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HIGHEST_RANK, LOKR, LoraConfig
from .kind import Forward, Kind, Tensors, frozen_forward, kernel_of, numbers, peft_shapes, sides, steps_of

NAMES = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class Lokr(Kind):
    """dW = s w1 (x) w2 with w1 (l, m) and w2 (k, n), or w2 = w2_a w2_b with the rank between; out = l k, in = m n.

    `lokr_factor` is the most that l and m may be, -1 that they are near the square roots of the sides. Then the rank is
    that of w2, which is kept whole where the rank is half its larger side or more, as in peft, and also where that
    takes no more numbers. With 0 the rank says how much room there is: w2 is whole, and the factor the smallest from 2
    on with no more numbers than a LoRA of that rank. Loaders take no notice of alpha beside a whole w2, so s is 1
    there. A convolution's window belongs to w2.

    w2 is zero at first, as in LyCORIS, so that all of it learns from the first step on. With a w1 of zero, as in peft,
    the few numbers of w1 have to grow before the gradient reaches w2.
    """

    zero = ("lokr_w2", "lokr_w2_b")
    factors = NAMES
    file_names = {name: name for name in NAMES}

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        size = (*sides(layer), kernel_of(layer))
        if not config.lokr_factor:
            return _roomy(*size, rank)
        return min(_whole(*size, config.lokr_factor), peft_shapes("lokr", *size, rank, config.lokr_factor), key=numbers)

    def rank(self, tensors: Tensors) -> int:
        return tensors["lokr_w2_b"].shape[0] if "lokr_w2_b" in tensors else 1

    def scale(self, tensors: Tensors, config) -> float:
        return super().scale(tensors, config) if "lokr_w2_b" in tensors else 1.0

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        base, kernel = frozen_forward(layer, weights), kernel_of(layer)

        def forward(x: Tensor) -> Tensor:
            small, large = tensors["lokr_w1"] * scale, _large(tensors)
            if kernel:
                large = large.view(len(large), -1, *kernel)
                return base(x) + _convolved(thinned(x), small.to(x.dtype), large.to(x.dtype), layer)
            return base(x) + _multiplied(thinned(x), small.to(x.dtype), large.to(x.dtype))

        return forward

    def norm(self, tensors: Tensors, scale: float) -> Tensor:
        """|w1 (x) w2| = |w1| |w2|."""
        return scale * tensors["lokr_w1"].norm() * _large(tensors).norm()


@dataclass(frozen=True)
class Division:
    """How a file divides a layer."""

    layer: nn.Module
    small: tuple[int, ...]
    """The shape of w1."""
    rank: int | None
    """That of w2; None where it is whole."""

    @property
    def setting(self) -> str:
        """Which of the settings says the layer's rank."""
        return "conv_rank" if math.prod(kernel_of(self.layer)) > 1 else "rank"

    def least_rank(self, factor: int) -> int:
        """The lowest rank that gives such a w2, or with a factor of 0 so much room."""
        out, into = sides(self.layer)
        rows, columns = out // self.small[0], into // self.small[1] * math.prod(kernel_of(self.layer))
        if not factor:
            lora = out + into * math.prod(kernel_of(self.layer))
            return -(-(math.prod(self.small) + rows * columns) // lora)
        return self.rank or -(-rows * columns // (rows + columns))

    def is_made_by(self, factor: int, rank: int) -> bool:
        """Whether an adapter with these settings can begin as the file."""
        shapes = Lokr().shapes(self.layer, rank, LoraConfig(kind=LOKR, lokr_factor=factor))
        return shapes["lokr_w1"] == self.small and (self.rank is not None or "lokr_w2" in shapes)


def settings_for(file: Sequence[Division]) -> dict[str, int] | None:
    """`lokr_factor`, and the least `rank` and `conv_rank`, with which adapters can begin as a file; None without any.

    With a `lokr_factor` of 0 a higher rank would be as wrong as a lower one.
    """
    for factor in (-1, max(max(division.small) for division in file), 0):
        ranks: dict[str, int] = {}
        for division in file:
            ranks[division.setting] = max(ranks.get(division.setting, 1), division.least_rank(factor))
        if max(ranks.values()) > HIGHEST_RANK:
            continue
        if all(division.is_made_by(factor, ranks[division.setting]) for division in file):
            return {"lokr_factor": factor, **ranks}
    return None


@lru_cache
def _roomy(out: int, into: int, kernel: tuple[int, ...], rank: int) -> dict[str, tuple[int, ...]]:
    """The largest whole factors that have no more numbers than a LoRA of that rank, or else the smallest."""
    room, found = numbers(peft_shapes("lora", out, into, kernel, rank)), {}
    for factor in range(2, max(2, math.isqrt(max(out, into))) + 1):
        shapes = _whole(out, into, kernel, factor)
        if not found or numbers(shapes) < numbers(found):
            found = shapes
        if numbers(found) <= room:
            break
    return found


def _whole(out: int, into: int, kernel: tuple[int, ...], factor: int) -> dict[str, tuple[int, ...]]:
    return peft_shapes("lokr", out, into, kernel, max(out, into), factor)


def _large(tensors: Tensors) -> Tensor:
    return tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]


def _multiplied(x: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """(w1 (x) w2) x for x (..., m n), without forming the product: first the factor that leaves fewer numbers."""
    parts = x.unflatten(-1, (small.shape[1], -1))
    if small.shape[0] * large.shape[1] < small.shape[1] * large.shape[0]:
        return F.linear(_mixed(parts, small), large).flatten(-2)
    return _mixed(F.linear(parts, large), small).flatten(-2)


def _mixed(parts: Tensor, small: Tensor) -> Tensor:
    """w1 (l, m) times parts (..., m, n)."""
    return F.linear(parts.transpose(-1, -2), small).transpose(-1, -2)


def _convolved(x: Tensor, small: Tensor, large: Tensor, layer: nn.Conv2d) -> Tensor:
    """The same for pictures x (B, m n, h, w): every m-th of the channels through w2, then mixed by w1."""
    parts = F.conv2d(x.reshape(-1, large.shape[1], *x.shape[2:]), large, **steps_of(layer))
    parts = parts.view(len(x), small.shape[1], *parts.shape[1:])
    return torch.einsum("bmkhw,lm->blkhw", parts, small).flatten(1, 2)
