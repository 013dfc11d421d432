"""What a stack of LoRAs does to a model: how much each changes, how alike they are, where they fight."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...lora_files.layers import TEXT_ENCODERS, UNKNOWN, layers_of
from ...training.description import recommended, trigger_words
from ...training.lora_family import family_of, title
from ...training.patterns import Overrides, last_match
from .changes import Changes, changes_by_weight, products
from .patches import MODEL, NAMED, called, holder, key_map, listed, place_of
from .weight_norms import squared_norm
from .xray_report import Overlap, Row, XRay

FIGHT = -0.1
"""Two LoRAs fight over a weight where the cosine of their changes is below this."""
LARGE = 0.05
"""A change is large where it is this share of its weight's norm or more."""
MOST_FILES = 64


@dataclass(frozen=True)
class Applied:
    """One LoRA as it was put on: what its file holds, what the loader made of it, and how strongly.

    `tensors` are those that the loader was given, `patches` what `comfy.lora.load_lora` returned (target -> patch).
    `content` tells files apart, such as (path, time of change, size): what is measured about it is kept under it.
    `blocks` are the strengths by block that it was put on with.
    """

    name: str
    tensors: Mapping[str, Tensor]
    patches: Mapping[object, object]
    strength_model: float
    strength_clip: float
    entries: Mapping[str, str]
    content: Hashable
    blocks: Overrides = ()
    note: str = ""
    _factors: dict[str, float | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def strength(self, key: str) -> float:
        """How strongly it changes one weight."""
        strength = self.strength_model if key.startswith(MODEL) else self.strength_clip
        if not self.blocks:
            return strength
        if key not in self._factors:  # asked for once a pair
            self._factors[key] = last_match(self.blocks, key)
        factor = self._factors[key]
        return strength if factor is None else strength * factor


_known: OrderedDict[Hashable, _About] = OrderedDict()


@dataclass
class _Effect:
    """What was measured of one LoRA at its strength: squared norms of its changes and of the weights, by weight."""

    changed: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @property
    def norm(self) -> float | None:
        """The Frobenius norm of all changes together; None where nothing could be measured."""
        total = sum(self.changed.values())
        return math.sqrt(total) if self.changed and math.isfinite(total) else None

    @property
    def relative_norm(self) -> float | None:
        """The same as a share of the norm of the weights it changes."""
        both = self.changed.keys() & self.weights.keys()
        before, change = (sum(sizes[key] for key in both) for sizes in (self.weights, self.changed))
        return math.sqrt(change / before) if before and math.isfinite(change) else None

    def share(self, key: str) -> float:
        """The relative norm for one weight, 0 where it is not known."""
        before = self.weights.get(key)
        return math.sqrt(self.changed.get(key, 0.0) / before) if before else 0.0


def xray(
    model, clip, applied: Sequence[Applied], depth: str = "short", keys: Mapping[str, object] | None = None
) -> XRay:
    """Look through a stack; `clip` may be None, `keys` is the loader's key map where it is made already.

    "short" measures what needs no matrix as large as a weight, "full" every kind of LoRA and quantised weights too.
    The model is only read. What was measured once is scaled, and never measured again, for another strength.
    """
    keys = key_map(model, clip) if keys is None else keys
    full = depth == "full"

    def patcher_of(key: str):
        return holder(key, model, clip)

    with torch.no_grad():
        changes = [changes_by_weight(one.content, one.patches, patcher_of) for one in applied]
        measured = _measured(changes, patcher_of, full)
        effects = [_effect(one, own, measured, patcher_of, full) for one, own in zip(applied, changes, strict=True)]
    rows = [_row(*each, keys, clip is None) for each in zip(applied, changes, effects, strict=True)]
    pairs = [(a, b) for b in range(len(applied)) for a in range(b)]
    overlaps = [
        overlap for a, b in pairs if (overlap := _overlap(applied, changes, effects, measured, a, b)) is not None
    ]
    return XRay(rows, sum(abs(one.strength_model) for one in applied), overlaps)


def _measured(changes: Sequence[Changes], patcher_of, full: bool) -> dict[str, dict[frozenset, float]]:
    """By weight the inner products of every pair of changes at strength 1."""
    weights = dict.fromkeys(key for one in changes for key in one.by_weight)
    return {
        key: products(patcher_of(key), key, [one for one in changes if key in one.by_weight], every_kind=full)
        for key in weights
    }


def _effect(one: Applied, own: Changes, measured: Mapping[str, Mapping], patcher_of, full: bool) -> _Effect:
    effect = _Effect()
    for key, patches in own.by_weight.items():
        size = measured[key].get(frozenset((own.content,)))
        if size is not None:
            effect.changed[key] = max(size, 0.0) * one.strength(key) ** 2
        parts = {place and place[0] for _, place in patches}
        before = [squared_norm(patcher_of(key), key, part, quantised=full) for part in parts]
        if None not in before:
            effect.weights[key] = sum(before)
    return effect


@dataclass(frozen=True)
class _About:
    """What the tensors of a file say whatever they are put on."""

    layers: tuple[str, ...]
    kind: str
    rank: str
    family: str | None


def _about(one: Applied) -> _About:
    """Worked out once for a file, as long as it is among the last that were asked for."""
    if one.content not in _known:
        layers = layers_of(one.tensors)
        ranks = sorted({layer.rank for layer in layers.values() if layer.rank})
        _known[one.content] = _About(
            tuple(layers),
            ", ".join(dict.fromkeys(layer.kind for layer in layers.values() if layer.kind != UNKNOWN)),
            f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "",
            family_of(list(one.tensors)),
        )
    _known.move_to_end(one.content)
    while len(_known) > MOST_FILES:
        _known.popitem(last=False)
    return _known[one.content]


def _row(one: Applied, own: Changes, effect: _Effect, keys: Mapping[str, object], without_clip: bool) -> Row:
    about = _about(one)
    reached = {place_of(target)[0] for target in one.patches}
    unknown = [name for name in about.layers if not _reaches(keys.get(name), reached)]
    return Row(
        name=one.name,
        family=title(family_of(one.entries) or about.family or ""),
        kind=about.kind,
        rank=about.rank,
        keys=len(about.layers) - len(unknown) - len(own.misfits),
        keys_in_file=len(about.layers),
        norm=effect.norm,
        relative_norm=effect.relative_norm,
        triggers=trigger_words(one.entries),
        strength=one.strength_model,
        strength_clip=None if without_clip else one.strength_clip,
        recommended=recommended(one.entries),
        note="; ".join(filter(None, (one.note, *_notes(own, effect, unknown, without_clip)))),
    )


def _reaches(target: object, reached: Collection[str]) -> bool:
    """Whether the loader found the weight that a layer's name leads to, or its bias."""
    if target is None:
        return False
    key, _ = place_of(target)
    return key in reached or f"{key.removesuffix('.weight')}.bias" in reached


def _notes(own: Changes, effect: _Effect, unknown: Sequence[str], without_clip: bool) -> Iterable[str]:
    waiting = [name for name in unknown if without_clip and name.startswith(TEXT_ENCODERS)]
    others = [name for name in unknown if name not in waiting]
    if waiting:
        yield f"{_layers(len(waiting))} of text encoders, for which no CLIP is connected"
    if others:
        yield f"not applied: {listed(others)}"
    if own.misfits:
        yield f"{_layers(len(own.misfits))} of another size than this model's"
    if not math.isfinite(sum(effect.changed.values())):
        yield "it holds values that are not finite and will spoil pictures"
    unmeasured = len(own.by_weight) - len(effect.changed)
    if unmeasured:
        yield f"{_layers(unmeasured)} measured only by the full x-ray"


def _overlap(
    applied: Sequence[Applied],
    changes: Sequence[Changes],
    effects: Sequence[_Effect],
    measured: Mapping[str, Mapping],
    a: int,
    b: int,
) -> Overlap | None:
    """How alike two LoRAs are at their strengths; None where they share no weight that could be measured."""
    pair, sizes = frozenset((changes[a].content, changes[b].content)), (effects[a].changed, effects[b].changed)
    together = {
        key: measured[key][pair] * applied[a].strength(key) * applied[b].strength(key)
        for key in sizes[0].keys() & sizes[1].keys()
        if pair in measured[key]
    }
    norms = [math.sqrt(sum(own[key] for key in together)) for own in sizes]
    whole = norms[0] * norms[1]
    if not whole or not math.isfinite(whole):
        return None
    fights = sorted(
        (key for key in together if together[key] < FIGHT * math.sqrt(sizes[0][key] * sizes[1][key])),
        key=together.__getitem__,
    )
    least = {key: min(effects[a].share(key), effects[b].share(key)) for key in together}
    crowded = sorted((key for key in least if least[key] >= LARGE), key=least.__getitem__, reverse=True)
    return Overlap(
        a=applied[a].name,
        b=applied[b].name,
        cosine=sum(together.values()) / whole,
        shared=len(together),
        layers=[called(key) for key in fights[:NAMED]],
        fights=len(fights),
        both_large=[called(key) for key in crowded[:NAMED]],
    )


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
