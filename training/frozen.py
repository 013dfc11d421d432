"""The layers of the base model, leaving their weights alone.

A weight is read when it is multiplied with, in forward and again in backward, and never kept in between. So it does
not matter where it lives: in an inference tensor, on another device, in a page that may be evicted, or quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights(Protocol):
    """How a layer's weight is read. The host's own casting satisfies this."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        """Weight and bias in the dtype and on the device of `like`, and a ticket to give them back with."""

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        """The caller no longer needs what `take` returned."""


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


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
        y = multiplied(x, weight, bias)
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


@dataclass(frozen=True)
class Adapted:
    """Linear layers that read one input, the factors that adapt them, and where the gradients of these are added up."""

    layers: tuple[nn.Module, ...]
    downs: Tensor  # (layers * rank, in): all down factors as one matrix
    ups: tuple[Tensor, ...]  # each (rank, out)
    downs_grad: Tensor
    ups_grad: tuple[Tensor, ...]
    scale: float
    weights: Weights


class AdaptedLinears(torch.autograd.Function):
    """Adapted linear layers that read one input, as one node: y_i = x W_i^T + b_i + scale (x A_i^T) B_i.

    A_i (rank, in) and B_i (rank, out) are trained, W_i is frozen. The node keeps the input and the rank-wide products
    h = x A^T, adds into the base outputs in place and casts the small factors, never the input. With g_i the incoming
    gradients: dB_i = scale h_i^T g_i, dA_i = scale (g_i B_i^T)^T x, dx = sum of g_i W_i + scale (g_i B_i^T) A_i. All A
    are multiplied with as one matrix, dx is summed in place, and dA and dB are added to what the caller holds for them
    instead of being handed to autograd, which would copy each. `downs` is an argument of its own only so that autograd
    knows there is something to train. Held equal to peft's layers by a test.
    """

    @staticmethod
    def forward(ctx, x, downs, adapted):
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ _cast(downs, x.dtype).t()
        outputs = []
        for layer, up, part in zip(adapted.layers, adapted.ups, _parts(inner, adapted), strict=True):
            weight, bias, ticket = adapted.weights.take(layer, x)
            y = multiplied(x, weight, bias)
            adapted.weights.give_back(layer, weight, bias, ticket)
            y.view(-1, y.shape[-1]).addmm_(part, _cast(up, x.dtype), alpha=adapted.scale)
            outputs.append(y)
        ctx.adapted, ctx.shape = adapted, x.shape
        ctx.save_for_backward(flat, inner)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        (flat, inner), adapted = ctx.saved_tensors, ctx.adapted
        inner_grad, grad_x = torch.empty_like(inner), None
        parts, part_grads = _parts(inner, adapted), _parts(inner_grad, adapted)
        for layer, grad, up, up_grad, part, part_grad in zip(
            adapted.layers, grads, adapted.ups, adapted.ups_grad, parts, part_grads, strict=True
        ):
            grad = grad.reshape(-1, grad.shape[-1])
            torch.mm(grad, _cast(up, grad.dtype).t(), out=part_grad)
            _add_product(up_grad, part.t(), grad, adapted.scale)
            if ctx.needs_input_grad[0]:
                weight, bias, ticket = adapted.weights.take(layer, grad)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
                adapted.weights.give_back(layer, weight, bias, ticket)
        _add_product(adapted.downs_grad, inner_grad.t(), flat, adapted.scale)
        if grad_x is not None:
            grad_x = grad_x.addmm_(inner_grad, _cast(adapted.downs, grad_x.dtype), alpha=adapted.scale).view(ctx.shape)
        return grad_x, None, None


def _parts(inner: Tensor, adapted: Adapted) -> tuple[Tensor, ...]:
    """The columns of each layer in what is rank-wide for all of them."""
    return (inner,) if len(adapted.layers) == 1 else inner.chunk(len(adapted.layers), dim=1)


def _add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale a b, in the dtype of the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(a @ b, alpha=scale)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first is ten times cheaper than a `to` that does nothing, and there are thousands a step.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
