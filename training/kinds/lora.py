"""LoRA: a change of low rank (Hu et al. 2021); on convolutions as in LoCon, a small one after a 1 x 1 of low rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoraConfig
from .kind import Forward, Kind, Tensors, frozen_forward, kernel_of, peft_shapes, sides, steps_of


class Lora(Kind):
    """down (rank, in) and up (rank, out) of a linear layer; (rank, in, h, w) and (out, rank, 1, 1) of a convolution.

    In a file up is (out, rank). Here a linear layer's is turned, because the product that makes its gradient is faster
    so; plain linear layers without dropout do not come here but go through `frozen.AdaptedLinears`.
    """

    zero = ("up",)
    factors = ("down", "up")
    file_names = {"down": "lora_down.weight", "up": "lora_up.weight"}

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        made = peft_shapes("lora", *sides(layer), kernel_of(layer), rank)
        up = made["lora_B"]
        return {"down": made["lora_A"], "up": up if kernel_of(layer) else up[::-1]}

    def rank(self, tensors: Tensors) -> int:
        return tensors["down"].shape[0]

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        base, down, up = frozen_forward(layer, weights), tensors["down"], tensors["up"]
        return lambda x: base(x) + low_rank(thinned(x), down, up, scale, layer)

    def norm(self, tensors: Tensors, scale: float) -> Tensor:
        """|s B A|^2 = s^2 tr((B^T B) (A A^T)), without forming the product."""
        down, up = as_matrices(tensors)
        return scale * ((up @ up.t()) * (down @ down.t())).sum().clamp(min=0).sqrt()

    def saved(self, tensors: Tensors) -> dict[str, Tensor]:
        return super().saved({**tensors, "up": _turned(tensors["up"])})

    def loaded(self, entries: Tensors) -> dict[str, Tensor]:
        tensors = super().loaded(entries)
        return {**tensors, "up": _turned(tensors["up"])}


def low_rank(x: Tensor, down: Tensor, up: Tensor, scale: float, layer: nn.Module) -> Tensor:
    """s B A x, in the dtype of x."""
    down, up = down.to(x.dtype), up.to(x.dtype)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(F.conv2d(x, down, **steps_of(layer)), up) * scale
    return (F.linear(x, down) * scale) @ up


def as_matrices(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Down (rank, in h w) and up (rank, out), whatever the layer."""
    down, up = tensors["down"], tensors["up"]
    return down.flatten(1), up.flatten(1).t() if up.ndim == 4 else up


def change(tensors: Tensors, scale: float) -> Tensor:
    """s B A as a matrix (out, in h w)."""
    down, up = as_matrices(tensors)
    return torch.mm(up.t(), down) * scale


def _turned(up: Tensor) -> Tensor:
    return up.t() if up.ndim == 2 else up
