"""What a LoRA file holds, layer by layer: kinds, ranks, sizes of the changes, and what is wrong with it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..training.config import DORA, LORA
from ..training.embeddings import bundled_words, layers_only
from ..training.lora_family import family_of
from . import inspection_report
from .layer_names import form_of
from .layers import ALPHA, UNKNOWN, Layer, kind_of, layers_of
from .opening import LoraFile
from .places import Place, places_of

ENERGY = 0.9
"""The directions in use are the fewest that hold this share of a layer's squared norm."""
DEAD = 1e-7
"""A change below this share of the largest one's norm does nothing."""
LARGEST = 1 << 28
"""Entries of the largest matrix that is made of a file's; the largest weight of a known model has a third of it."""
PIECE = 1 << 20


@dataclass(frozen=True)
class Measured:
    """One layer. `norm` is the Frobenius norm of its change at strength 1, None where it depends on the model.

    Of a DoRA it is that of its product, before the magnitudes. `used` is how many directions hold 90 % of it.
    """

    name: str
    kind: str
    place: Place
    rank: int | None
    alpha: float | None
    norm: float | None
    used: int | None
    parameters: int
    finite: bool

    @property
    def dead(self) -> bool:
        """Whether it changes nothing at all."""
        return self.norm == 0.0


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of the whole file and of its tensors alone, in hexadecimal."""

    file: str
    tensors: str


@dataclass(frozen=True)
class Inspection:
    """All that can be found out from a LoRA file without a model."""

    name: str
    size: int
    entries: Mapping[str, str]
    layers: tuple[Measured, ...]
    broken: Mapping[str, int]
    """Tensor -> how many of its values are not finite."""
    unknown: tuple[str, ...]
    precisions: Mapping[str, int]
    """Precision -> how many bytes of the file are in it."""
    words: tuple[str, ...]
    form: str | None
    family: str | None
    """By the names of its layers."""
    said_family: str | None
    """By what the file says about itself."""
    hashes: Hashes

    def text(self) -> str:
        """The whole report."""
        return inspection_report.text(self)

    @cached_property
    def dead(self) -> list[Measured]:
        """The layers that change nothing, or next to nothing beside the others."""
        largest = max((layer.norm or 0.0 for layer in self.layers), default=0.0)
        return [layer for layer in self.layers if layer.norm is not None and layer.norm <= DEAD * largest]

    @cached_property
    def ranks(self) -> Counter[int]:
        """Rank -> how many layers have it."""
        return Counter(layer.rank for layer in self.layers if layer.rank)

    def norm(self, network: str | None = None) -> float:
        """The norm of all known changes together, or of those in one network."""
        return math.sqrt(sum(own.norm**2 for own in self.layers if own.norm and network in (None, own.place.network)))


def inspection(file: LoraFile) -> Inspection:
    """Look at every tensor of a file; OSError when it is gone by now."""
    layers = layers_of(file.tensors)
    places = places_of(layers)
    broken = {name: count for name, tensor in file.tensors.items() if (count := _not_finite(tensor))}
    return Inspection(
        name=file.path.name,
        size=file.path.stat().st_size,
        entries=file.entries,
        layers=tuple(_measured(layer, places[name]) for name, layer in layers.items() if layer.kind != UNKNOWN),
        broken=broken,
        unknown=tuple(name for name, layer in layers.items() if layer.kind == UNKNOWN),
        precisions=_precisions(file.tensors),
        words=tuple(bundled_words(file.tensors)),
        form=form_of(layers_only(file.tensors)),
        family=family_of(list(file.tensors)),
        said_family=family_of(file.entries),
        hashes=_hashes(file.path),
    )


def _measured(layer: Layer, place: Place) -> Measured:
    finite = not any(map(_not_finite, layer.parts.values()))
    try:
        norm, used = _size(_without_magnitude(layer)) if finite and _is_small(layer) else (None, None)
    except (RuntimeError, ValueError):  # parts that do not fit one another in ways that only multiplying shows
        norm, used = None, None
    if norm is not None and not math.isfinite(norm):
        norm, used = None, None
    alpha = layer.parts.get(ALPHA)
    return Measured(
        name=layer.name,
        kind=layer.kind,
        place=place,
        rank=layer.rank,
        alpha=float(alpha.float().item()) if alpha is not None and alpha.numel() == 1 else None,
        norm=norm,
        used=used,
        parameters=sum(tensor.numel() for part, tensor in layer.parts.items() if part != ALPHA),
        finite=finite,
    )


def _is_small(layer: Layer) -> bool:
    """Whether no product of its parts is larger than one of any real model; a small file can ask for a huge one."""
    sizes = [(layer.rank or 0) ** 2]
    for side in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2"):
        first, second = layer.parts.get(f"{side}_a"), layer.parts.get(f"{side}_b")
        if first is not None and second is not None:
            rank = max(len(second), 1)
            core = layer.parts.get(side.replace("w", "t"))
            sizes.append(
                first.numel() * second.numel() // rank**2 * (core.numel() // rank**2 if core is not None else 1)
            )
    return max(sizes) <= LARGEST


def _without_magnitude(layer: Layer) -> Layer:
    if layer.kind != DORA:
        return layer
    parts = {name: tensor for name, tensor in layer.parts.items() if name != "dora_scale"}
    return replace(layer, kind=kind_of(parts), parts=parts)


def _size(layer: Layer) -> tuple[float | None, int | None]:
    """The norm of a change, and for LoRAs how many directions hold most of it."""
    if layer.kind != LORA:
        return layer.norm(), None
    factors = layer.factors()
    squares = _squared_singular_values(factors.up.double(), factors.down.double())
    whole = squares.sum().item()
    if not whole:
        return 0.0, 0
    return math.sqrt(whole), int((squares.cumsum(0) < ENERGY * whole).sum()) + 1


def _squared_singular_values(up: Tensor, down: Tensor) -> Tensor:
    """Those of up down, descending: the eigenvalues of S (down down^T) S^T with S^T S = up^T up."""
    values, vectors = torch.linalg.eigh(up.t() @ up)
    root = values.clamp(min=0).sqrt()[:, None] * vectors.t()
    return torch.linalg.eigvalsh(root @ (down @ down.t()) @ root.t()).clamp(min=0).flip(0)


def _not_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point():
        return 0
    # A sum is not finite when a value is not; only then, or where it overflows, is every value asked.
    numbers = tensor.float() if tensor.dtype.itemsize < 4 else tensor
    return 0 if math.isfinite(numbers.sum().item()) else int((~torch.isfinite(numbers)).sum())


def _precisions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if not name.endswith(f".{ALPHA}"):
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.dtype.itemsize
    return dict(sizes.most_common())


def _hashes(path: Path) -> Hashes:
    with path.open("rb") as file:
        length = file.read(8)
        head = length + file.read(int.from_bytes(length, "little"))
        whole, tensors = hashlib.sha256(head), hashlib.sha256()
        while piece := file.read(PIECE):
            whole.update(piece)
            tensors.update(piece)
    return Hashes(whole.hexdigest(), tensors.hexdigest())
