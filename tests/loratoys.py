"""LoRAs with random values for whole toy models, and what they do to the weights once ComfyUI has loaded them."""

from __future__ import annotations

import re

import comfy.model_management as mm
import torch
from torch import Tensor

from lora_workbench.nodes.host.extraction import network_names, text_names


def lora(model=None, clip=None, *, rank: int = 3, alpha: float | None = None, size: float = 0.1, seed: int = 0):
    """A LoRA in kohya's names for the layers of a MODEL and a CLIP, each `size` times as large as its weight."""
    tensors: dict[str, Tensor] = {}
    if model is not None:
        tensors |= of_weights(model.model.state_dict(), network_names(model), rank, alpha, size, seed)
    if clip is not None:
        trained = re.compile(r"lora_te\d?_.*(_proj|fc[12]|Attention_[qkvo]|_w[io](_\d)?)$")
        names = {key: name for key, name in text_names(clip).items() if trained.match(name) and "layer" in name}
        tensors |= of_weights(clip.cond_stage_model.state_dict(), names, rank, alpha, size, seed + 1000)
    return tensors


def of_weights(weights, names: dict[str, str], rank: int, alpha: float | None, size: float, seed: int):
    """The same for some weights by key, with the names of their layers."""
    made, tensors = torch.Generator().manual_seed(seed), {}
    for key, name in names.items():
        weight = weights[key]
        if weight.ndim < 2:
            continue
        up = torch.randn(len(weight), rank, generator=made)
        down = torch.randn(rank, weight[0].numel(), generator=made)
        scale = 1.0 if alpha is None else alpha / rank
        up *= size * weight.float().norm() / (up @ down).norm() / scale
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
        tensors[f"{name}.lora_down.weight"] = down.reshape(rank, *weight.shape[1:])
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def weights(patcher) -> dict[str, Tensor]:
    """All weights as they are once ComfyUI has loaded the model with its patches."""
    with torch.inference_mode():
        mm.load_models_gpu([patcher], force_patch_weights=True)
        return {name: weight.clone() for name, weight in patcher.model.state_dict().items()}


def distance(patcher, other) -> float:
    """The Frobenius norm of the difference between the weights of two patched models."""
    one, two = weights(patcher), weights(other)
    return sum((one[name].double() - two[name].double()).square().sum().item() for name in one) ** 0.5


def apart(patcher, other, bare) -> float:
    """How far two patched models are from each other, relative to how far the second is from the bare one."""
    change = distance(other, bare)
    assert change > 0
    return distance(patcher, other) / change
