"""The weights of a loaded model, read through ComfyUI's own casting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

QUANTISED = getattr(comfy.ops, "QuantizedTensor", ())


class CastWeights:
    """Weights read through ComfyUI's own casting, so streamed, paged, patched and quantised layers all work."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        comfy.ops.run_every_op()
        weight = layer.weight
        if _is_ready(layer, weight, like):
            return weight, layer.bias, None
        if hasattr(layer, "cast_bias_weight"):
            # Layers of other packs, such as those that hold GGUF files, unpack and patch their weights themselves.
            weight, bias, ticket = *layer.cast_bias_weight(like)[:2], None
        else:
            weight, bias, ticket = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
        return _plain(weight), None if bias is None else _plain(bias), ticket

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        if ticket is not None:
            comfy.ops.uncast_bias_weight(layer, weight, bias, ticket)


def _plain(tensor: Tensor) -> Tensor:
    """Numbers to multiply with, of whatever type a tensor is.

    Multiplied as it is, a quantised weight would have the gradient quantised too, and a tensor of another pack's own
    type would make all that is computed with it one of these.
    """
    tensor = tensor.dequantize() if isinstance(tensor, QUANTISED) else tensor
    return tensor if type(tensor) in (Tensor, nn.Parameter) else tensor.as_subclass(Tensor)


def _is_ready(layer: nn.Module, weight: Tensor, like: Tensor) -> bool:
    """Whether the weight can be multiplied with as it is: nothing to move, cast, page in, dequantise or patch."""
    if weight.dtype != like.dtype or weight.device != like.device:
        return False
    state = layer.__dict__
    return not (
        "_v" in state or state.get("weight_function") or state.get("bias_function") or type(weight) is not nn.Parameter
    )


@contextmanager
def trainable_around(network: nn.Module) -> Iterator[None]:
    """Autograd may keep the small parameters of `network` while it runs: gates, tokens, norms of its own making.

    ComfyUI makes them in inference mode, and such tensors cannot be kept; other packs make them of types of their own.
    Within the block each is replaced by a plain tensor over the same memory. ComfyUI's own layers are left alone: their
    weights are read through `CastWeights`.
    """
    swapped = []
    try:
        for module in network.modules():
            if hasattr(module, "comfy_cast_weights"):
                continue
            for name, parameter in module._parameters.items():
                if _is_numbers(parameter) and (parameter.is_inference() or type(parameter) is not nn.Parameter):
                    swapped.append((module._parameters, name, parameter))
                    module._parameters[name] = _alias(parameter)
        yield
    finally:
        for parameters, name, parameter in swapped:
            parameters[name] = parameter


def _is_numbers(parameter: nn.Parameter | None) -> bool:
    """Whether what is in its memory is what it says, not something packed."""
    return parameter is not None and parameter.is_floating_point() and not is_traceable_wrapper_subclass(parameter)


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as an ordinary tensor."""
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        place = parameter.storage_offset(), parameter.size(), parameter.stride()
        return nn.Parameter(empty.set_(parameter.untyped_storage(), *place), requires_grad=False)
