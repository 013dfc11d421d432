"""Names of weights in model files, however the file was saved."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_workbench.lora_files.extraction import extracted
from lora_workbench.lora_files.layers import layers_of
from lora_workbench.lora_files.model_files import file_pairs, places_of

NETWORK = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


def name_of(key):
    return [place.name for place in places_of([key, "model.diffusion_model.out.2.weight"]).values()][0]


def watch(done, total):
    assert 0 < done <= total


@pytest.mark.parametrize(
    "key, name",
    [
        (f"model.diffusion_model.{NETWORK}.weight", f"lora_unet_{NETWORK.replace('.', '_')}"),
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.bias", ""),
        (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.weight",
            "lora_te1_text_model_encoder_layers_3_mlp_fc1",
        ),
        (
            "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight",
            "lora_te2_text_model_encoder_layers_31_mlp_fc2",
        ),
        ("conditioner.embedders.1.model.transformer.resblocks.31.ln_1.weight", ""),
        ("conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight", ""),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.out_proj.weight",
            "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
        ),
        (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        ),
        (
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ),
    ],
)
def test_the_names_are_kohyas(key, name):
    assert name_of(key) == name


def test_openclips_one_matrix_is_three_layers():
    places = places_of(["conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight"])
    layers = [f"lora_te2_text_model_encoder_layers_2_self_attn_{part}_proj" for part in "qkv"]
    assert list(places) == layers and [(place.part, place.parts) for place in places.values()] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_files_of_the_diffusion_model_alone_need_no_prefix():
    for key, name in (
        ("double_blocks.0.img_attn.qkv.weight", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("transformer_blocks.0.attn.to_q.weight", "lora_transformer_transformer_blocks_0_attn_to_q"),
        ("down_blocks.1.attentions.0.proj_in.weight", "lora_unet_down_blocks_1_attentions_0_proj_in"),
    ):
        assert [place.name for place in places_of([key]).values()] == [name]
    assert places_of(["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight"]).keys() == {
        "lora_unet_out_2"
    }


def save(folder, name, **tensors):
    path = folder / name
    save_file({key.replace("__", "."): tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_checkpoint_and_a_file_of_the_model_alone_can_be_compared(tmp_path):
    weight, change = drawn(40, 30), drawn(40, 2) @ drawn(2, 30, seed=1)
    base = save(tmp_path, "base.safetensors", model__diffusion_model__double_blocks__0__x__weight=weight)
    tuned = save(tmp_path, "tuned.safetensors", double_blocks__0__x__weight=weight + change)
    result = extracted(file_pairs(tuned, base, watch), rank=8)
    torch.testing.assert_close(
        layers_of(result.tensors)["lora_unet_double_blocks_0_x"].change(), change, atol=1e-4, rtol=0
    )
    assert result.ranks == {"lora_unet_double_blocks_0_x": 2}


def test_a_change_of_openclips_keys_alone_changes_that_layer_alone(tmp_path):
    key = "conditioner__embedders__1__model__transformer__resblocks__0__attn__in_proj_weight"
    weight, changed = drawn(90, 30), drawn(90, 30)
    changed[30:60] += torch.outer(drawn(30, seed=3), drawn(30, seed=4))
    base, tuned = (
        save(tmp_path, "base.safetensors", **{key: weight}),
        save(tmp_path, "tuned.safetensors", **{key: changed}),
    )
    result = extracted(file_pairs(tuned, base, watch), rank=4)
    name = "lora_te2_text_model_encoder_layers_0_self_attn_k_proj"
    assert result.ranks == {name: 1}
    change = layers_of(result.tensors)[name].change()
    torch.testing.assert_close(change, (changed - weight)[30:60], rtol=1e-4, atol=1e-4)


def test_scaled_8_bit_weights_are_read_with_their_scale(tmp_path):
    weight = drawn(40, 30)
    stored, scale = (weight / 0.03).to(torch.float8_e4m3fn), torch.tensor(0.03)
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    plain = save(tmp_path, "plain.safetensors", x__weight=stored.float() * 0.03)
    for extra in ({"x__scale_weight": scale}, {"x__weight_scale": scale, "x__comfy_quant": note}):
        scaled = save(tmp_path, "scaled.safetensors", x__weight=stored, **extra)
        (pair,) = file_pairs(scaled, plain, watch)
        torch.testing.assert_close(pair.weight, pair.base)
        assert pair.stored.name == "float8_e4m3fn"


def test_what_cannot_be_read_is_a_sentence(tmp_path):
    note = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    plain = save(tmp_path, "plain.safetensors", x__weight=drawn(4, 4))
    packed = save(tmp_path, "packed.safetensors", x__weight=drawn(4, 4).to(torch.float8_e4m3fn), x__comfy_quant=note)
    whole = save(tmp_path, "whole.safetensors", x__weight=torch.ones(4, 4, dtype=torch.uint8))
    for other in (packed, whole):
        with pytest.raises(ValueError, match="'x.weight' is stored in a form whose numbers cannot be read here"):
            list(file_pairs(plain, other, watch))
    stranger = save(tmp_path, "stranger.safetensors", y__weight=drawn(4, 4))
    with pytest.raises(ValueError, match="'plain.safetensors' and 'stranger.safetensors' have no layer in common"):
        list(file_pairs(plain, stranger, watch))
    (tmp_path / "broken.safetensors").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="The model file 'broken.safetensors' cannot be read"):
        list(file_pairs(plain, tmp_path / "broken.safetensors", watch))
