"""The weights of a loaded model, read through ComfyUI's own casting."""

from __future__ import annotations

import comfy.ops
from torch import Tensor, nn


class CastWeights:
    """Weights read through ComfyUI's own casting, so streamed, paged, patched and quantised layers all work."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        comfy.ops.run_every_op()
        weight = layer.weight
        if _is_ready(layer, weight, like):
            return weight, layer.bias, None
        return comfy.ops.cast_bias_weight(layer, like, offloadable=True)

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
