"""A written LoRA file, read back the way ComfyUI's loaders read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter

from ...training.factors import Factors
from ...training.lora_file import LAYERS
from .loras import read_lora
from .patches import change_of, holder, key_map, magnitude_of, place_of, scale_of


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
        patches = comfy.lora.load_lora(lora, key_map(model, clip), log_missing=False)
        effect = effect_of(model, clip, patches)
    return Proof(len(patches), len({key.split(".")[0] for key in lora}), effect)


def effect_of(model, clip, patches: Mapping[object, object]) -> float:
    """The Frobenius norm of all that a loader's patches change together."""
    return sum(_squared_norm(model, clip, target, patch) for target, patch in patches.items()) ** 0.5


def _squared_norm(model, clip, target: object, patch: object) -> float:
    if isinstance(patch, LoRAAdapter) and magnitude_of(patch) is None and patch.weights[3] is None:
        up, down, alpha = patch.weights[:3]
        factors = Factors(up.flatten(1), down.flatten(1))
        return scale_of(alpha, len(down)) ** 2 * factors.squared_norm()
    key, place = place_of(target)
    change = change_of(holder(key, model, clip), key, [(patch, place)])
    # Added up on the CPU: Apple's and Intel's GPUs have no float64.
    return (change.flatten(1) if change.ndim > 1 else change).square().sum(-1).cpu().double().sum().item()
