"""Whole safetensors files that make no sense as LoRAs, each made anew from a seed."""

from __future__ import annotations

import math
import random
import struct

from hostilefiles import KEY, SEED, packed

DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "I64", "I8", "U8", "BOOL")
SIZES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
ENDINGS = (
    "lora_up.weight",
    "lora_down.weight",
    "alpha",
    "lora_mid.weight",
    "dora_scale",
    "diff",
    "diff_b",
    "hada_w1_a",
)
ENDINGS += ("hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
ENDINGS += ("oft_blocks", "lora_A.weight", "lora_B.weight", "reshape_weight", "set_weight", "w_norm", "strange")
LAYERS = (KEY, "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", "lora_te1_text_model_x")
LAYERS += ("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_k", "nothing known")
LAYERS += ("diffusion_model.double_blocks.0.img_attn.qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_")
LAYERS += ("lora_unet_final_layer_adaLN_modulation_1", "unet.down_blocks.1.attentions.0.proj_in", "bundle_emb.x.clip_l")


def odd_files(count: int) -> list[bytes]:
    """Whole safetensors files whose tensors make no sense together: any part of any layer, of any size and type."""
    chance = random.Random(SEED + 1)
    return [odd(chance) for _ in range(count)]


def odd(random: random.Random) -> bytes:
    header, payload = {"__metadata__": {"ss_base_model_version": "flux1", "ss_network_dim": "many"}}, b""
    one = random.choice(LAYERS)
    for _ in range(random.randint(0, 8)):
        name = f"{one if random.random() < 0.7 else random.choice(LAYERS)}.{random.choice(ENDINGS)}"
        if name in header:
            continue
        dtype = random.choice(DTYPES) if random.random() < 0.3 else "F32"
        shape = [random.choice((0, 1, 2, 3, 4, 7, 21)) for _ in range(random.choice((0, 1, 2, 2, 2, 2, 3, 4, 5)))]
        size = SIZES.get(dtype, 1) * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + size]}
        payload += (
            b"".join(struct.pack("<f", random.gauss(0, 1)) for _ in range(size // 4)) if dtype == "F32" else bytes(size)
        )
    return packed(header, payload)
