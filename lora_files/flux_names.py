"""The layers of FLUX as its checkpoints call them, and as diffusers does.

Where a checkpoint has one fused layer (queries, keys and values; in single blocks the MLP too), diffusers has several,
which are the rows of the fused one in order.
"""

from __future__ import annotations

import re

DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}
ALONE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED = "final_layer.adaLN_modulation.1"
"""The layer whose rows diffusers has in another order: scale before shift."""
FUSED_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FUSED_SINGLE = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}
SHARES = {3: (1, 1, 1), 4: (1, 1, 1, 4)}
"""How the rows of a fused layer of so many pieces are shared out; FLUX's MLP is four times as wide as its stream."""

BLOCKS = (
    ("double_blocks", "transformer_blocks", DOUBLE, FUSED_DOUBLE),
    ("single_blocks", "single_transformer_blocks", SINGLE, FUSED_SINGLE),
)


def to_diffusers(path: str) -> tuple[str, ...]:
    """diffusers' path for a checkpoint's, or those of its pieces in order; () when it has none."""
    if path in ALONE:
        return (ALONE[path],)
    for block, diffusers_block, table, fused in BLOCKS:
        if found := re.fullmatch(rf"{block}\.(\d+)\.(.+)", path):
            names = fused.get(found[2]) or ((table[found[2]],) if found[2] in table else ())
            return tuple(f"{diffusers_block}.{found[1]}.{name}" for name in names)
    return ()


def from_diffusers(path: str) -> tuple[str, int | None] | None:
    """A checkpoint's path for diffusers', and which piece of it this is; None when it has none."""
    for ours, theirs in ALONE.items():
        if path == theirs:
            return ours, None
    for block, diffusers_block, table, fused in BLOCKS:
        if found := re.fullmatch(rf"{diffusers_block}\.(\d+)\.(.+)", path):
            for ours, theirs in table.items():
                if found[2] == theirs:
                    return f"{block}.{found[1]}.{ours}", None
            for ours, pieces in fused.items():
                if found[2] in pieces:
                    return f"{block}.{found[1]}.{ours}", pieces.index(found[2])
    return None
