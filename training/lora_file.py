"""Adapter weights <-> a .safetensors file that every loader reads.

Keys are kohya's: `lora_unet_<layer with _ for .>.lora_down.weight`, `.lora_up.weight` and `.alpha`, so that
W' = W + alpha / rank * up @ down wherever the file is loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .config import LoraConfig
from .description import hashes
from .whole_file import tensor_bytes, with_entries, write_atomically

PREFIX = "lora_unet_"


def kohya_keys(weights: dict[str, Tensor], config: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """`<layer>.down` and `<layer>.up` as kohya tensors, with the alpha that gives them their scale."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, part = name.rsplit(".", 1)
        key = PREFIX + layer.replace(".", "_")
        # Files hold up as (out, rank).
        tensors[f"{key}.lora_{part}.weight"] = (tensor.t() if part == "up" else tensor).to(dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(config.alpha or config.rank), dtype=dtype)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], entries: dict[str, str]) -> None:
    """Write the file whole or not at all; ValueError rather than a file with a value that is not finite."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"'{path.name}' was not written: '{broken[0]}' is not finite. Lower learning_rate and resume.")
    data = tensor_bytes(tensors, entries)
    write_atomically(path, with_entries(data, {**entries, **hashes(data)}))
