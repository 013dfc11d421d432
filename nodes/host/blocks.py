"""Strengths of a LoRA by block: which blocks a model has, and a loader's patches split by them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...training.patterns import Overrides, last_match, overrides
from .patches import place_of

SETTING, HIGHEST = "blocks", 100.0
LONGEST, NAMED = 4000, 3
SIDES = {"IN": "input_blocks", "OUT": "output_blocks", "D": "double_blocks", "S": "single_blocks"}
PLACES = {
    "MID": r"^diffusion_model\.middle_block\.",
    "M00": r"^diffusion_model\.middle_block\.",
    "TE": r"^(?!diffusion_model\.)",
    "BASE": r"^(?!diffusion_model\.)",
}
BLOCKS = re.compile(r"(IN|OUT|D|S)(?:(\d{1,2})(?:-\1?(\d{1,2}))?|\*)", re.IGNORECASE)
ENTRY = re.compile(r"[\s,]*(?P<what>\S+?)\s*=\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+))\s*(?=,|\n|$)")


def block_strengths(text: str) -> Overrides:
    """Patterns over ComfyUI's names of weights with their strengths, of a line such as "IN04=0.5, OUT00-OUT05=0, TE=1".

    IN, MID and OUT are the blocks of SDXL and SD 1.5, D and S those of FLUX, TE the text encoders; * stands for all of
    a kind. Anything else is a regular expression. ValueError naming what cannot be read.
    """
    return overrides("\n".join(f"{_pattern(what)} = {number}" for what, number in _entries(text)), SETTING, HIGHEST)


def _entries(text: str) -> list[tuple[str, str]]:
    """What is named and its number, as they are written; ValueError naming what is no such pair."""
    entries, at = [], 0
    text = text.strip(" \t\n,")
    if len(text) > LONGEST:
        raise ValueError(f"blocks has {len(text):,} characters: write at most {LONGEST:,}.")
    while at < len(text):
        entry = ENTRY.match(text, at)
        if entry is None:
            raise ValueError(
                f"blocks has '{text[at:].strip(' ,')}', which must say 'block = number', such as IN04=0.5, "
                "OUT00-OUT05=0, D*=0.8 or TE=1: correct or remove it."
            )
        if not 0 <= float(entry["number"]) <= HIGHEST:
            raise ValueError(
                f"blocks has '{entry[0].strip(' ,')}', whose number must be between 0 and {HIGHEST:g}: correct or "
                "remove it."
            )
        entries.append(entry.group("what", "number"))
        at = entry.end()
    return entries


def _pattern(what: str) -> str:
    """A block's name as a pattern over the names of weights; anything else is one already."""
    if place := PLACES.get(what.upper()):
        return place
    named = BLOCKS.fullmatch(what)
    if named is None:
        return what
    side, first, last = named.groups()
    numbers = r"\d+"
    if first is not None:
        start, end = sorted((int(first), int(last or first)))
        numbers = f"({'|'.join(map(str, range(start, end + 1)))})"
    return rf"^diffusion_model\.{SIDES[side.upper()]}\.{numbers}\."


def share(patches: Mapping[object, object], text: str) -> str:
    """How many of a loader's patches are in a block with a strength of its own, and which blocks have none, in words.

    What is mistyped is a pattern that fits nothing, so it is told.
    """
    strengths, names = block_strengths(text), [place_of(target)[0] for target in patches]
    named = sum(last_match(strengths, name) is not None for name in names)
    lost = [
        what
        for (what, _), (pattern, _) in zip(_entries(text), strengths, strict=True)
        if not any(map(pattern.search, names))
    ]
    line = f"blocks set the strength of {named} of {len(patches)} layers"
    return f"{line}; no layer fits {' or '.join(lost[:NAMED])}" if lost else line


def split(patches: Mapping[object, object], strengths: Overrides) -> dict[float, dict[object, object]]:
    """A loader's patches by the strength of their block, 1 where none is said; those of strength 0 are left out."""
    parts: dict[float, dict[object, object]] = {}
    for target, patch in patches.items():
        factor = last_match(strengths, place_of(target)[0])
        if factor != 0:
            parts.setdefault(1.0 if factor is None else factor, {})[target] = patch
    return parts
