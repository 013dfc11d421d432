"""The HTTP route of the LoRA Stack Apply panel: what a LoRA file says about itself, without reading its tensors."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import folder_paths
import torch
from aiohttp import web

from ...lora_files.layers import layers_of
from ...lora_files.opening import SUFFIXES, header_of
from ...training.description import COVERS, recommended, trigger_words
from ...training.lora_family import family_of
from ..lora_names import found, missing
from . import folders
from .requests import LONGEST_NAME, Refusal, answering, off_the_loop

ADDRESS = "/lora_workbench/loras/about"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".preview.png", ".preview.jpg", ".preview.jpeg", ".preview.webp")


def register(routes: web.RouteTableDef) -> None:
    """Add the route to the server's.

    GET /lora_workbench/loras/about?name=people/a.safetensors answers {"name", "family", "rank", "triggers", "strength",
    "size", "preview", "error"}: the name as the list of LoRAs has it, also when the file was moved; null for what the
    file does not say; bytes; an address for a picture; and why it cannot be read. 404 when there is no such file.
    """
    answers = answering("LoRA files can be asked about")
    routes.get(ADDRESS)(answers(_about))


async def _about(request: web.Request) -> web.Response:
    name = request.query.get("name", "")
    if not 0 < len(name) <= LONGEST_NAME:
        raise Refusal(400, f"name must be the name of a LoRA file, of at most {LONGEST_NAME} characters.")
    return web.json_response(await off_the_loop(about, name))


def about(name: str) -> dict[str, Any]:
    """What the panel shows of a file; Refusal when there is none of that name."""
    try:
        file = found(name, folders.lora_names())
        path = folders.lora_path(file.name) if file.name else None
    except ValueError as error:
        raise Refusal(404, str(error)) from None
    if path is None or not path.is_file():
        raise Refusal(404, file.note or missing(name, ()))
    facts = path.stat()
    told = dict(_told(path, facts.st_mtime_ns, facts.st_size))
    preview = _preview(path, told.pop("cover"))
    return {"name": file.name, **told, "size": facts.st_size, "preview": preview}


@lru_cache(maxsize=512)
def _told(path: Path, _time: int, _size: int) -> dict[str, Any]:
    """What the header says; read once as long as the file does not change."""
    nothing = {"family": None, "rank": None, "triggers": [], "strength": None, "cover": False, "error": ""}
    if path.suffix.lower() not in SUFFIXES:
        return nothing
    try:
        shapes, entries = header_of(path)
    except ValueError as error:
        return {**nothing, "error": str(error)}
    # Without their values tensors are enough to tell ranks.
    layers = layers_of({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    ranks = Counter(layer.rank for layer in layers.values() if layer.rank)
    return {
        "family": family_of(entries) or family_of(shapes),
        "rank": ranks.most_common(1)[0][0] if ranks else None,
        "triggers": trigger_words(entries),
        "strength": recommended(entries),
        "cover": COVERS in entries,
        "error": "",
    }


def _preview(path: Path, has_cover: bool) -> str | None:
    """The address at which ComfyUI serves a picture of the LoRA, if it has one beside it or in it."""
    if not has_cover and not any(path.with_name(path.stem + ending).is_file() for ending in PICTURES):
        return None
    for number, folder in enumerate(folder_paths.get_folder_paths("loras")):
        if path.is_relative_to(folder):
            return f"/experiment/models/preview/loras/{number}/{quote(path.relative_to(folder).as_posix())}"
    return None
