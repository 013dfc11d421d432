"""The LoRAs a node is asked for: entries of a stack, rows of widgets, rows as JSON, and tags in a prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

NONE = "none"
OLD_ROWS = 4
TAG = re.compile(r"<lora:([^<>]*)>", re.IGNORECASE)
AROUND = re.compile(r"(?<![ \t])[ \t]*(?:,[ \t]*)?(?:<lora:[^<>]*>[ \t]*(?:,[ \t]*)?)+", re.IGNORECASE)
"""Tags that follow one another, with the commas and spaces that joined them to the rest of the prompt."""
STRONGEST = 100.0
"""What a strength may be, as in Load LoRA."""


@dataclass(frozen=True)
class LoraRow:
    """One LoRA that is asked for; a strength of None is the one its file recommends, else 1.

    `note` is what is to be said about where its file was found.
    """

    name: str
    strength_model: float | None = None
    strength_clip: float | None = None
    on: bool = True
    blocks: str = ""
    note: str = ""

    def reaches(self, with_clip: bool) -> bool:
        """Whether a strength is not 0, or not known yet; that on the CLIP counts only where there is one."""
        return self.strength_model != 0 or (with_clip and self.strength_clip != 0)

    def settled(self, recommended: float | None) -> LoraRow:
        """The same row with both strengths known."""
        usual = 1.0 if recommended is None else recommended
        strengths = (self.strength_model, self.strength_clip)
        on_model, on_clip = (usual if strength is None else strength for strength in strengths)
        return replace(self, strength_model=on_model, strength_clip=on_clip)


def is_none(name: object) -> bool:
    """Whether a row or an entry of a stack names no LoRA; other packs write "None"."""
    return not name or (isinstance(name, str) and name.strip().lower() in ("", NONE))


def is_strength(value: object) -> bool:
    """Whether this is a number that a LoRA may be put on with; not "nan", and nothing that overflows."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -STRONGEST <= value <= STRONGEST


def stack_rows(entries: Iterable) -> list[LoraRow]:
    """The entries of a stack that name a LoRA; ValueError for one that is no (name, strength, strength)."""
    try:
        rows = [LoraRow(name, float(on_model), float(on_clip)) for name, on_model, on_clip in entries]
        rows = [row for row in rows if not is_none(row.name)]
    except (TypeError, ValueError, OverflowError):
        rows = [LoraRow(None)]
    if not all(isinstance(row.name, str) for row in rows):
        raise ValueError(
            "lora_stack holds something else than (name, strength_model, strength_clip): connect a LORA_STACK output."
        )
    return list(map(_checked, rows))


def _checked(row: LoraRow) -> LoraRow:
    """The row; ValueError for a strength that some other node has made and that no LoRA can be put on with."""
    for strength in (row.strength_model, row.strength_clip):
        if not is_strength(strength):
            raise ValueError(
                f"'{row.name}' is asked for at strength {strength}: connect or write a number between -{STRONGEST:g} "
                f"and {STRONGEST:g}."
            )
    return row


def widget_rows(widgets: Mapping[str, object]) -> list[LoraRow]:
    """The first four rows, each of four widgets, that name a LoRA."""
    return [
        _checked(
            LoraRow(
                widgets[f"lora_{number}"],
                widgets.get(f"strength_model_{number}", 1.0),
                widgets.get(f"strength_clip_{number}", 1.0),
                widgets.get(f"on_{number}", True) is not False,
            )
        )
        for number in range(1, OLD_ROWS + 1)
        if not is_none(widgets.get(f"lora_{number}"))
    ]


def json_rows(text: str | None) -> list[LoraRow]:
    """The rows of the widget `rows` that name a LoRA; ValueError naming the row that is none."""
    try:
        entries = json.loads(text or "[]")
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise ValueError(f"rows must be a list in JSON, such as {EXAMPLE}: correct it, or empty it to start again.")
    rows = [_json_row(number, entry) for number, entry in enumerate(entries, 1)]
    return [row for row in rows if not is_none(row.name)]


EXAMPLE = '[{"lora": "people/a.safetensors", "model": 0.8, "clip": 0.8, "on": true}]'


def _json_row(number: int, entry: object) -> LoraRow:
    if not isinstance(entry, dict):
        raise ValueError(f"Row {number} of rows must say which LoRA at which strength, as {EXAMPLE[1:-1]} does.")
    name, blocks, on = entry.get("lora"), entry.get("blocks") or "", entry.get("on")
    if not (name is None or isinstance(name, str)) or not isinstance(blocks, str):
        raise ValueError(f"Row {number} of rows has a lora or blocks that is no text: write both as text.")
    strengths = [_strength(entry.get(side), f"Row {number} of rows has '{side}'") for side in ("model", "clip")]
    return LoraRow(name or "", *strengths, on is None or bool(on), blocks)


def _strength(value: object, where: str) -> float | None:
    if value is None:
        return None
    if not is_strength(value):
        said = f"{value!r:.40}"
        raise ValueError(f"{where} of {said}, which is no strength: write a number such as 0.8, or leave it out.")
    return float(value)


def prompt_rows(prompt: str | None) -> tuple[list[LoraRow], str]:
    """The LoRAs that tags such as <lora:name:0.8:0.6> of a prompt ask for, and the prompt without them.

    The first number is for the model, the second for the CLIP; one stands for both, and without any the recommended
    strength is taken. ValueError naming the tag whose strengths are no numbers.
    """
    prompt = prompt or ""
    rows = [_tag_row(*found.group(1, 0)) for found in TAG.finditer(prompt)]
    if not rows:
        return [], prompt
    return [row for row in rows if not is_none(row.name)], AROUND.sub(_joint, prompt).strip(" \t,")


def _tag_row(inside: str, tag: str) -> LoraRow:
    name, *numbers = (part.strip() for part in inside.split(":"))
    try:
        strengths = [float(number) for number in numbers]
    except ValueError:
        strengths = [math.nan]
    if len(strengths) > 2 or not all(map(is_strength, strengths)):
        raise ValueError(f"The prompt has the tag {tag}, which must say <lora:name:0.8> or <lora:name:0.8:0.6>.")
    return LoraRow(name, *(strengths * 2)[:2])


def _joint(found: re.Match) -> str:
    """What is left between two parts of a prompt where tags stood."""
    between = TAG.sub("", found[0])
    if found.string[: found.start()][-1:] == "\n":
        return ""
    if found.string[found.end() : found.end() + 1] == "\n":
        return between.strip()[:1]
    return ", " if "," in between else between[:1]
