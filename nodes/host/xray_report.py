"""The findings about a stack of LoRAs as lines of text and as a table for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from ...lora_files.layers import TITLES

MOST_STRENGTH, MOST_LORAS = 2.0, 4
"""What guides to the use of several LoRAs advise: strengths that add up to less than this, and 2 to 4 of them."""
ALIKE, APART = 0.3, -0.05
"""Cosines from which on two LoRAs do much the same, or work against one another."""


@dataclass(frozen=True)
class Row:
    """One LoRA. `norm` is that of its change at its strength, `relative_norm` its share of the weights' norm.

    Both are None where they could not be measured, `strength_clip` is where there is no CLIP.
    """

    name: str
    family: str
    kind: str
    rank: str
    keys: int
    keys_in_file: int
    norm: float | None
    relative_norm: float | None
    triggers: Sequence[str]
    strength: float
    strength_clip: float | None
    recommended: float | None
    note: str

    def __str__(self) -> str:
        parts = [
            " ".join(filter(None, (self.family, self.kinds, self.rank and f"rank {self.rank}"))),
            self._strengths(),
            self._reach(),
            self._size(),
            self.triggers and f"trigger words: {', '.join(self.triggers)}",
        ]
        line = f"{self.name}: {', '.join(filter(None, parts))}"
        return f"{line} ({self.note})" if self.note else line

    @property
    def kinds(self) -> str:
        """Its kinds of layers as they are written."""
        return " and ".join(TITLES.get(kind, kind) for kind in self.kind.split(", ") if kind)

    def _strengths(self) -> str:
        said = f"model {self.strength:g}" + ("" if self.strength_clip is None else f", clip {self.strength_clip:g}")
        return f"{said} (recommended {self.recommended:g})" if self.recommended is not None else said

    def _reach(self) -> str:
        if not self.keys:
            return "NO layer of this model fits it"
        layers = "layer" if self.keys_in_file == 1 else "layers"
        if self.keys == self.keys_in_file:
            return f"{self.keys} {layers}"
        return f"{self.keys} of {self.keys_in_file} {layers}"

    def _size(self) -> str:
        if self.relative_norm is not None:
            return f"changes the weights by {100 * self.relative_norm:.2g} %"
        return "" if self.norm is None else f"norm {self.norm:.3g}"


@dataclass(frozen=True)
class Overlap:
    """How alike the changes of two LoRAs are over the `shared` weights that both change.

    `layers` are the first of the `fights` in which they work against one another, `both_large` those that both change
    much.
    """

    a: str
    b: str
    cosine: float
    shared: int
    layers: Sequence[str]
    fights: int
    both_large: Sequence[str]

    def __str__(self) -> str:
        cosine = round(self.cosine, 2) + 0.0  # and not "-0.00"
        line = f"{self.a} and {self.b}: cosine {cosine:.2f}, {self._meaning()}"
        if self.layers:
            line += f"; they fight over {_counted(self.layers, self.fights)}"
        if self.both_large:
            line += f"; both change {', '.join(self.both_large)} much"
        return line

    def _meaning(self) -> str:
        if self.cosine >= ALIKE:
            return "they do much the same, so lower both"
        return "they work against one another" if self.cosine <= APART else "they hardly meet"


@dataclass(frozen=True)
class XRay:
    """The findings about a stack."""

    rows: Sequence[Row]
    total: float
    overlaps: Sequence[Overlap]

    def guidance(self) -> str:
        """What to change about the whole; "" when nothing is."""
        if self.total > MOST_STRENGTH and len(self.rows) > 1:
            return f"The strengths add up to {self.total:.3g}: keep them under {MOST_STRENGTH:g}, lowering each."
        if len(self.rows) > MOST_LORAS:
            return f"{len(self.rows)} LoRAs at once: 2 to {MOST_LORAS} work best."
        return ""

    def to_text(self) -> str:
        """A line per LoRA, then one about all of them and one per pair."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield from map(str, self.rows)
        if len(self.rows) > 1:
            yield self.guidance() or f"Total strength {self.total:.3g}"
        yield from map(str, self.overlaps)

    def table(self) -> dict:
        """{"rows": [...], "total": float, "guidance": str, "overlaps": [...]}, all of it JSON."""
        return {
            "rows": list(map(asdict, self.rows)),
            "total": self.total,
            "guidance": self.guidance(),
            "overlaps": list(map(asdict, self.overlaps)),
        }


def _counted(names: Sequence[str], count: int) -> str:
    more = count - len(names)
    return f"{', '.join(names)} and {more} more" if more > 0 else ", ".join(names)
