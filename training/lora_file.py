"""Adapter weights <-> a .safetensors file that every loader reads.

Keys are kohya's: `lora_unet_<layer with _ for .>.lora_down.weight`, `.lora_up.weight` and `.alpha`, so that
W' = W + alpha / rank * up @ down wherever the file is loaded. Other kinds have their tensors under the same layer names
(`.dora_scale`, `.hada_w1_a`, `.lokr_w1`, `.oft_blocks` and so on), as LyCORIS calls them and ComfyUI reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .config import LoraConfig
from .description import hashes
from .kinds import KINDS
from .whole_file import tensor_bytes, with_entries, write_atomically

LAYERS = "lora_"
"""What the name of every layer begins with, whatever network it is of."""
WHOLE = "dora_scale"
"""Always float32: each number is the length of a whole column of the weight, so rounding it in fp16 changes the weight
by a tenth of what the training did to it or more, and in bf16 by more than that. It takes next to no room."""


def file_tensors(state: dict[str, Tensor], config: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `Adapters.state` gave as the tensors of a file, every layer with the alpha that gives it its scale.

    Only what belongs to layers: whatever else was trained has another form. Alpha is always float32, since it is one
    number and need not be rounded.
    """
    kind, layers = KINDS[config.kind], {}
    for name, tensor in state.items():
        key, part = name.rsplit(".", 1)
        if key.startswith(LAYERS):
            layers.setdefault(key, {})[part] = tensor
    tensors: dict[str, Tensor] = {}
    for key, parts in layers.items():
        saved = kind.saved(parts)
        for name, tensor in saved.items():
            tensors[f"{key}.{name}"] = (tensor if name == WHOLE else tensor.to(dtype)).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(kind.alpha(parts, config))
    return tensors


def write(path: Path, tensors: dict[str, Tensor], entries: dict[str, str]) -> None:
    """Write the file whole or not at all; ValueError rather than a file with a value that is not finite."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"'{path.name}' was not written: '{broken[0]}' is not finite. Lower learning_rate and resume.")
    write_atomically(path, file_bytes(tensors, entries))


def file_bytes(tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> bytes:
    """The file, with the hashes of its tensors among what it says; equal tensors and entries give equal bytes."""
    data = tensor_bytes(tensors, entries)
    return with_entries(data, {**entries, **hashes(data)})
