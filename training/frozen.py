"""The layers of the base model, leaving their weights alone.

A weight is read when it is multiplied with, in forward and again in backward, and never kept in between. So it does
not matter where it lives: in an inference tensor, on another device, in a page that may be evicted, or quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights(Protocol):
    """How a layer's weight is read. The host's own casting satisfies this; so does `ResidentWeights`."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        """Weight and bias in the dtype and on the device of `like`, and a ticket to give them back with."""

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        """The caller no longer needs what `take` returned."""


class ResidentWeights:
    """Weights that simply are where they are used."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        bias = getattr(layer, "bias", None)
        return layer.weight.to(like), None if bias is None else bias.to(like), None

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        pass


def is_linear(layer: nn.Module) -> bool:
    """A linear layer of any make: quantised ones do not inherit from nn.Linear."""
    return hasattr(layer, "in_features") and hasattr(layer, "out_features") and hasattr(layer, "weight")


def forward_of(layer: nn.Module, weights: Weights, *, copy_norm_input: bool) -> Callable[..., Tensor] | None:
    """A forward for `layer` that keeps no weight for backward, or None when its own forward already does not."""
    if is_linear(layer):
        return lambda x: _Linear.apply(x, layer, weights)
    if isinstance(layer, nn.Conv2d):
        return lambda x: _Conv2d.apply(x, layer, weights)
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        if layer.weight is not None:
            return _norm_with_weight(layer, weights, copy_norm_input)
        if copy_norm_input and isinstance(layer, nn.LayerNorm):
            return lambda x: F.layer_norm(x.clone(), layer.normalized_shape, eps=layer.eps)
    return None


def _norm_with_weight(layer: nn.Module, weights: Weights, copy_input: bool) -> Callable[[Tensor], Tensor]:
    """Norm weights are vectors: autograd may keep a copy of its own, which costs nothing."""

    def forward(x: Tensor) -> Tensor:
        weight, bias, ticket = weights.take(layer, x)
        own_weight, own_bias = weight.clone(), None if bias is None else bias.clone()
        weights.give_back(layer, weight, bias, ticket)
        x = x.clone() if copy_input else x
        if isinstance(layer, nn.GroupNorm):
            return F.group_norm(x, layer.num_groups, own_weight, own_bias, layer.eps)
        if isinstance(layer, nn.RMSNorm):
            return F.rms_norm(x, layer.normalized_shape, own_weight, layer.eps)
        return F.layer_norm(x, layer.normalized_shape, own_weight, own_bias, layer.eps)

    return forward


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in memory of its own. F.linear may answer with a view, which a block must not add into."""
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if bias is None:
        torch.mm(flat_x, weight.t(), out=flat_y)
    else:
        torch.addmm(bias, flat_x, weight.t(), out=flat_y)
    return y


class _Linear(torch.autograd.Function):
    """y = x W^T + b with a gradient for x alone: g W."""

    @staticmethod
    def forward(ctx, x, layer, weights):
        ctx.layer, ctx.weights = layer, weights
        weight, bias, ticket = weights.take(layer, x)
        y = _linear(x, weight, bias)
        weights.give_back(layer, weight, bias, ticket)
        return y

    @staticmethod
    def backward(ctx, grad):
        weight, bias, ticket = ctx.weights.take(ctx.layer, grad)
        grad_x = grad.matmul(weight)
        ctx.weights.give_back(ctx.layer, weight, bias, ticket)
        return grad_x, None, None


class _Conv2d(torch.autograd.Function):
    """A convolution with a gradient for its input alone."""

    @staticmethod
    def forward(ctx, x, layer, weights):
        ctx.layer, ctx.weights, ctx.shape = layer, weights, x.shape
        weight, bias, ticket = weights.take(layer, x)
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        weights.give_back(layer, weight, bias, ticket)
        return y

    @staticmethod
    def backward(ctx, grad):
        layer = ctx.layer
        weight, bias, ticket = ctx.weights.take(layer, grad)
        grad_x = torch.nn.grad.conv2d_input(
            ctx.shape, weight, grad, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        ctx.weights.give_back(layer, weight, bias, ticket)
        return grad_x, None, None


class AdaptedLinear(torch.autograd.Function):
    """y = x W^T + b + scale (x A^T) B^T, with A (rank, in) and B (out, rank) trainable and W frozen.

    One node instead of five: it keeps the input and the rank-wide product x A^T, adds into the base output in place
    and casts the small factors, never the input. With h = x A^T and g the incoming gradient:
    dB = scale g^T h, dA = scale (g B)^T x, dx = g W + scale (g B) A. Held equal to peft's layer by a test.
    """

    @staticmethod
    def forward(ctx, x, down, up, scale, layer, weights):
        ctx.layer, ctx.weights, ctx.scale = layer, weights, scale
        flat = x.reshape(-1, x.shape[-1])
        weight, bias, ticket = weights.take(layer, x)
        y = _linear(x, weight, bias)
        weights.give_back(layer, weight, bias, ticket)
        inner = flat @ down.to(x.dtype).t()
        y.view(-1, y.shape[-1]).addmm_(inner, up.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, inner, down, up)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, inner, down, up = ctx.saved_tensors
        flat_grad = grad.reshape(-1, grad.shape[-1])
        inner_grad = (flat_grad @ up.to(grad.dtype)).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight, bias, ticket = ctx.weights.take(ctx.layer, grad)
            grad_x = flat_grad @ weight
            ctx.weights.give_back(ctx.layer, weight, bias, ticket)
            grad_x = grad_x.addmm_(inner_grad, down.to(grad.dtype)).view(x.shape)
        grad_down = (inner_grad.t() @ x.reshape(-1, x.shape[-1])).to(down.dtype)
        grad_up = (flat_grad.t() @ inner).mul_(ctx.scale).to(up.dtype)
        return grad_x, grad_down, grad_up, None, None, None
