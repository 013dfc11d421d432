import pytest

from lora_workbench.training.families import ATTENTION, ATTENTION_AND_FEED_FORWARD, FAMILIES, FLUX, LAYER_PRESETS, SDXL

SDXL_ATTENTION = [
    f"input_blocks.4.1.transformer_blocks.0.{attention}.{part}"
    for attention in ("attn1", "attn2")
    for part in ("to_q", "to_k", "to_v", "to_out.0")
]
SDXL_FEED_FORWARD = [
    "middle_block.1.transformer_blocks.9.ff.net.0.proj",
    "output_blocks.0.1.transformer_blocks.3.ff.net.2",
]
SDXL_OTHER = [
    "input_blocks.0.0",
    "time_embed.0",
    "label_emb.0.2",
    "input_blocks.1.0.emb_layers.1",
    "input_blocks.4.1.proj_in",
    "out.2",
    "input_blocks.4.1.transformer_blocks.0.attn1.to_out",
]
FLUX_ATTENTION = [
    *(f"double_blocks.18.{stream}_attn.{part}" for stream in ("img", "txt") for part in ("qkv", "proj")),
    "single_blocks.37.linear1",
    "single_blocks.0.linear2",
]
FLUX_FEED_FORWARD = [f"double_blocks.0.{stream}_mlp.{part}" for stream in ("img", "txt") for part in (0, 2)]
FLUX_OTHER = [
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "guidance_in.out_layer",
    "vector_in.in_layer",
    "double_blocks.0.img_mod.lin",
    "single_blocks.0.modulation.lin",
    "final_layer.linear",
]


@pytest.mark.parametrize(
    ("family", "attention", "feed_forward", "other"),
    [(SDXL, SDXL_ATTENTION, SDXL_FEED_FORWARD, SDXL_OTHER), (FLUX, FLUX_ATTENTION, FLUX_FEED_FORWARD, FLUX_OTHER)],
    ids=["sdxl", "flux"],
)
def test_each_preset_names_exactly_its_layers(family, attention, feed_forward, other):
    def chosen(preset):
        return [name for name in attention + feed_forward + other if family.layer_pattern(preset).search(name)]

    assert chosen(ATTENTION) == attention
    assert chosen(ATTENTION_AND_FEED_FORWARD) == attention + feed_forward


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_knows_every_preset(family):
    assert set(family.layers) == set(LAYER_PRESETS)


def test_an_unknown_preset_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'attention'"):
        SDXL.layer_pattern("everything")


def test_only_a_family_with_a_guidance_embedding_is_fed_a_guidance_and_it_is_one():
    assert FLUX.guidance == 1.0
    assert SDXL.guidance is None
