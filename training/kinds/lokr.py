"""LoKr: the Kronecker product of a small matrix and a larger one, which may itself be of low rank (Yeh et al. 2024)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kind import Forward, Kind, Tensors, frozen_forward, kernel_of, peft_shapes, sides, steps_of

NAMES = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class Lokr(Kind):
    """dW = s w1 (x) w2 with w1 (l, m) and w2 (k, n), or w2 = w2_a w2_b with the rank between; out = l k, in = m n.

    Where the rank is half the larger side of w2 or more, w2 is kept whole. Then loaders take no notice of alpha, and
    s is 1 here too. A convolution's window belongs to w2.
    """

    zero = ("lokr_w1",)
    factors = NAMES
    file_names = {name: name for name in NAMES}

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        return peft_shapes("lokr", *sides(layer), kernel_of(layer), rank)

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
