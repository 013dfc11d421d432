"""DoRA: a LoRA gives the direction of each column of the weight, a trained number its length (Liu et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..frozen import Weights
from .kind import Forward, Tensors, frozen_forward, sides
from .lora import Lora, change, low_rank

LEAST_NORM = torch.finfo(torch.float32).eps
"""Added to norms by the loader."""


class Dora(Lora):
    """W' = m (W + s B A) / |W + s B A|, with a norm and a trained m, `magnitude` (1, in), for each input.

    A convolution's magnitude is (1, in, 1, 1). Per input is how the paper writes it, and the one way in which ComfyUI's
    loader divides by the norm of the changed weight. peft's is per output, where that loader would divide by the norm
    of the unchanged weight; apart from the axis the values and gradients are peft's, the norm counting as a constant
    in backward (section 4.3). `magnitude` is zero until the weight can be read, then as long as the columns are.
    """

    file_names = {**Lora.file_names, "magnitude": "dora_scale"}

    def shapes(self, layer: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        _, into = sides(layer)
        return {
            **super().shapes(layer, rank),
            "magnitude": (1, into, 1, 1) if isinstance(layer, nn.Conv2d) else (1, into),
        }

    def start(self, tensors: Tensors, draw: torch.Generator) -> None:
        super().start({name: tensors[name] for name in ("down", "up")}, draw)
        nn.init.zeros_(tensors["magnitude"])

    def begin(self, layer: nn.Module, tensors: Tensors, scale: float, weights: Weights) -> None:
        magnitude = tensors["magnitude"]
        if not magnitude.any():
            with torch.no_grad():
                magnitude.copy_(_column_norms(layer, tensors, scale, weights))

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        base, down, up, magnitude = frozen_forward(layer, weights), *(tensors[n] for n in ("down", "up", "magnitude"))

        def forward(x: Tensor) -> Tensor:
            # Every column times a number is every input times it: so the weight itself is never touched.
            x = (x * (magnitude / _column_norms(layer, tensors, scale, weights))).to(x.dtype)
            return base(x) + low_rank(thinned(x), down, up, scale, layer)

        return forward


def _column_norms(layer: nn.Module, tensors: Tensors, scale: float, weights: Weights) -> Tensor:
    """|W + s B A| over everything but the inputs, in float32 and of the shape of `magnitude`."""
    with torch.no_grad():
        magnitude = tensors["magnitude"]
        weight, bias, ticket = weights.take(layer, magnitude)
        changed = (change(tensors, scale) + weight.flatten(1)).view(weight.shape)
        weights.give_back(layer, weight, bias, ticket)
        norms = torch.linalg.vector_norm(changed, dim=(0, *range(2, changed.ndim)))
        return norms.view(magnitude.shape) + LEAST_NORM
