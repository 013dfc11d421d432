"""Adapter weights <-> a .safetensors file that every loader reads.

Keys are kohya's: `lora_unet_<layer with _ for .>.lora_down.weight`, `.lora_up.weight` and `.alpha`, so that
W' = W + alpha / rank * up @ down wherever the file is loaded.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from .config import LoraConfig, TrainConfig
from .families import Family

PREFIX = "lora_unet_"
SENTENCE_WORDS = frozenset(
    ("a", "an", "the", "this", "that", "and", "or", "but", "while", "with", "without", "in", "on", "at", "of", "by")
    + ("for", "from", "to", "into", "over", "under", "near", "behind", "beside", "between", "against", "through")
)
"""No tag starts with one of these."""


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


def metadata(
    *,
    title: str,
    family: Family,
    prediction: str,
    lora: LoraConfig,
    config: TrainConfig,
    triggers: Mapping[str, int],
    resolution: int,
    captions: list[str],
    step: int,
) -> dict[str, str]:
    """What the file says about itself, in the words other tools look for; no times, so equal runs give equal files.

    `triggers` says how many pictures each trigger word calls.
    """
    entries = {
        "ss_output_name": title,
        "ss_base_model_version": family.base_model_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(float(lora.alpha or lora.rank)),
        "ss_network_args": json.dumps({"layers": lora.layers}),
        "ss_learning_rate": str(config.learning_rate),
        "ss_lr_scheduler": config.schedule,
        "ss_lr_warmup_steps": str(config.warmup),
        "ss_optimizer": "torch.optim.AdamW",
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_gradient_accumulation_steps": str(config.accumulation),
        "ss_max_grad_norm": str(config.clip_norm),
        "ss_max_train_steps": str(config.steps),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_num_train_images": str(len(captions)),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_tag_frequency": json.dumps({title: tag_frequency(captions, triggers)}, ensure_ascii=False),
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": "https://github.com/comfyanonymous/ComfyUI",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
    }
    if prediction != "flow":
        entries["modelspec.prediction_type"] = {"eps": "epsilon", "v": "v"}[prediction]
    if triggers:
        entries["modelspec.trigger_phrase"] = ", ".join(triggers)
    return entries


def tag_frequency(captions: list[str], triggers: Mapping[str, int]) -> dict[str, int]:
    """Trigger words and tags, with how many pictures each is said of. Sentences are the user's own and stay out."""
    counts = dict(triggers)
    for caption in captions:
        parts = dict.fromkeys(part.strip() for part in caption.split(","))
        tags = [part for part in parts if part and part not in triggers]
        if all(map(_is_tag, tags)):
            for tag in tags:
                counts[tag] = counts.get(tag, 0) + 1
    return counts


def _is_tag(part: str) -> bool:
    """Whether a part of a caption can be a tag of a list; one part that cannot makes the caption a sentence."""
    words = part.lower().split()
    return len(words) <= 3 and not part.endswith(".") and words[0] not in SENTENCE_WORDS


def write(path: Path, tensors: dict[str, Tensor], entries: dict[str, str]) -> None:
    """Write the file whole or not at all; ValueError rather than a file with a value that is not finite."""
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"'{path.name}' was not written: '{broken[0]}' is not finite. Lower learning_rate and resume.")
    write_atomically(path, _serialised(tensors, entries))


def _serialised(tensors: dict[str, Tensor], entries: dict[str, str]) -> bytes:
    """The bytes of the file, its metadata in order: the library's own order changes from one process to the next."""
    data = save(tensors)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | {"__metadata__": dict(sorted(entries.items()))}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def write_atomically(path: Path, data: bytes) -> None:
    """A temporary file beside the target, then a rename: nobody ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-", suffix=path.suffix)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes files only their owner can read; a LoRA is as readable as any other file in its folder.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
