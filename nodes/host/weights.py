"""The weights of a loaded model, read through ComfyUI's own casting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import torch
from torch import Tensor, nn

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
            return *layer.cast_bias_weight(like)[:2], None
        weight, bias, ticket = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
        # Multiplied as it is, a quantised weight would have the gradient quantised too.
        return weight.dequantize() if isinstance(weight, QUANTISED) else weight, bias, ticket

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        if ticket is not None:
            comfy.ops.uncast_bias_weight(layer, weight, bias, ticket)


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

    ComfyUI makes them in inference mode, and such tensors cannot be kept. Within the block each is replaced by another
    tensor over the same memory. ComfyUI's own layers are left alone: their weights are read through `CastWeights`.
    """
    swapped = []
    try:
        for module in network.modules():
            if hasattr(module, "comfy_cast_weights"):
                continue
            for name, parameter in module._parameters.items():
                if type(parameter) is nn.Parameter and parameter.is_inference():
                    swapped.append((module._parameters, name, parameter))
                    module._parameters[name] = _alias(parameter)
        yield
    finally:
        for parameters, name, parameter in swapped:
            parameters[name] = parameter


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """The same memory as an ordinary tensor."""
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        place = parameter.storage_offset(), parameter.shape, parameter.stride()
        return nn.Parameter(empty.set_(parameter.untyped_storage(), *place), requires_grad=False)
