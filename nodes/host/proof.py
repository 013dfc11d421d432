"""A written LoRA file, read back the way ComfyUI's loaders read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.utils
import torch
from comfy.weight_adapter import LoRAAdapter, OFTAdapter
from comfy.weight_adapter.base import WeightAdapterBase
from torch import Tensor, nn

from ...training.lora_file import LAYERS
from .loras import read_lora
from .weights import CastWeights


@dataclass(frozen=True)
class Proof:
    """How many of the file's layers ComfyUI applies, and how large their effect on the weights is."""

    matched: int
    layers: int
    effect: float

    @property
    def holds(self) -> bool:
        return self.matched == self.layers > 0 and self.effect > 0

    def __str__(self) -> str:
        verdict = "proved" if self.holds else "NOT PROVED"
        loaded = f"{self.matched} of {self.layers} layers load in ComfyUI"
        return f"{verdict}: {loaded}, effect on the weights {self.effect:.3g}"


def prove(model, path: Path, clip=None) -> Proof:
    """Load the file through ComfyUI's key mapping; the effect is the Frobenius norm of all the changes together.

    `clip` is needed for files with layers of the text encoders. What else a file may hold, such as embeddings, is no
    layer and is left out.
    """
    with torch.inference_mode():
        lora = {key: tensor for key, tensor in read_lora(path).items() if key.startswith(LAYERS)}
        patched, effect = 0, 0.0
        for patcher, keys in key_maps(model, clip):
            patches = comfy.lora.load_lora(lora, keys, log_missing=False)
            patched += len(patches)
            effect += sum(_squared_norm(patcher, key, patch) for key, patch in patches.items())
    return Proof(patched, len({key.split(".")[0] for key in lora}), effect**0.5)


def key_maps(model, clip) -> list[tuple[object, dict[str, object]]]:
    """What holds weights, each with the names that ComfyUI's loader knows for them."""
    maps = [(model, comfy.lora.model_lora_keys_unet(model.model, {}))]
    if clip is not None:
        maps.append((clip.patcher, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})))
    return maps


def changed_weight(patcher, key: str, patch: WeightAdapterBase) -> tuple[Tensor, Tensor]:
    """A weight in float32 and what ComfyUI's loader makes of it with the patch on at strength 1.

    Where the change does not depend on the weight, zeros stand for it.
    """
    layer, device = _layer(patcher, key), patcher.load_device
    if _needs_weight(patch):
        weight, bias, ticket = CastWeights().take(layer, torch.empty(0, device=device))
        before = weight.clone()
        CastWeights().give_back(layer, weight, bias, ticket)
    else:
        before = torch.zeros(weight_shape(layer), device=device)
    after = patch.calculate_weight(before.clone(), key, 1.0, 1.0, None, lambda change: change)
    return before, after


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """(out, in) or (out, in, h, w), also of quantised weights, which lie in memory in another shape."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return (layer.out_features, layer.in_features)


def _layer(patcher, key: str) -> nn.Module:
    return comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))


def _needs_weight(patch: WeightAdapterBase) -> bool:
    return isinstance(patch, OFTAdapter) or _dora_scale(patch) is not None


def _dora_scale(patch: WeightAdapterBase) -> Tensor | None:
    return patch.weights[4] if isinstance(patch, LoRAAdapter) else patch.weights[-1]


def _squared_norm(patcher, key: str, patch: WeightAdapterBase) -> float:
    if isinstance(patch, LoRAAdapter) and _dora_scale(patch) is None and patch.weights[3] is None:
        return _squared_norm_of_product(*patch.weights[:3])
    before, after = changed_weight(patcher, key, patch)
    return (after - before).double().square().sum().item()


def _squared_norm_of_product(up: Tensor, down: Tensor, alpha: float | None) -> float:
    """|alpha / rank up down|^2 = (alpha / rank)^2 tr((up^T up)(down down^T)), without forming the product."""
    up, down = up.flatten(1).double(), down.flatten(1).double()
    scale = 1.0 if alpha is None else alpha / down.shape[0]
    return scale**2 * ((up.t() @ up) * (down @ down.t())).sum().item()
