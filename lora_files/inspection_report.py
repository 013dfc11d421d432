"""An inspection of a LoRA file in words: what is wrong with it, what it says about itself, what its weights say."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..training.config import DORA
from ..training.description import STRENGTH
from ..training.lora_family import mismatch, title
from . import said
from .layers import TITLES
from .places import NETWORKS

if TYPE_CHECKING:
    from .inspection import Inspection, Measured

NAMED, MOST_LINES = 3, 40
FEW = 0.1
"""A rank that fewer than this share of the layers has is odd."""
FAR = 30.0
"""A layer whose change is so many times the usual one is odd."""
PRECISIONS = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8 (e5m2)",
}


def text(found: Inspection) -> str:
    """All of it, in three parts."""
    parts = [
        ("", [found.name, headline(found)]),
        ("Watch out", [f"- {finding}" for finding in findings(found)]),
        ("What the weights say", weights(found)),
        ("What the file says about itself", told(found)),
    ]
    return "\n\n".join("\n".join(filter(None, (head, *lines))) for head, lines in parts if lines)


def headline(found: Inspection) -> str:
    """Family, kind, rank, how many layers and how large, in a line."""
    family = found.family or found.said_family
    kinds = " and ".join(TITLES[kind] for kind in dict.fromkeys(layer.kind for layer in found.layers))
    what = " ".join(filter(None, (title(family) if family else "unknown family", kinds)))
    rank = f"rank {span(found.ranks)}" if found.ranks else ""
    layers = f"{len(found.layers):,} layers" if len(found.layers) != 1 else "1 layer"
    precision = " and ".join(PRECISIONS.get(name, name) for name in found.precisions)
    return ", ".join(filter(None, (what, rank, layers, f"{size_in_words(found.size)} {precision}".strip())))


def findings(found: Inspection) -> list[str]:
    """What is wrong, or may be, worst first."""
    return [sentence for check in CHECKS for sentence in check(found)]


def _broken(found: Inspection) -> Iterator[str]:
    if found.broken:
        yield (
            f"{_tensors(len(found.broken))} values that are not finite, so pictures will be black or noise: "
            + listed(found.broken)
        )


def _nothing(found: Inspection) -> Iterator[str]:
    if not found.layers:
        yield "No layer in it is one that ComfyUI knows: it is no LoRA, or of a kind that is not known yet."
    elif found.dead and len(found.dead) == len(found.layers):
        yield "It changes nothing: every layer is zero, as before the first step of training."
    elif found.dead:
        one = len(found.dead) == 1
        yield f"{_layers(len(found.dead))} {'changes' if one else 'change'} nothing: {listed(_names(found.dead))}"


def _families(found: Inspection) -> Iterator[str]:
    if found.family and found.said_family and mismatch(found.said_family, found.family):
        yield f"It says it is for {title(found.said_family)}, but its layers are those of {title(found.family)}."


def _odd_ranks(found: Inspection) -> Iterator[str]:
    usual, count = found.ranks.most_common(1)[0] if found.ranks else (0, 0)
    odd = [layer for layer in found.layers if layer.rank and layer.rank != usual]
    if odd and len(odd) < FEW * (count + len(odd)):
        yield f"{_layers(len(odd))} of another rank than {usual}: " + listed(f"{own.name} ({own.rank})" for own in odd)
    claimed = said.said_rank(found.entries)
    if claimed and found.ranks and claimed not in found.ranks:
        yield f"It says its rank is {claimed}, but its layers have rank {span(found.ranks)}: it was resized or merged."


def _odd_sizes(found: Inspection) -> Iterator[str]:
    norms = [layer.norm for layer in found.layers if layer.norm]
    if norms:
        usual = statistics.median(norms)
        large = [layer for layer in found.layers if (layer.norm or 0.0) > FAR * usual]
        if large:
            yield f"{_layers(len(large))} more than {FAR:g} times as strong as most: {listed(_names(large))}"


def _strangers(found: Inspection) -> Iterator[str]:
    if found.unknown:
        one = len(found.unknown) == 1
        count = "1 tensor is" if one else f"{len(found.unknown)} layers or tensors are"
        yield f"{count} of no kind that ComfyUI reads: {listed(found.unknown)}"


def _hash(found: Inspection) -> Iterator[str]:
    claimed = found.entries.get("sshs_model_hash", "") or found.entries.get("modelspec.hash_sha256", "")
    claimed = claimed.removeprefix("0x").lower()
    if len(claimed) == 64 and claimed != found.hashes.tensors:
        yield "Its weights are not those its hash was made of: it was resized, merged or converted since."


CHECKS = (_broken, _nothing, _families, _odd_sizes, _odd_ranks, _strangers, _hash)


def weights(found: Inspection) -> list[str]:
    """What can be measured."""
    if not found.layers:
        return [_hashes(found)]
    return [line for line in (
        f"layers: {_spread(TITLES[layer.kind] for layer in found.layers)}",
        f"rank: {_spread(layer.rank for layer in found.layers if layer.rank)}" if found.ranks else "",
        _alpha(found.layers),
        _in_use(found.layers),
        f"parameters: {sum(layer.parameters for layer in found.layers):,}",
        f"names: as {found.form} writes them" if found.form else "names: of no form that is known, or of several",
        f"new words: {', '.join(map(said.shortened, found.words))}" if found.words else "",
        *_norms(found),
        _hashes(found),
    ) if line]  # fmt: skip


def told(found: Inspection) -> list[str]:
    """What it says about itself, the well-known first."""
    lines = [f"{label}: {value}" for label, value in said.facts(found.entries).items()]
    lines += [f"folder {line}" for line in said.folders(found.entries)]
    if tags := said.tags(found.entries):
        lines.append("commonest in its captions: " + ", ".join(f"{tag} ({count})" for tag, count in tags))
    others = [f"{key}: {value}" for key, value in said.others(found.entries).items() if key != STRENGTH]
    more = len(others) - MOST_LINES
    return [*lines, *others[:MOST_LINES], *([f"and {more} entries more"] if more > 0 else [])] or ["nothing"]


def _norms(found: Inspection) -> Iterator[str]:
    known = [layer for layer in found.layers if layer.norm is not None]
    if not known:
        yield "size of the changes: it depends on the model's weights for layers of these kinds"
        return
    whole = found.norm()
    yield f"size of the changes (Frobenius norm): {whole:.4g}"
    if whole:
        shares = {name: found.norm(network) ** 2 / whole**2 for network, name in NETWORKS.items()}
        yield "where they are: " + ", ".join(f"{name} {100 * share:.3g} %" for name, share in shares.items() if share)
        strongest = sorted(known, key=lambda layer: -layer.norm)[:NAMED]
        yield "strongest: " + ", ".join(f"{layer.name} ({layer.norm:.3g})" for layer in strongest)
    if any(layer.kind == DORA for layer in known):
        yield "DoRA layers are measured before their magnitudes, which depend on the model"


def _alpha(layers: Sequence[Measured]) -> str:
    said_of = [layer for layer in layers if layer.alpha is not None and layer.rank]
    if not said_of:
        return "alpha: none, so strength 1 is the product as it is" if any(layer.rank for layer in layers) else ""
    scales = Counter(round(layer.alpha / layer.rank, 6) for layer in said_of)
    scale = f"{next(iter(scales)):g}" if len(scales) == 1 else f"{min(scales):g} to {max(scales):g}"
    without = sum(1 for layer in layers if layer.alpha is None and layer.rank)
    rest = f"; {without} layers have none" if without else ""
    return f"alpha: {_spread(f'{layer.alpha:g}' for layer in said_of)}, which scales them by {scale}{rest}"


def _in_use(layers: Sequence[Measured]) -> str:
    used = [layer.used for layer in layers if layer.used]
    if not used:
        return ""
    median, ranks = statistics.median_low(used), [layer.rank for layer in layers if layer.used]
    return (
        f"in use: 90 % of the effect lies in {median} of {statistics.median_low(ranks)} directions of the usual layer, "
        f"in {max(used)} where it needs most"
    )


def _hashes(found: Inspection) -> str:
    whole, tensors = found.hashes.file, found.hashes.tensors
    return f"hashes: AutoV2 {whole[:10].upper()}, AutoV3 {tensors[:12].upper()}, SHA-256 {whole}"


def span(ranks: Iterable[int]) -> str:
    """One rank, or the lowest and the highest."""
    low, high = min(ranks), max(ranks)
    return f"{low}" if low == high else f"{low} to {high}"


def size_in_words(size: int) -> str:
    """Bytes as people say them."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(said.shortened(name) for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _names(layers: Iterable[Measured]) -> list[str]:
    return [layer.name for layer in layers]


def _spread(values: Iterable[object]) -> str:
    """Each value with how many have it, the commonest first; the value alone where all have it."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return f"{counts[0][0]} (all {counts[0][1]:,})"
    more = f" and {len(counts) - 6} others" if len(counts) > 6 else ""
    return ", ".join(f"{value} ({count:,})" for value, count in counts[:6]) + more


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count:,} layers"


def _tensors(count: int) -> str:
    return "1 tensor holds" if count == 1 else f"{count:,} tensors hold"
