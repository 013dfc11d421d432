import re

import pytest

from lora_workbench.training.families import (
    ATTENTION,
    ATTENTION_AND_FEED_FORWARD,
    CHROMA,
    FAMILIES,
    FLUX,
    FULL,
    LAYER_PRESETS,
    SCHNELL,
    SD3,
    SD15,
    SD35_LARGE,
    SD35_MEDIUM,
    SDXL,
)

SDXL_ATTENTION = [
    f"input_blocks.4.1.transformer_blocks.0.{attention}.{part}"
    for attention in ("attn1", "attn2")
    for part in ("to_q", "to_k", "to_v", "to_out.0")
]
SDXL_FEED_FORWARD = [
    "middle_block.1.transformer_blocks.9.ff.net.0.proj",
    "output_blocks.0.1.transformer_blocks.3.ff.net.2",
]
SDXL_PROJECTIONS = ["input_blocks.4.1.proj_in", "output_blocks.0.1.proj_out"]
SDXL_OTHER = [
    "input_blocks.0.0",
    "time_embed.0",
    "label_emb.0.2",
    "input_blocks.1.0.emb_layers.1",
    "out.2",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_out",
]
FLUX_ATTENTION = [
    *(f"double_blocks.18.{stream}_attn.{part}" for stream in ("img", "txt") for part in ("qkv", "proj")),
    "single_blocks.37.linear1",
    "single_blocks.0.linear2",
]
FLUX_FEED_FORWARD = [f"double_blocks.0.{stream}_mlp.{part}" for stream in ("img", "txt") for part in (0, 2)]
FLUX_MODULATION = ["double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin", "single_blocks.0.modulation.lin"]
FLUX_OTHER = [
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "guidance_in.out_layer",
    "vector_in.in_layer",
    "final_layer.linear",
]
SD3_BLOCKS = [f"joint_blocks.{number}.{stream}_block" for number in (0, 37) for stream in ("x", "context")]
SD3_ATTENTION = [f"{block}.{layer}" for block in SD3_BLOCKS for layer in ("attn.qkv", "attn.proj", "attn2.qkv")]
SD3_FEED_FORWARD = [f"{block}.mlp.fc{number}" for block in SD3_BLOCKS for number in (1, 2)]
SD3_MODULATION = [f"{block}.adaLN_modulation.1" for block in SD3_BLOCKS]
SD3_OTHER = ["x_embedder.proj", "context_embedder", "t_embedder.mlp.0", "y_embedder.mlp.2", "final_layer.linear"]
SD3_OTHER += ["final_layer.adaLN_modulation.1"]


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward", "rest", "other"),
    [
        (SDXL, SDXL_ATTENTION, SDXL_FEED_FORWARD, SDXL_PROJECTIONS, SDXL_OTHER),
        (SD15, SDXL_ATTENTION, SDXL_FEED_FORWARD, SDXL_PROJECTIONS, SDXL_OTHER),
        (FLUX, FLUX_ATTENTION, FLUX_FEED_FORWARD, FLUX_MODULATION, FLUX_OTHER),
        (SD3, SD3_ATTENTION, SD3_FEED_FORWARD, SD3_MODULATION, SD3_OTHER),
    ],
    ids=["sdxl", "sd15", "flux", "sd3"],
)
def test_each_preset_names_exactly_its_layers(family, attention, feed_forward, rest, other):
    def chosen(preset):
        names = attention + feed_forward + rest + other
        return [name for name in names if re.search(family.layers[preset], name)]

    assert chosen(ATTENTION) == attention
    assert chosen(ATTENTION_AND_FEED_FORWARD) == attention + feed_forward
    assert chosen(FULL) == attention + feed_forward + rest


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_knows_every_preset(family):
    assert set(family.layers) == set(LAYER_PRESETS)


def test_only_a_family_with_a_guidance_embedding_is_fed_a_guidance_and_it_is_one():
    assert FLUX.guidance == SCHNELL.guidance == 1.0
    assert {family.guidance for family in (SDXL, SD15, SD3, SD35_MEDIUM, SD35_LARGE, CHROMA)} == {None}


def test_what_is_one_family_for_training_still_says_in_a_file_which_model_it_is():
    assert {family.name for family in (SD3, SD35_MEDIUM, SD35_LARGE)} == {"sd3"}
    assert len({family.base_model_version for family in (SD3, SD35_MEDIUM, SD35_LARGE)}) == 3
    assert (FLUX.name, FLUX.architecture) != (SCHNELL.name, SCHNELL.architecture) and SCHNELL.name == FLUX.name
