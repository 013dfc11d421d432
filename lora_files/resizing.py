"""A LoRA at another rank: each layer keeps the largest parts of its change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..training.config import DORA, LOHA, LOKR, LORA
from ..training.factors import Factors
from .layers import ALPHA, DOWN, MID, UP, Layer, layers_of, lora_tensors, split
from .low_rank import of_layer, share

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Resize:
    """The LoRA at its new size: `ranks` by layer, `kept` |what it changes| / |what it changed before|."""

    tensors: dict[str, Tensor]
    ranks: dict[str, int]
    kept: float
    notes: list[str]


def resized(
    tensors: Mapping[str, Tensor],
    rank: int = 0,
    energy: float = 1.0,
    ratio: float = 0.0,
    watch: Watch = lambda done, total: None,
) -> Resize:
    """Every LoRA, LoHa and LoKr of a file as a LoRA of the fewest parts that keep the share `energy` of it.

    None is smaller than the share `ratio` of the largest, and there are at most `rank` (0: any number). A LoRA that
    would not become smaller stays as it is, bit for bit, and so does whatever is of another kind. Names stay too.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        name, part = split(key)
        keys.setdefault(name, {})[part] = key
    layers = layers_of(tensors)
    written = {key: tensor for key, tensor in tensors.items() if split(key)[0] not in layers}
    ranks: dict[str, int] = {}
    kept = whole = 0.0
    untouched, magnitudes = 0, 0
    for done, (name, layer) in enumerate(layers.items(), 1):
        spectrum = of_layer(_without_magnitude(layer), rank)
        if spectrum is None:
            untouched += 1
            written |= {key: tensors[key] for key in keys[name].values()}
        else:
            magnitudes += layer.kind == DORA
            count = spectrum.count_for(rank, energy, ratio)
            if layer.kind in (LORA, DORA) and count >= layer.rank:
                count, part = layer.rank, spectrum.whole
                written |= {key: tensors[key] for key in keys[name].values()}
            else:
                part = spectrum.kept(count)
                written |= _smaller(layer, keys[name], spectrum.first(count), tensors)
            ranks[name] = count
            kept, whole = kept + part, whole + spectrum.whole
        watch(done, len(layers))
    if not ranks:
        raise ValueError("This file has no LoRA, LoHa or LoKr layer, so it has no rank: choose another file.")
    return Resize(written, ranks, share(kept, whole), _notes(layers, untouched, magnitudes))


def _without_magnitude(layer: Layer) -> Layer:
    """A DoRA of two matrices as the LoRA that they are without its magnitudes."""
    return replace(layer, kind=LORA) if layer.kind == DORA and {UP, DOWN} <= layer.parts.keys() else layer


def _smaller(
    layer: Layer, keys: Mapping[str, str], factors: Factors, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The layer with other matrices, under the names it has, and whatever else belongs to it."""
    if not factors.up.shape[1]:
        return {}
    new = lora_tensors("", factors.up, factors.down, factors.up.shape[1], _without_magnitude(layer).shape)
    named = {keys.get(part[1:], f"{layer.name}{part}"): tensor for part, tensor in new.items()}
    if layer.kind in (LORA, DORA) and ALPHA not in keys:
        del named[f"{layer.name}.{ALPHA}"]  # without one the scale is 1, which is what it says
    rest = {
        key: tensors[key] for part, key in keys.items() if part not in (UP, DOWN, MID, ALPHA) and not _lycoris(part)
    }
    return named | rest


def _lycoris(part: str) -> bool:
    return part.startswith(("hada_", "lokr_"))


def _notes(layers: Mapping[str, Layer], untouched: int, magnitudes: int) -> list[str]:
    notes = []
    if any(layer.kind in (LOHA, LOKR) for layer in layers.values()):
        notes.append("LoHa and LoKr layers became plain LoRAs, which need more room for the same effect.")
    if magnitudes:
        notes.append("Its DoRA magnitudes stay as they are; what is kept is said of its matrices.")
    if untouched:
        notes.append(f"{untouched} of {len(layers)} layers are of another kind and stay as they are.")
    return notes
