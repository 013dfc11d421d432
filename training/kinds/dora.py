"""DoRA: a LoRA gives the direction of each column of the weight, a trained number its length (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..frozen import Weights
from .kind import Forward, Tensors, product, product_input_gradient, sides
from .lora import Lora, as_matrices, change, low_rank

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

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        _, into = sides(layer)
        magnitude = (1, into, 1, 1) if isinstance(layer, nn.Conv2d) else (1, into)
        return {**super().shapes(layer, rank, config), "magnitude": magnitude}

    def start(self, tensors: Tensors, draw: torch.Generator) -> None:
        super().start({name: tensors[name] for name in ("down", "up")}, draw)
        nn.init.zeros_(tensors["magnitude"])

    def begin(self, layer: nn.Module, tensors: Tensors, scale: float, weights: Weights) -> None:
        magnitude = tensors["magnitude"]
        if not magnitude.any():
            with torch.no_grad():
                magnitude.copy_(_norms(layer, change(tensors, scale), magnitude, weights) + LEAST_NORM)

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        down, up, magnitude = (tensors[name] for name in ("down", "up", "magnitude"))
        with torch.no_grad():
            frozen = Columns(layer, tensors, scale, weights, _norms(layer, 0, magnitude, weights).square())

        def forward(x: Tensor) -> Tensor:
            # Every column times a number is every input times it: so the weight itself is never touched.
            x, y = ScaledColumns.apply(x, magnitude, frozen)
            return y + low_rank(thinned(x), down, up, scale, layer)

        return forward


@dataclass(frozen=True)
class Columns:
    """A layer whose weight's columns are scaled, what is added to it, and the squared norms of its own columns."""

    layer: nn.Module
    tensors: Tensors
    scale: float
    weights: Weights
    squared: Tensor

    def norms(self, weight: Tensor) -> Tensor:
        """|W + s B A| by column in float32, as |W|^2 + 2 s A (B^T W) + s^2 A (B^T B A), no matrix being formed."""
        down, up = as_matrices(self.tensors)
        across = (up.to(weight.dtype) @ weight.flatten(1)).float() * 2 + self.scale * (up @ up.t() @ down)
        grown = (down * across).view(len(down), self.squared.shape[1], -1).sum((0, 2)) * self.scale
        return (self.squared + grown.view(self.squared.shape)).clamp(min=0).sqrt() + LEAST_NORM


class ScaledColumns(torch.autograd.Function):
    """c x and y = W c x + b with c = m / |W + s B A| by column; W is read once and kept nowhere.

    With g = g_cx + W^T g_y: dx = c g, dm = x g / |W + s B A| summed over everything but the columns.
    """

    @staticmethod
    def forward(ctx, x, magnitude, columns):
        weight, bias, ticket = columns.weights.take(columns.layer, x)
        norms = columns.norms(weight)
        scaled = (x * (magnitude / norms)).to(x.dtype)
        y = product(scaled, weight, columns.layer, bias)
        columns.weights.give_back(columns.layer, weight, bias, ticket)
        ctx.columns = columns
        ctx.save_for_backward(x, magnitude, norms)
        return scaled, y

    @staticmethod
    def backward(ctx, grad_scaled, grad_y):
        x, magnitude, norms = ctx.saved_tensors
        layer, weights = ctx.columns.layer, ctx.columns.weights
        weight, bias, ticket = weights.take(layer, grad_y)
        grad = product_input_gradient(x.shape, weight, grad_y, layer).add_(grad_scaled)
        weights.give_back(layer, weight, bias, ticket)
        others = [side for side in range(x.ndim) if side != (1 if isinstance(layer, nn.Conv2d) else x.ndim - 1)]
        grad_magnitude = (x.float() * grad).sum(others).view(norms.shape) / norms
        return (grad * (magnitude / norms)).to(x.dtype), grad_magnitude, None


def _norms(layer: nn.Module, added: Tensor | float, magnitude: Tensor, weights: Weights) -> Tensor:
    """|W + added| over everything but the inputs, in float32 and of the shape of `magnitude`."""
    weight, bias, ticket = weights.take(layer, magnitude)
    changed = (weight.flatten(1) + added).view(len(weight), magnitude.shape[1], -1)
    weights.give_back(layer, weight, bias, ticket)
    return torch.linalg.vector_norm(changed, dim=(0, 2)).view(magnitude.shape)
