"""LoRA files from one form of names into another: kohya's, diffusers' and ComfyUI's, for SDXL, SD 1.5 and FLUX.

Nothing is rounded or left out: what is renamed are the same tensors, and fused layers come back to the last bit. What a
form has no name for is refused.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..training.config import LOHA, LOKR, LORA, OFT
from ..training.embeddings import BUNDLED
from ..training.lora_family import family_of, title
from . import flux_names
from .fused import Parts, fused, in_pieces
from .layer_names import COMFYUI, DIFFUSERS, KOHYA, MODEL, Address, Names, end_of, form_of, names_of
from .layers import ALPHA, DOWN, MID, UNKNOWN, UP, Layer, kind_of, layers_of

__all__ = ["COMFYUI", "DIFFUSERS", "FOLD", "KEEP", "KOHYA", "converted", "form_of"]

Made = TypeVar("Made")
KEEP, FOLD = "keep", "fold"
FAMILIES = {"sdxl", "sd1", "flux", "chroma", None}
"""Whose layers have names here; None where the names of a file leave its family open."""


def converted(tensors: Mapping[str, Tensor], form: str, alpha: str = KEEP) -> dict[str, Tensor]:
    """The tensors of a LoRA file under the names of `form`; with alpha "fold" multiplied in and gone.

    ValueError naming layers that have no name there, or that a fused layer cannot be made of.
    """
    family = family_of(tensors)
    if family not in FAMILIES:
        raise ValueError(f"The names of {title(family)} layers are not known here: choose a LoRA for SDXL or FLUX.")
    layers = layers_of(tensors)
    if alpha == FOLD:
        layers = {name: _folded(layer) for name, layer in layers.items()}
    names = names_of(layers)
    _check_known(names)
    result: dict[str, Tensor] = {}
    for new, parts in _renamed(layers, names, form):
        for part, tensor in parts.items():
            key = new + end_of(new, part)
            if key in result:
                raise ValueError(f"Two layers of the file are both called '{new}' in the form '{form}': remove one.")
            result[key] = tensor
    return result | {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLED)}


def _check_known(names: Names) -> None:
    unknown = [name for name, address in names.addresses.items() if address is None]
    if unknown:
        raise ValueError(
            f"{_listed(unknown)}: no such layer of SDXL, SD 1.5 or FLUX is known, so the file was not converted."
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + more


def _renamed(layers: Mapping[str, Layer], names: Names, form: str) -> Iterable[tuple[str, Parts]]:
    """Every layer's new name and its tensors, in the order of the file."""
    groups: dict[Address, dict[int | None, str]] = defaultdict(dict)
    for name, address in names.addresses.items():
        if address.piece in groups[whole := Address(address.network, address.path)]:
            raise ValueError(f"'{name}' and '{groups[whole][address.piece]}' are the same layer: remove one.")
        groups[whole][address.piece] = name
    for address, members in groups.items():
        called = names.called(address, form)
        if not called:
            raise ValueError(f"{_listed(members.values())}: this layer has no name in the form '{form}'.")
        if None in members and len(members) > 1:
            raise ValueError(f"{_listed(members.values())} are the same layer: remove one.")
        yield from _moved({piece: layers[name] for piece, name in members.items()}, address, called, form)


def _moved(
    members: Mapping[int | None, Layer], address: Address, called: tuple[str, ...], form: str
) -> Iterable[tuple[str, Parts]]:
    """The layers at one address under the names it has in a form, taken apart or put together where needed."""
    for layer in members.values():
        _check_form(layer, form)
    if None not in members and form == DIFFUSERS:
        yield from ((called[piece], layer.parts) for piece, layer in members.items())
    elif None not in members:
        pieces = {piece: _plain_parts(layer) for piece, layer in members.items()}
        yield called[0], _naming(members, fused, pieces, len(flux_names.to_diffusers(address.path)))
    elif len(called) > 1:
        taken = _naming(members, in_pieces, _plain_parts(members[None]), len(called))
        yield from ((called[piece], parts) for piece, parts in taken.items())
    elif address == Address(MODEL, flux_names.SWAPPED) and ("norm_out" in members[None].name) != (form == DIFFUSERS):
        yield called[0], _naming(members, _swapped, _plain_parts(members[None]))
    else:
        yield called[0], members[None].parts


def _check_form(layer: Layer, form: str) -> None:
    """ValueError for what makes no layer, and for tensors that nobody finds by the names of that form."""
    if layer.kind == UNKNOWN or "lora_up.bias" in layer.parts:
        raise ValueError(
            f"'{layer.name}' holds {_listed(layer.parts)}, which make no LoRA layer that can be renamed: train or "
            "download the file again."
        )
    if form == DIFFUSERS and MID in layer.parts:
        raise ValueError(f"'{layer.name}' has a core tensor, for which diffusers has no name: choose 'comfyui'.")


def _plain_parts(layer: Layer) -> Parts:
    if layer.kind != LORA or not layer.parts.keys() <= {UP, DOWN, ALPHA} or layer.parts[UP].ndim != 2:
        raise ValueError(
            f"'{layer.name}' is {layer.kind}, and this form has its layer fused or in pieces: only plain LoRA layers "
            "can be taken apart and put together."
        )
    return layer.parts


def _naming(members: Mapping[int | None, Layer], change: Callable[..., Made], *given: object) -> Made:
    try:
        return change(*given)
    except ValueError as error:
        raise ValueError(
            f"{_listed(layer.name for layer in members.values())} cannot be converted: {error}."
        ) from error


def _swapped(parts: Parts) -> Parts:
    """The two halves of the rows in the other order."""
    if len(parts[UP]) % 2:
        raise ValueError(f"its {len(parts[UP])} rows have no two halves")
    first, second = parts[UP].chunk(2)
    return {**parts, UP: torch.cat([second, first])}


def _folded(layer: Layer) -> Layer:
    """The layer without alpha, its scale multiplied into its factors: powers of two into both, the rest into one.

    An OFT's alpha is a limit and stays. Small numbers stay as far from fp16's smallest as they were.
    """
    if ALPHA not in layer.parts or layer.kind == OFT:
        return layer
    parts = {part: tensor for part, tensor in layer.parts.items() if part != ALPHA}
    first, second = FACTORS.get(_network(layer), (None, None))
    if first is not None and (scale := layer.scale) != 1.0:
        first, second = (name if name in parts else f"{name}_a" for name in (first, second))
        half = 2.0 ** (math.frexp(abs(scale))[1] // 2) if scale else 1.0
        parts[first], parts[second] = _times(parts[first], scale / half), _times(parts[second], half)
    return replace(layer, parts=parts)


FACTORS = {LORA: (UP, DOWN), LOHA: ("hada_w1_a", "hada_w2_a"), LOKR: ("lokr_w1", "lokr_w2")}


def _network(layer: Layer) -> str:
    """The kind of a layer, and under a DoRA's magnitude the one it stands on."""
    return kind_of({part: tensor for part, tensor in layer.parts.items() if part != "dora_scale"})


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.float() * factor).to(tensor.dtype)
