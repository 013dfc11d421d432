"""The LoRA that turns one model into another, weight by weight.

Of each difference D = W' - W the largest parts are kept (Eckart & Young 1936). What a weight stored in few bits was
rounded by is no part of it: rounding to steps of eps 2^floor(log2 |w|) moves weights by

    r^2 = eps^2 / 12 * 0.541 |W|^2

in all (0.541 = E[m^-2] of a mantissa m spread evenly over its logarithm), as noise whose parts reach up to
s (sqrt(out) + sqrt(in)), s^2 = r^2 / (out in) (Marchenko & Pastur 1967). Parts up to half as much again are left out
too: both models may have been rounded (sqrt 2), and large weights are rounded more than small ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layers import lora_tensors
from .low_rank import of_change, share

MANTISSA = 0.541
MARGIN = 1.5
SAID_FROM = 0.05
"""Rounding below this share of the difference is not worth a word."""


@dataclass(frozen=True)
class Stored:
    """A way of storing numbers: what it is called, and its step between 1 and 2."""

    name: str
    eps: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> Stored:
        """A floating type as it is."""
        return cls(str(dtype).removeprefix("torch."), torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Pair:
    """A weight of the model and of its base; `name` is its layer's in the LoRA, "" for one that no loader can change.

    `stored` is what the two were rounded to apart from one another, float32 where they share what is stored.
    """

    name: str
    weight: Tensor
    base: Tensor
    stored: Stored = Stored("float32", 2.0**-23)


@dataclass(frozen=True)
class Extraction:
    """A LoRA; `kept` is |what it changes| / |the difference of all layers that a LoRA can change|.

    `rounding` is the share of that difference that storing the weights made, `precision` what suits the file.
    """

    tensors: dict[str, Tensor]
    kept: float
    ranks: dict[str, int]
    rounding: float
    precision: torch.dtype
    notes: list[str]


@dataclass
class _Tally:
    kept: float = 0.0
    whole: float = 0.0
    noise: float = 0.0
    rounded: int = 0
    elsewhere: int = 0
    reshaped: list[str] = field(default_factory=list)
    stored: set[Stored] = field(default_factory=set)


def extracted(pairs: Iterable[Pair], rank: int, energy: float = 1.0) -> Extraction:
    """The LoRA of the differences, at most at `rank`, and with the fewest parts that keep the share `energy` of each.

    One pair is asked for at a time and let go before the next. Linear layers and convolutions alone can be changed
    by a LoRA; differences elsewhere are counted. ValueError when nothing differs, and for values that are not finite.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    tally = _Tally()
    for pair in pairs:
        if pair.weight.shape != pair.base.shape:
            tally.reshaped.append(pair.name)
        elif pair.weight.ndim < 2 or not pair.name:
            tally.elsewhere += not torch.equal(pair.weight.float(), pair.base.float())
        elif layer := _layer(pair, rank, energy, tally):
            tensors |= layer
            ranks[pair.name] = len(layer[f"{pair.name}.lora_down.weight"])
        del pair  # before the next one is made
    if not tensors:
        raise ValueError(_nothing(tally))
    rounding = share(tally.noise, tally.whole)
    precision = torch.float32 if all(kind.eps <= 2.0**-23 for kind in tally.stored) else torch.float16
    return Extraction(tensors, share(tally.kept, tally.whole), ranks, rounding, precision, _notes(tally, rounding))


def _layer(pair: Pair, rank: int, energy: float, tally: _Tally) -> dict[str, Tensor]:
    """One layer of the LoRA; {} where the weights do not differ by more than rounding."""
    shape = pair.weight.shape
    base = pair.base.float()
    change = (pair.weight.float() - base).flatten(1)
    if not torch.isfinite(change).all():
        raise ValueError(f"The weight of '{pair.name}' is not finite in one of the models: load another file.")
    if not change.any():
        return {}
    noise = _rounding(base, pair.stored.eps)
    del base
    spectrum = of_change(change, min(rank, *change.shape))
    tally.whole, tally.noise = tally.whole + spectrum.whole, tally.noise + min(noise, spectrum.whole)
    tally.stored.add(pair.stored)
    edge = MARGIN * (noise / change.numel()) ** 0.5 * sum(size**0.5 for size in change.shape)
    count = min(spectrum.count_for(rank, energy), int((spectrum.sizes > edge).sum()))
    if not count or noise >= spectrum.whole:
        tally.rounded += 1
        return {}
    tally.kept += spectrum.kept(count)
    factors = spectrum.first(count)
    return lora_tensors(pair.name, factors.up.cpu(), factors.down.cpu(), count, shape)


def _rounding(weight: Tensor, eps: float) -> float:
    """The squared norm of what rounding moved a weight by."""
    return eps**2 / 12 * MANTISSA * weight.double().square().sum().item()


def _nothing(tally: _Tally) -> str:
    if tally.rounded:
        return (
            f"The models differ by no more than what storing them as {_types(tally)} rounds, so no LoRA can be found: "
            "load both in a higher precision."
        )
    if tally.elsewhere or tally.reshaped:
        return "The models differ in no layer that a LoRA can change: choose another pair of models."
    return "The two models are the same, so there is nothing to extract: choose the model and what it was made from."


def _notes(tally: _Tally, rounding: float) -> list[str]:
    notes = []
    if rounding > SAID_FROM:
        notes.append(
            f"The weights are stored as {_types(tally)}: about {100 * rounding:.0f} % of the difference is rounding, "
            "which is no part of the LoRA."
        )
    if tally.rounded:
        notes.append(f"{_layers(tally.rounded)} by no more than rounding and {_was(tally.rounded)} left out.")
    if tally.reshaped:
        notes.append(f"{len(tally.reshaped)} of other shapes left out, such as '{tally.reshaped[0]}'.")
    if tally.elsewhere:
        notes.append(
            f"{tally.elsewhere} norms, biases and the like differ too; a LoRA cannot change them, so it lacks that."
        )
    return notes


def _types(tally: _Tally) -> str:
    return max(tally.stored, key=lambda stored: stored.eps).name


def _layers(count: int) -> str:
    return "1 layer differs" if count == 1 else f"{count} layers differ"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"
