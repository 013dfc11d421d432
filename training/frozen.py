"""The layers of the base model, leaving their weights alone.

A weight is read when it is multiplied with, in forward and again in backward, and never kept in between. So it does
not matter where it lives: in an inference tensor, on another device, in a page that may be evicted, or quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    if type(layer).__name__ == "GEGLU":
        return lambda x: GatedGelu.apply(layer.proj(x))
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
    if x.ndim == 2:
        return F.linear(x, weight, bias)
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


class GatedGelu(torch.autograd.Function):
    """value * gelu(gate) for an input (..., 2 n) that holds both halves (Shazeer 2020, GEGLU).

    It keeps its input alone and takes gelu again in backward: a third less memory for these widest of all activations,
    at the cost of one cheap pass. Both gradients are written where the caller wants them, side by side.
    """

    @staticmethod
    def forward(ctx, both):
        ctx.save_for_backward(both)
        value, gate = both.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    def backward(ctx, grad):
        (both,) = ctx.saved_tensors
        value, gate = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        grad_value, grad_gate = grad_both.chunk(2, dim=-1)
        torch.mul(grad, F.gelu(gate), out=grad_value)
        torch.ops.aten.gelu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grad_both


class AdaptedLinears(torch.autograd.Function):
    """Adapted linear layers that read one input, as one node: y_i = x W_i^T + b_i + scale (x A_i^T) B_i.

    A_i (rank, in) and B_i (rank, out) are trainable, W_i is frozen. The node keeps the input and the rank-wide products
    h = x A^T, adds into the base outputs in place and casts the small factors, never the input. With g_i the incoming
    gradients: dB_i = scale h_i^T g_i, dA_i = scale (g_i B_i^T)^T x, dx = sum of g_i W_i + scale (g_i B_i^T) A_i. All A
    are multiplied with as one matrix, and dx is summed in place. Held equal to peft's layers by a test.
    """

    @staticmethod
    def forward(ctx, x, scale, weights, layers, *factors):
        flat = x.reshape(-1, x.shape[-1])
        downs, ups = _stacked(factors[0::2], x.dtype), [_cast(up, x.dtype) for up in factors[1::2]]
        inner = flat @ downs.t()
        outputs = []
        for layer, up, part in zip(layers, ups, inner.split(len(ups[0]), dim=1), strict=True):
            weight, bias, ticket = weights.take(layer, x)
            y = _linear(x, weight, bias)
            weights.give_back(layer, weight, bias, ticket)
            y.view(-1, y.shape[-1]).addmm_(part, up, alpha=scale)
            outputs.append(y)
        ctx.scale, ctx.weights, ctx.layers, ctx.shape = scale, weights, layers, x.shape
        ctx.save_for_backward(flat, inner, *factors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        flat, inner, *factors = ctx.saved_tensors
        dtype, scale = flat.dtype, ctx.scale
        downs, ups = _stacked(factors[0::2], dtype), [_cast(up, dtype) for up in factors[1::2]]
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        inner_grad = torch.empty_like(inner)
        grad_x, grad_ups = None, []
        rank = len(ups[0])
        # With beta 0 the first argument of addmm lends its shape only, and the scale costs no pass of its own.
        for layer, grad, up, start in zip(ctx.layers, grads, ups, range(0, inner.shape[1], rank), strict=True):
            torch.mm(grad, up.t(), out=inner_grad[:, start : start + rank])
            grad_ups.append(torch.addmm(up, inner[:, start : start + rank].t(), grad, beta=0, alpha=scale))
            if ctx.needs_input_grad[0]:
                weight, bias, ticket = ctx.weights.take(layer, grad)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
                ctx.weights.give_back(layer, weight, bias, ticket)
        if grad_x is not None:
            grad_x = grad_x.addmm_(inner_grad, downs, alpha=scale).view(ctx.shape)
        grad_downs = torch.addmm(downs, inner_grad.t(), flat, beta=0, alpha=scale).split(rank)
        pairs = zip(grad_downs, grad_ups, factors[0::2], factors[1::2], strict=True)
        grad_factors = [_cast(g, f.dtype) for down, up, d, u in pairs for g, f in ((down, d), (up, u))]
        return grad_x, None, None, None, *grad_factors


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return _cast(factors[0] if len(factors) == 1 else torch.cat(factors), dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first is ten times cheaper than a `to` that does nothing, and there are thousands a step.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
