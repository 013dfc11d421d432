"""Several LoRAs as one.

Each file changes a weight W by s_i D_i, s_i its weight in the merge. What becomes of these changes:

    concatenate   the sum of all, exactly: up and down matrices side by side
    svd           the sum, cut to a rank
    ties          what of each is large and agrees in sign with the others (Yadav et al. 2023), cut to a rank
    dare          the sum of each after a random part was left out (Yu et al. 2024), cut to a rank

One layer is worked on at a time and stored before the next, so float32 is never there for a whole file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..training.config import DORA, LOHA, LOKR, LORA, OFT
from ..training.embeddings import BUNDLED
from ..training.factors import Factors
from ..training.noise import generator
from .forms import KOHYA, converted, form_of
from .layer_names import names_of
from .layers import ALPHA, DIFFERENCE, DOWN, MID, TEXT_ENCODERS, TITLES, UP, Layer, layers_of, lora_tensors, split
from .low_rank import of_change, of_factors, share
from .sparse import dare, ties

CONCATENATE, SVD, TIES, DARE = METHODS = ("concatenate", "svd", "ties", "dare")
USUAL_RANK = 32
"""The rank where none is asked for and no file has one (a LoKr may have none)."""
BIASES = {"diff_b", "b_norm"}
UNDERSTOOD = {UP, DOWN, MID, ALPHA, *BIASES}
"""All that may lie beside a plain LoRA without changing what it means."""

Watch = Callable[[int, int], None]
Store = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """A LoRA on its way into a merge: what to call it, its tensors, and its weights in model and text encoders."""

    name: str
    tensors: Mapping[str, Tensor]
    model: float = 1.0
    text: float = 1.0

    def weight(self, layer: str) -> float:
        """How strongly this layer counts."""
        return self.text if layer.startswith(TEXT_ENCODERS) else self.model


@dataclass(frozen=True)
class Merge:
    """One LoRA; `kept` is |what it changes| / |what was to be kept of all|, 1.0 when nothing was cut."""

    tensors: dict[str, Tensor]
    kept: float
    notes: list[str]


@dataclass(frozen=True)
class Piece:
    """One file's part in a layer."""

    weight: float
    layer: Layer
    source: Source
    number: int


@dataclass
class _Tally:
    """What was cut, added up over the layers, in squared norms."""

    kept: float = 0.0
    whole: float = 0.0
    dense: set[str] = field(default_factory=set)
    added: int = 0


def merged(
    sources: Sequence[Source],
    method: str,
    rank: int = 0,
    density: float = 0.5,
    seed: int = 0,
    watch: Watch = lambda done, total: None,
    store: Store = lambda name, tensor: tensor,
) -> Merge:
    """The LoRAs as one, layers of the same name together; `rank` 0 is the highest of the files in each layer.

    `density` is the share of the entries that ties and dare keep of each file, `seed` chooses them for dare. `watch`
    is called after every layer, `store` makes of each new tensor what is kept of it. ValueError for what cannot be
    merged, naming layer and file.
    """
    layers = _gathered(in_one_form([source for source in sources if source.model or source.text]))
    tensors: dict[str, Tensor] = {}
    tally = _Tally()
    for done, (name, pieces) in enumerate(layers.items(), 1):
        made = _biases(name, pieces)
        pieces = [piece for piece in pieces if piece.layer.shape]  # one that only changes a bias has none
        if pieces:
            made |= _weight(name, pieces, method, rank, density, seed, tally)
        tensors |= {key: store(key, tensor) for key, tensor in made.items()}
        watch(done, len(layers))
    if not tensors:
        raise ValueError("Nothing is left of these LoRAs: choose files with layers, at weights other than 0.")
    words, left_out = _embeddings(sources)
    return Merge(tensors | words, share(tally.kept, tally.whole), [*_notes(tally), *left_out])


def in_one_form(sources: Sequence[Source]) -> list[Source]:
    """The same LoRAs under kohya's names, by which layers find one another; layers without such a name keep theirs.

    Where a file cannot be renamed, files that share a form stay as they are; ValueError when they do not.
    """
    try:
        return [replace(source, tensors=_renamed(source.tensors)) for source in sources]
    except ValueError as error:
        if len({form_of(source.tensors) for source in sources}) > 1:
            raise ValueError(
                f"These LoRAs name their layers in different ways, so they cannot be merged. {error}"
            ) from error
        return list(sources)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    addresses = names_of(layers_of(tensors)).addresses
    named = {key: tensor for key, tensor in tensors.items() if addresses.get(split(key)[0])}
    others = {key: tensor for key, tensor in tensors.items() if key not in named}
    return converted(named, KOHYA) | others


def _weight(
    name: str, pieces: Sequence[Piece], method: str, rank: int, density: float, seed: int, tally: _Tally
) -> dict[str, Tensor]:
    """What all files together change about the weight of a layer."""
    shape = _shape(name, pieces)
    if any(piece.layer.kind == DIFFERENCE for piece in pieces):
        tally.added += 1
        return _added(name, pieces, shape)
    if method == CONCATENATE:
        return _stacked(name, pieces, shape)
    return _cut(name, pieces, shape, _combined(pieces, method, density, seed, tally), rank, tally)


def _gathered(sources: Sequence[Source]) -> dict[str, list[Piece]]:
    """The pieces of every layer that count, in the order of the files."""
    gathered: dict[str, list[Piece]] = {}
    for number, source in enumerate(sources):
        for name, layer in layers_of(source.tensors).items():
            if weight := source.weight(name):
                _check(layer, source)
                gathered.setdefault(name, []).append(Piece(weight, layer, source, number))
    return gathered


def _check(layer: Layer, source: Source) -> None:
    """ValueError for a layer whose change cannot be merged."""
    if layer.kind in (DORA, OFT):
        raise ValueError(
            f"'{source.name}' is a LoRA of the kind {TITLES[layer.kind]}, whose change depends on the model it is put "
            "on, so it cannot be merged: put it on the model with LoRA Stack Apply and take it from there as a plain "
            "LoRA with Extract LoRA."
        )
    strange = layer.parts.keys() - UNDERSTOOD if layer.kind == LORA else ()
    if layer.kind not in (LORA, LOHA, LOKR, DIFFERENCE) or strange:
        told = f" ({', '.join(sorted(strange))})" if any(strange) else ""
        raise ValueError(
            f"Layer '{layer.name}' of '{source.name}' is of a kind that cannot be merged{told}: leave this file out."
        )


def _shape(name: str, pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The shape of the weight, told best by the file that knows it as a convolution; ValueError when they differ."""
    shapes = [piece.layer.shape for piece in pieces]
    sizes = {(shape[0], torch.Size(shape[1:]).numel()) for shape in shapes}
    if len(sizes) > 1:
        raise ValueError(
            f"'{pieces[0].source.name}' and '{pieces[-1].source.name}' change layers '{name}' of different sizes, so "
            "they are for different models: merge LoRAs of one family."
        )
    return max(shapes, key=len)


# What the files add up to


def _stacked(name: str, pieces: Sequence[Piece], shape: Sequence[int]) -> dict[str, Tensor]:
    """Up and down matrices side by side. What has the largest scale stays as it is, bit for bit."""
    ups, downs, scales = [], [], []
    for piece in pieces:
        if piece.layer.kind != LORA:
            raise ValueError(
                f"'{piece.source.name}' is a {TITLES[piece.layer.kind]}, which has no matrices to put side by side: "
                "set method to svd."
            )
        ups.append(piece.layer.parts[UP].flatten(1).float())
        downs.append(piece.layer.factors().down)
        scales.append(piece.weight * piece.layer.scale)
    top = max(map(abs, scales)) or 1.0
    up = torch.cat([up if scale == top else up * (scale / top) for up, scale in zip(ups, scales, strict=True)], 1)
    return lora_tensors(name, up, torch.cat(downs), top * up.shape[1], shape)


def _combined(pieces: Sequence[Piece], method: str, density: float, seed: int, tally: _Tally) -> Tensor | Factors:
    """What is to be kept of a layer: the change (out, in h w), or its factors where the sum has some."""
    if method == SVD and all(piece.layer.kind == LORA for piece in pieces):
        total, *others = (_weighted(piece) for piece in pieces)
        for other in others:
            total = total.plus(other)
        return total
    tally.dense |= {piece.source.name for piece in pieces if piece.layer.kind != LORA}
    changes = (piece.weight * piece.layer.change() for piece in pieces)
    if method == TIES:
        return ties(list(changes), density)
    if method == DARE:
        purposes = (f"dare {piece.number} {piece.layer.name}" for piece in pieces)
        changes = (
            dare(change, density, generator(seed, purpose, 0))
            for change, purpose in zip(changes, purposes, strict=True)
        )
    total = next(changes)
    for change in changes:
        total += change
    return total


def _weighted(piece: Piece) -> Factors:
    factors = piece.layer.factors()
    return Factors(piece.weight * factors.up, factors.down)


# What is written


def _cut(
    name: str,
    pieces: Sequence[Piece],
    shape: Sequence[int],
    change: Tensor | Factors,
    rank: int,
    tally: _Tally,
) -> dict[str, Tensor]:
    """The nearest LoRA of a change at the rank; nothing for a change of nothing."""
    rank = rank or max((piece.layer.rank or 0 for piece in pieces), default=0) or USUAL_RANK
    spectrum = of_factors(change) if isinstance(change, Factors) else of_change(change, rank)
    count = spectrum.count_for(rank)
    tally.kept, tally.whole = tally.kept + spectrum.kept(count), tally.whole + spectrum.whole
    factors = spectrum.first(count)
    return lora_tensors(name, factors.up, factors.down, count, shape) if count else {}


def _biases(name: str, pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """What the files add to the biases of a layer."""
    total: dict[str, Tensor] = {}
    for piece in pieces:
        for part in piece.layer.parts.keys() & BIASES:
            key = f"{name}.{part}"
            total[key] = total.get(key, 0) + piece.weight * piece.layer.parts[part].float()
    return total


def _embeddings(sources: Sequence[Source]) -> tuple[dict[str, Tensor], list[str]]:
    """The new words that lie in the files, and a note where two files mean other things by one name."""
    words: dict[str, Tensor] = {}
    notes = []
    for source in sources:
        own = {name: tensor for name, tensor in source.tensors.items() if name.startswith(BUNDLED)}
        if any(name in words and not torch.equal(words[name], tensor) for name, tensor in own.items()):
            notes.append(f"{source.name}: its embeddings are called as those of another file and were left out.")
        else:
            words |= own
    return words, notes


def _added(name: str, pieces: Sequence[Piece], shape: Sequence[int]) -> dict[str, Tensor]:
    """Differences in full, added up; a LoRA for the same weight is multiplied out, since a loader takes only one."""
    part = "diff" if len(shape) > 1 else "w_norm"
    return {f"{name}.{part}": sum(piece.weight * piece.layer.change() for piece in pieces).reshape(shape)}


def _notes(tally: _Tally) -> list[str]:
    notes = []
    if tally.dense:
        notes.append(f"{', '.join(sorted(tally.dense))}: multiplied out, and kept as far as the rank reaches.")
    if tally.added:
        layers = "1 layer is" if tally.added == 1 else f"{tally.added} layers are"
        notes.append(f"{layers} changed in full, not by a LoRA: these were added up as they are.")
    return notes
