"""The layers of a diffusion transformer that nobody described, told apart by where they are and what they are called.

Such a network is a few lists of like blocks with something before and after. What trainers adapt lies in the blocks:
attention and feed-forward, and for `full` also what turns the time step into shifts, scales and gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .frozen import is_linear

ATTENTION_WORDS = re.compile(r"attn|attention|qkv|\b(to_|w|add_)?[qkvo](_proj)?\b|linear[12]\b")
"""Names with attention in them; `linear1` and `linear2` are FLUX's name for attention and feed-forward in one."""
MODULATION_WORDS = re.compile(r"mod(ulation|ulate|[CX])?\b|_mod|mod_|ada_?ln|norm|scale_shift|time_|emb", re.IGNORECASE)
"""Names of what is made of the time step; they win over attention, since some modulate an attention."""
TOKENS = 4096 + 512
"""Of a picture of 1024 x 1024, one for each 16 x 16 pixels, and of its text."""
KEPT_PER_CHANNEL = 1.6
"""Numbers kept for backward per input and output channel of a linear layer: 1.25 to 1.6 in SD 3 and FLUX, counted."""


@dataclass(frozen=True)
class Structure:
    """Patterns over the names of layers, each wider than the one before, and the class names of the blocks."""

    attention: str
    attention_and_feed_forward: str
    full: str
    blocks: tuple[str, ...]
    activations_gib: float
    """An estimate of what a picture of 1024 x 1024 keeps for backward in 16 bits."""


def structure_of(network: nn.Module) -> Structure | None:
    """The structure of a network; None when it has no repeated blocks with attention in them."""
    blocks = list(_blocks(network))
    layers = [
        (path, name, layer) for path, block in blocks for name, layer in block.named_modules() if is_linear(layer)
    ]
    full = list(dict.fromkeys((path, name) for path, name, _ in layers))
    plain = [(path, name) for path, name in full if not MODULATION_WORDS.search(name)]
    attention = [(path, name) for path, name in plain if ATTENTION_WORDS.search(name)]
    if not attention:
        return None
    channels = sum(layer.in_features + layer.out_features for _, _, layer in layers)
    return Structure(
        _pattern(attention),
        _pattern(plain),
        _pattern(full),
        tuple(sorted({type(block).__name__ for _, block in blocks})),
        channels * TOKENS * 2 * KEPT_PER_CHANNEL / 2**30,
    )


def _blocks(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost lists of modules of one class that have attention in them: the list's name with each member."""
    for name, child in module.named_children():
        members = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)) and _are_blocks(members):
            yield from ((f"{path}{name}", member) for member in members)
        else:
            yield from _blocks(child, f"{path}{name}.")


def _are_blocks(members: list[nn.Module]) -> bool:
    if len({type(member) for member in members}) != 1:
        return False
    names = [name for name, layer in members[0].named_modules() if is_linear(layer)]
    return any(ATTENTION_WORDS.search(name) and not MODULATION_WORDS.search(name) for name in names)


def _pattern(layers: list[tuple[str, str]]) -> str:
    """A pattern for these layers, each a list's name and a name within its members, in every member."""
    alike = [rf"{re.escape(path)}\.[^.]+\.{re.escape(name)}" for path, name in layers]
    return f"^({'|'.join(alike)})$"
