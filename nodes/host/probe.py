"""A MODEL that is asked and never trained, and what a LoRA file would change about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor

from ...training.embeddings import layers_only
from .model import LoadedModel
from .patches import depends_on_weight, key_map
from .proof import effect_of


class Probe(LoadedModel):
    """The network of a MODEL with all that is patched onto it, as the training loop asks it, but without autograd."""

    def __init__(self, model) -> None:
        super().__init__(model)
        self.samples = 0
        """How many noisy pictures went through the network."""

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Nothing is adapted here: the weights answer as ComfyUI loads them."""
        with self.base():
            yield

    def load_for(self, shape: Sequence[int]) -> None:
        """Have ComfyUI load the MODEL beside the room that noisy latents of this shape (B, C, h, w) take."""
        self._room = self.patcher.memory_required(list(shape))
        self.load()

    def __call__(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        self.samples += len(sigma)
        return super().__call__(noisy, sigma, text, size)


def checked(probe: Probe, clip, lora: Mapping[str, Tensor]) -> tuple[str, float | None]:
    """Why a LoRA cannot be used on a MODEL, in a few words or "", and the Frobenius norm of all that it changes."""
    broken = [name for name, tensor in lora.items() if not _is_finite(tensor)]
    if broken:
        return f"it holds values that are not numbers, such as in '{broken[0]}'", None
    with torch.inference_mode():
        keys = key_map(probe.patcher, clip)
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(layers_only(lora)), keys, log_missing=False)
        if not patches:
            return "none of its layers fits this model", None
        if any(depends_on_weight(patch) for patch in patches.values()):
            # What another LoRA left in the weights is no part of them.
            probe.load()
        effect = effect_of(probe.patcher, clip, patches)
    return ("" if effect > 0 else "it has learned nothing: it changes no weight", effect)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())
