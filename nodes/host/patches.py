"""What ComfyUI's loader makes of a LoRA file: which weights it changes, and into what."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter, OFTAdapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor, nn

from ...training.factors import Factors
from .weights import CastWeights

MODEL = "diffusion_model."
"""What the keys of the MODEL's weights begin with; all others are the CLIP's."""
NAMED = 3
"""So many layers are called by name before the rest is counted."""
Patches = list[tuple[object, tuple[object, object] | None]]
"""What is patched onto a weight: each patch with its place in it (None: all)."""


def key_map(model, clip) -> dict[str, object]:
    """Every name under which ComfyUI's loader knows a weight -> the weight's key, or (key, (side, start, length))."""
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    return keys if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)


def holder(key: str, model, clip):
    """The patcher of the model that has a weight."""
    return model if clip is None or key.startswith(MODEL) else clip.patcher


def called(key: str) -> str:
    """A weight's key as people call its layer."""
    return key.removeprefix(MODEL).removesuffix(".weight")


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def base_weight(patcher, key: str) -> Tensor:
    """A copy of a weight in float32, dequantised and with what is patched onto it, where the model computes."""
    layer = _layer(patcher, key)
    weight, bias, ticket = CastWeights().take(layer, torch.empty(0, device=patcher.load_device))
    copy = weight.clone()
    CastWeights().give_back(layer, weight, bias, ticket)
    return copy


def shape_of(patcher, key: str) -> tuple[int, ...]:
    """The shape of a weight, which quantised ones do not have in memory."""
    layer = _layer(patcher, key)
    if isinstance(layer, Tensor):
        return tuple(layer.shape)
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size
    if hasattr(layer, "out_features"):
        return layer.out_features, layer.in_features
    return tuple(layer.weight.shape)


def zero_weight(patcher, key: str) -> Tensor:
    """Zeros of a weight's shape."""
    return torch.zeros(shape_of(patcher, key), device=patcher.load_device)


def factors_of_patch(patch: object, place: tuple[object, object] | None, shape: tuple[int, int]) -> Factors | None:
    """A plain LoRA's patch as factors of the change of the whole weight (out, in h w); None for anything else."""
    if not isinstance(patch, LoRAAdapter) or (place and place[1] is not None):
        return None
    up, down, alpha, mid, magnitude, reshape = patch.weights
    if mid is not None or magnitude is not None or reshape is not None:
        return None
    down = down.flatten(1).float()
    factors = Factors(up.flatten(1).float() * scale_of(alpha, len(down)), down)
    if place is None:
        return factors
    side, start, _ = place[0]
    return factors.placed(shape, side, start) if side < 2 else None


def scale_of(alpha: float | None, rank: int) -> float:
    """What the loader multiplies a product with."""
    return 1.0 if alpha is None else alpha / rank


def change_of(patcher, key: str, patches: Patches, before: Tensor | None = None) -> Tensor:
    """What the loader changes about a weight by its patches, each with its place in it (None: all), at strength 1.

    `before` is the weight in float32, for patches that depend on it; without it, it is read as it is now.
    """
    if before is None:
        needed = any(depends_on_weight(patch) for patch, _ in patches)
        before = base_weight(patcher, key) if needed else zero_weight(patcher, key)
    entries = [(1.0, patch, 1.0, *(place or (None, None))) for patch, place in patches]
    return comfy.lora.calculate_weight(entries, before.clone(), key) - before


def place_of(target: object) -> tuple[str, tuple[object, object] | None]:
    """What a key map leads to: a weight's key and (which part of it, function on the change), None for all of it."""
    if isinstance(target, str):
        return target, None
    key, part, *function = target
    return key, (part, function[0] if function else None)


def magnitude_of(patch: WeightAdapterBase) -> Tensor | None:
    """The dora_scale of a patch, which its classes keep at different places."""
    return patch.weights[4] if isinstance(patch, LoRAAdapter) else patch.weights[-1]


def depends_on_weight(patch: object) -> bool:
    """Whether what a patch changes cannot be known without the weight it changes."""
    if not isinstance(patch, WeightAdapterBase):
        return patch[0] != "diff"
    return isinstance(patch, OFTAdapter) or magnitude_of(patch) is not None


def _layer(patcher, key: str) -> nn.Module | Tensor:
    """The layer that has a weight; a bias or another parameter is its own."""
    return comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))
