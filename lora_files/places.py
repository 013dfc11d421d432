"""Where in a model a layer of a LoRA file lies: its network, its block as people call it, and what it is part of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .layer_names import CLIP_G, CLIP_L, MODEL, T5, Address, names_of

NETWORKS = {MODEL: "model", CLIP_L: "CLIP-L", CLIP_G: "CLIP-G", T5: "T5"}
ATTENTION, CROSS, FEED_FORWARD, BOTH, OTHER = PARTS = (
    "attention",
    "cross-attention",
    "feed-forward",
    "attention and feed-forward",
    "other",
)
REST = "rest"
"""The block of layers that are in none."""

BLOCKS = (
    (r"input_blocks[._](\d+)", "IN"),
    (r"output_blocks[._](\d+)", "OUT"),
    (r"middle_block|mid_block", "MID"),
    (r"(?:single_transformer_blocks|single_blocks|single_stream_blocks|single_layers)[._](\d+)", "S"),
    (r"(?:double_blocks|transformer_blocks|joint_blocks|double_stream_blocks|double_layers)[._](\d+)", "D"),
    (r"(?:layers|blocks|block|resblocks)[._](\d+)", ""),
)
"""How blocks are called in files of every family, and what Stack Apply calls them; the first that is found decides."""
KINDS = (
    (r"single_blocks[._]\d+[._]linear[12]|single_transformer_blocks[._]\d+[._]proj_out", BOTH),
    (r"attn2|cross_attn|add_[qkv]_proj_cross", CROSS),
    (r"attn|attention|qkv|SelfAttention|to_[qkv]\b", ATTENTION),
    (r"\bff\b|_ff_|ff_context|mlp|feed_forward|ffn|DenseReluDense", FEED_FORWARD),
)


@dataclass(frozen=True)
class Place:
    """`network` is one of NETWORKS, `block` such as "IN04", `part` one of PARTS."""

    network: str
    block: str
    part: str

    @property
    def order(self) -> tuple:
        """Networks, then blocks, in the order in which a picture is made."""
        kind, number = re.fullmatch(r"([A-Z]*)(\d*).*", self.block).groups()
        sides = ["IN", "MID", "OUT", "D", "S", ""]
        side = sides.index(kind) if kind in sides and self.block != REST else len(sides)
        return list(NETWORKS).index(self.network), side, int(number or 0)


def places_of(names: Iterable[str]) -> dict[str, Place]:
    """The place of each layer of a file, by its name there, in any form and of any family."""
    names = list(names)
    addresses = names_of(names).addresses
    return {name: _named(name, addresses[name]) if addresses[name] else _guessed(name) for name in names}


def _named(name: str, address: Address) -> Place:
    """The place of a layer we know; of a piece of a fused layer its own name says what it is part of."""
    place = _place(address.network, address.path)
    return place if address.piece is None else Place(place.network, place.block, _part(name))


def _guessed(name: str) -> Place:
    """The place of a layer of a family whose names we cannot take apart."""
    if re.match(r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g", name):
        return _place(CLIP_G, name)
    if re.match(r"lora_te3_|text_encoder_3\.|text_encoders\.t5", name):
        return _place(T5, name)
    return _place(CLIP_L if re.match(r"lora_te|text_encoder", name) else MODEL, name)


def _place(network: str, path: str) -> Place:
    return Place(network, _block(path), _part(path))


def _part(path: str) -> str:
    return next((kind for pattern, kind in KINDS if re.search(pattern, path)), OTHER)


def _block(path: str) -> str:
    for pattern, side in BLOCKS:
        if found := re.search(pattern, path):
            number = found.groups()[0] if found.groups() else None
            return f"{side}{int(number):02}" if number and len(number) < 5 else side or REST
    return REST
