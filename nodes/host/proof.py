"""A written LoRA file, read back the way ComfyUI's loaders read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import torch

from .loras import read_lora


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


def prove(model, path: Path) -> Proof:
    """Load the file through ComfyUI's key mapping; the effect is the Frobenius norm of all the changes together."""
    with torch.inference_mode():
        lora = read_lora(path)
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        patches = comfy.lora.load_lora(lora, keys)
        downs = [key for key in lora if key.endswith(".lora_down.weight")]
        effect = sum(_squared_norm(lora, key.removesuffix(".lora_down.weight")) for key in downs) ** 0.5
    return Proof(len(patches), len(downs), effect)


def _squared_norm(lora: dict[str, torch.Tensor], name: str) -> float:
    """|alpha / rank up down|^2 = (alpha / rank)^2 tr((up^T up)(down down^T)), without forming the product."""
    down, up = lora[f"{name}.lora_down.weight"].double(), lora[f"{name}.lora_up.weight"].double()
    scale = lora[f"{name}.alpha"].item() / down.shape[0]
    return scale**2 * ((up.t() @ up) * (down @ down.t())).sum().item()
