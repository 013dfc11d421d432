import pytest

from lora_workbench.training.lora_family import family_of, mismatch, title

KOHYA = {
    "sdxl": ["lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight"],
    "sd1": [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    ],
    "sd3": ["lora_unet_joint_blocks_3_x_block_attn_qkv.lora_up.weight"],
    "flux": ["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_single_blocks_7_linear1.alpha"],
}
DIFFUSERS = {
    "sdxl": ["unet.down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_out.0.lora_A.weight"],
    "sd1": ["unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_q.lora_A.weight"],
    "sd3": ["transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"],
    "flux": ["transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight"],
}
OTHER_NAMES = {
    "sdxl": ["diffusion_model.middle_block.1.transformer_blocks.4.ff.net.2.lora_up.weight"],
    "sd1": ["diffusion_model.output_blocks.10.1.transformer_blocks.0.attn2.to_v.lora_up.weight"],
    "flux": ["diffusion_model.single_blocks.0.linear2.lora_A.weight"],
    "flux2": ["diffusion_model.double_stream_modulation_img.lin.lora_A.weight", "diffusion_model.double_blocks.0.x"],
    "sd3": ["diffusion_model.joint_blocks.3.x_block.attn.qkv.lora_A.weight"],
    "chroma": ["diffusion_model.distilled_guidance_layer.in_proj.lora_A.weight", "diffusion_model.double_blocks.0.x"],
    "qwen_image": ["diffusion_model.transformer_blocks.0.attn.add_q_proj.lora_A.weight"],
    "lumina2": ["diffusion_model.layers.3.attention.qkv.lora_A.weight"],
    "hunyuan_image": ["diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.0.lora_A.weight"],
    "hidream": ["diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight"],
    "aura_flow": ["diffusion_model.single_layers.3.attn.w1q.lora_A.weight"],
    "pixart": ["diffusion_model.blocks.3.cross_attn.kv_linear.lora_A.weight"],
}
OUR_NAMES = {
    family: ["lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_") for name in names]
    for family, names in OTHER_NAMES.items()
    if names[0].startswith("diffusion_model.")
}


@pytest.mark.parametrize(
    "names", [KOHYA, DIFFUSERS, OTHER_NAMES, OUR_NAMES], ids=["kohya", "diffusers", "comfyui", "ours"]
)
def test_each_family_is_known_by_its_layers(names):
    assert {family: family_of(keys) for family, keys in names.items()} == {family: family for family in names}


def test_a_flux_file_of_diffusers_is_not_taken_for_sd3_by_its_double_blocks():
    """What ai-toolkit writes: both kinds of blocks, the double ones called as SD 3's are."""
    double = "transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight"
    assert family_of([double, "transformer.single_transformer_blocks.37.attn.to_q.lora_A.weight"]) == "flux"


def test_a_qwen_image_file_of_diffusers_is_known_by_how_many_blocks_it_has():
    blocks = [f"transformer.transformer_blocks.{number}.attn.add_k_proj.lora_A.weight" for number in range(60)]
    assert (family_of(blocks), family_of(blocks[:24])) == ("qwen_image", "sd3")


def test_an_sdxl_file_is_known_by_its_second_text_encoder():
    assert family_of(["lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha"]) == "sdxl"


def test_layers_of_sdxl_convolutions_are_not_taken_for_sd1():
    assert family_of(["lora_unet_input_blocks_1_0_in_layers_2.alpha", "lora_unet_output_blocks_8_0_skip.alpha"]) is None


@pytest.mark.parametrize(
    ("version", "family"),
    [
        ("sdxl_base_v1-0", "sdxl"),
        ("sd_v1", "sd1"),
        ("sd_1.5", "sd1"),
        ("sd_v2_768_v", "sd2"),
        ("sd3.5_large", "sd3"),
        ("flux1", "flux"),
        ("flux2_klein_9b", "flux2"),
        ("hunyuan_video", None),
        ("chroma", "chroma"),
        ("Qwen-Image", "qwen_image"),
        ("zimage", "z_image"),
        ("lumina-2", "lumina2"),
        ("hunyuan-image-2.1", "hunyuan_image"),
    ],
)
def test_the_metadata_of_trainers_is_understood(version, family):
    assert family_of({"ss_base_model_version": version}) == family


def test_the_architecture_of_the_model_spec_is_understood():
    assert family_of({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}) == "sdxl"
    assert family_of({"modelspec.architecture": "flux-1-dev/lora"}) == "flux"
    assert family_of({"modelspec.architecture": "stable-diffusion-v1/lora"}) == "sd1"


def test_what_names_no_family_has_none():
    assert family_of([]) is None
    assert family_of({"format": "pt"}) is None
    assert family_of(["something.lora_A.weight"]) is None


def test_only_a_sure_mismatch_is_one():
    assert mismatch("flux", "sdxl")
    assert mismatch("sd1", "sdxl")
    assert not mismatch("sdxl", "sdxl")
    assert not mismatch(None, "sdxl")
    assert not mismatch("flux", "unknown:WAN21")
    assert not mismatch("sd1", "sd2")
    assert not mismatch("flux", "chroma")
    assert not mismatch("lumina2", "z_image")
    assert mismatch("flux", "qwen_image")
    assert mismatch("sd3", "flux2")


def test_families_have_names_for_people():
    assert [title("sdxl"), title("sd1"), title("unknown:WAN21"), title("flux2")] == [
        "SDXL",
        "SD 1.5",
        "WAN21",
        "FLUX.2",
    ]
