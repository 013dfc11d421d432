"""What two loaded models differ in, weight by weight, under the names that LoRA loaders know the weights by."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath

import comfy.lora
import comfy.model_management as mm
import folder_paths
import torch
from torch import Tensor

from ...lora_files.extraction import Pair, Stored
from .weights import QUANTISED

FOLDERS, SUFFIXES = ("checkpoints", "diffusion_models"), (".safetensors", ".sft")
WEIGHT, NETWORK = ".weight", "diffusion_model."
COPIES = 12
"""So many float32 copies of the largest weight have room at once while it is taken apart."""
PACKED = {"NVFP4": Stored("nvfp4", 0.45), "INT8": Stored("int8", 0.045)}
Watch = Callable[[int, int], None]


def model_pairs(model, base, watch: Watch) -> Iterator[Pair]:
    """Every weight that two MODELs both have, one at a time."""
    yield from _pairs(model, base, NETWORK, network_names(base), watch)


def clip_pairs(clip, base, watch: Watch) -> Iterator[Pair]:
    """Every weight that two CLIPs both have, one at a time."""
    yield from _pairs(clip.patcher, base.patcher, "", text_names(base), watch)


def network_names(model) -> dict[str, str]:
    """A weight's key -> its layer's name in a LoRA file, in kohya's words."""
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    named = {key: f"lora_unet_{_plain(key, NETWORK)}" for key in known.values() if isinstance(key, str)}
    return {key: name for key, name in named.items() if known.get(name) == key}


def text_names(clip) -> dict[str, str]:
    """The same for text encoders: `lora_te1_` and so on, `lora_te_` for an only one, else as ComfyUI calls it."""
    named: dict[str, list[str]] = {}
    for name, key in comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items():
        named.setdefault(key, []).append(name)
    several = len({key.split(".")[0] for key in named}) > 1
    return {key: min(names, key=lambda name: _preference(name, several)) for key, names in named.items()}


def _preference(name: str, several: bool) -> tuple[int, int]:
    """Lowest for the name by which kohya's scripts call it: T5 is lora_te3 there, which OneTrainer calls lora_te2."""
    found = re.match(r"lora_te(\d*)_", name)
    if not found:
        return 2, 0
    number = int(found[1] or 0)
    return int((number > 0) != several), -number


def _plain(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).removesuffix(WEIGHT).replace(".", "_")


def _pairs(model, base, prefix: str, names: dict[str, str], watch: Watch) -> Iterator[Pair]:
    ours, theirs = _entries(model, prefix), _entries(base, prefix)
    keys = [key for key in ours if key in theirs]
    if not keys:
        raise ValueError("The two models share no layer: choose a model and the one it was made from.")
    device = _device(base, theirs)
    for done, key in enumerate(keys, 1):
        watch(done, len(keys))
        before, after = theirs[key], ours[key]
        shared = _is_same(before[0], after[0])
        if shared and len(before) == len(after) == 1:
            continue
        stored = Stored.of(torch.float32) if shared else max(map(_stored, (before, after)), key=lambda kind: kind.eps)
        with torch.inference_mode():
            pair = Pair(names.get(key, ""), _weight(after, key, device), _weight(before, key, device), stored)
        yield pair
        del pair


def _entries(patcher, prefix: str) -> dict[str, list]:
    """Each parameter's key -> the tensor that is stored and what is patched onto it, as ComfyUI's own merging has it.

    ComfyUI's `get_key_patches` gives the same, but fails on quantised models. A loaded model may have been patched in
    place; then what it was before lies in its backup.
    """
    entries = {}
    for key, weight in patcher.model.named_parameters():
        if key.startswith(prefix):
            if (kept := patcher.backup.get(key)) is not None:
                weight = kept.weight
            entries[key] = [weight, *patcher.patches.get(key, ())]
    return entries


def _device(patcher, entries: dict[str, list]) -> torch.device:
    """Where to compute: the GPU, with room made for the largest weight, or else the CPU."""
    device = patcher.load_device
    if device.type != "cuda":  # others lack float64
        return torch.device("cpu")
    largest = max(entry[0].numel() for entry in entries.values())
    mm.free_memory(COPIES * 4 * largest, device)
    return device


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two models share a weight; a quantised one shares it only as the same object."""
    if one is other or isinstance(one, QUANTISED) or isinstance(other, QUANTISED):
        return one is other
    return one.dtype == other.dtype and one.shape == other.shape and one.data_ptr() == other.data_ptr() != 0


def _stored(entry: list) -> Stored:
    """How a weight is stored; for quantised ones the step that rounds as much as theirs was measured to."""
    weight = entry[0]
    data = getattr(weight, "_qdata", weight)
    if data.is_floating_point():
        return Stored.of(data.dtype)
    layout = str(getattr(weight, "_layout_cls", ""))
    return next((stored for name, stored in PACKED.items() if name in layout), Stored("a few bits", 0.45))


def _weight(entry: list, key: str, device: torch.device) -> Tensor:
    """The weight in float32 with all its patches, as they would be put on in full precision."""
    weight, *patches = entry
    weight = weight.dequantize() if isinstance(weight, QUANTISED) else weight
    if not weight.is_floating_point():
        raise ValueError(
            f"'{key}' is stored in a form whose numbers cannot be read here: load both models from .safetensors files."
        )
    weight = weight.to(device, torch.float32, copy=True)
    return comfy.lora.calculate_weight(patches, weight, key) if patches else weight


def model_file_names() -> list[str]:
    """The model files there are, with the folder each is in before its name."""
    return [
        f"{folder}/{name}"
        for folder in FOLDERS
        for name in folder_paths.get_filename_list(folder)
        if name.lower().endswith(SUFFIXES)
    ]


def model_file_path(name: str) -> Path:
    """The model file of that name, as `model_file_names` gives it; ValueError when there is none in these folders."""
    folder, _, rest = name.replace("\\", "/").partition("/")
    path = PureWindowsPath(rest)
    inside = folder in FOLDERS and not path.anchor and ".." not in path.parts and "\0" not in rest
    found = inside and rest.lower().endswith(SUFFIXES) and folder_paths.get_full_path(folder, os.path.join(*path.parts))
    if not found:
        raise ValueError(
            f"The model file '{name}' is not in the checkpoints or diffusion_models folder. Put the file back, or "
            "choose another one."
        )
    return Path(found)
