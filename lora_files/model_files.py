"""The weights of two model files by the names their layers have in a LoRA, read one at a time.

Checkpoints with text encoders are read as they are saved by Stability's code, kohya's scripts and ComfyUI, and files
of the diffusion model alone; .safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .extraction import Pair, Stored

WEIGHT = ".weight"
NETWORK = re.compile(r"^(?:model\.)?diffusion_model\.(.+)")
ENCODERS = (
    (re.compile(r"^cond_stage_model\.(?:clip_l\.)?transformer\.(text_model\..+)"), "lora_te_"),
    (re.compile(r"^conditioner\.embedders\.0\.transformer\.(text_model\..+)"), "lora_te1_"),
    (re.compile(r"^text_encoders\.clip_l\.transformer\.(text_model\..+)"), "lora_te1_"),
    (re.compile(r"^text_encoders\.clip_g\.transformer\.(text_model\..+)"), "lora_te2_"),
    (re.compile(r"^text_encoders\.t5xxl\.transformer\.(.+)"), "lora_te3_"),
)
CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$")
OPEN_CLIP = re.compile(r"^conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)\.(.+)")
OPEN_CLIP_PARTS = {
    "attn.out_proj.weight": ("self_attn_out_proj",),
    "mlp.c_fc.weight": ("mlp_fc1",),
    "mlp.c_proj.weight": ("mlp_fc2",),
    "attn.in_proj_weight": ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj"),
}
"""Layers of SDXL's second text encoder by the names of OpenCLIP, which keeps queries, keys and values as one."""
BARE = re.compile(r"^(transformer_blocks|single_transformer_blocks)\.")
SCALES = ("scale_weight", "weight_scale")
SCALED = {"float8_e4m3fn", "float8_e5m2"}
Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a layer's weight is: a tensor, or one of `parts` equal pieces of its rows; `name` "" if no layer's."""

    key: str
    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class ModelFile:
    """An open model file and what it holds."""

    tensors: safe_open
    keys: frozenset[str]
    places: dict[str, Place]

    def read(self, name: str) -> tuple[Tensor, Stored]:
        """One weight in float32, and how it is stored; ValueError for what takes more than a scale to read."""
        place = self.places[name]
        layer = place.key.removesuffix(WEIGHT)
        tensor = self.tensors.get_tensor(place.key)
        if not tensor.is_floating_point() or self._packed(layer):
            raise ValueError(
                f"'{place.key}' is stored in a form whose numbers cannot be read here: load both models with ComfyUI's "
                "loaders and connect them to model and model_base."
            )
        stored = Stored.of(tensor.dtype)
        tensor = tensor.chunk(place.parts)[place.part] if place.parts > 1 else tensor
        weight = tensor.to(torch.float32, copy=True)
        for scale in SCALES:
            if f"{layer}.{scale}" in self.keys:
                weight *= self.tensors.get_tensor(f"{layer}.{scale}").float()
        return weight, stored

    def _packed(self, layer: str) -> bool:
        """Whether ComfyUI's note beside a layer says that it is stored as more than scaled 8-bit floats."""
        if f"{layer}.comfy_quant" not in self.keys:
            return False
        try:
            told = json.loads(bytes(self.tensors.get_tensor(f"{layer}.comfy_quant").tolist()))
        except ValueError:
            return True
        return not isinstance(told, dict) or told.get("format") not in SCALED


def file_pairs(path: Path, base: Path, watch: Watch) -> Iterator[Pair]:
    """Every weight that both files have; ValueError for files that cannot be read or share nothing."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(_opened(place)) for place in (path, base))
        shared = [name for name in one.places if name in other.places]
        if not shared:
            raise ValueError(
                f"'{path.name}' and '{base.name}' have no layer in common: choose a model and the one it was made from."
            )
        for done, name in enumerate(shared, 1):
            watch(done, len(shared))
            (weight, stored), (before, its) = one.read(name), other.read(name)
            coarser = max(stored, its, key=lambda kind: kind.eps)
            pair = Pair(one.places[name].name, weight, before, coarser)
            del weight, before
            yield pair
            del pair


def places_of(keys: list[str]) -> dict[str, Place]:
    """What each tensor of a model file is in a LoRA, by names that are the same in all files of a family.

    What belongs to no network, such as a VAE, is left out.
    """
    bare = not any(NETWORK.match(key) for key in keys)
    places: dict[str, Place] = {}
    for key in keys:
        for named, place in _places(key, bare):
            places[named] = place
    return places


def _places(key: str, bare: bool) -> Iterator[tuple[str, Place]]:
    if key.rpartition(".")[2] in (*SCALES, "comfy_quant", "input_scale", "scaled_fp8"):
        return
    if found := OPEN_CLIP.match(key):
        names = OPEN_CLIP_PARTS.get(found[2], ())
        for part, end in enumerate(names):
            name = f"lora_te2_text_model_encoder_layers_{found[1]}_{end}"
            yield name, Place(key, name, part, len(names))
        if not names:
            yield f"lora_te2 {found[1]} {found[2]}", Place(key, "")
        return
    for pattern, prefix in ENCODERS:
        if found := pattern.match(key):
            layer = found[1].removesuffix(WEIGHT)
            known = layer != found[1] and (prefix == "lora_te3_" or CLIP_LAYER.match(layer))
            name = prefix + layer.replace(".", "_") if known else ""
            yield name or prefix + found[1], Place(key, name)
            return
    found = NETWORK.match(key)
    if found or bare:
        rest = found[1] if found else key
        prefix = "lora_transformer_" if BARE.match(rest) else "lora_unet_"
        name = prefix + rest.removesuffix(WEIGHT).replace(".", "_") if rest.endswith(WEIGHT) else ""
        yield name or prefix + rest, Place(key, name)


@contextmanager
def _opened(path: Path) -> Iterator[ModelFile]:
    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The model file '{path.name}' cannot be read ({error}): choose another file.") from error
    with file as tensors:
        keys = list(tensors.keys())
        yield ModelFile(tensors, frozenset(keys), places_of(keys))
