"""Names of layers in the forms of kohya, diffusers and ComfyUI, and fused layers in pieces."""

import pytest
import torch

from lora_workbench.lora_files import forms
from lora_workbench.lora_files.forms import COMFYUI, DIFFUSERS, FOLD, KOHYA, converted, form_of
from lora_workbench.lora_files.fused import fused, in_pieces
from lora_workbench.lora_files.layers import ALPHA, DOWN, UP, layers_of

every_form = pytest.mark.parametrize("form", [KOHYA, DIFFUSERS, COMFYUI])
QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def layer(name, rows=6, columns=5, rank=2, alpha=1.5, ends=("lora_up.weight", "lora_down.weight"), seed=0):
    random = torch.Generator().manual_seed(seed)
    tensors = {f"{name}.{ends[0]}": torch.randn(rows, rank, generator=random)}
    tensors[f"{name}.{ends[1]}"] = torch.randn(rank, columns, generator=random)
    return tensors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def layers(*names, **given):
    return {key: tensor for name in names for key, tensor in layer(name, **given).items()}


def called(tensors):
    return list(layers_of(tensors))


def same(one, other):
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).tolist()


# Names

SDXL = {
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_q",
        "diffusion_model.input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    ),
    "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
        "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn2.processor.to_out",
        "diffusion_model.output_blocks.5.1.transformer_blocks.1.attn2.to_out.0",
    ),
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        "diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj",
    ),
    "lora_unet_input_blocks_7_0_skip_connection": (
        "unet.down_blocks.2.resnets.0.conv_shortcut",
        "diffusion_model.input_blocks.7.0.skip_connection",
    ),
    "lora_unet_input_blocks_6_0_op": (
        "unet.down_blocks.1.downsamplers.0.conv",
        "diffusion_model.input_blocks.6.0.op",
    ),
    "lora_unet_output_blocks_2_2_conv": (
        "unet.up_blocks.0.upsamplers.0.conv",
        "diffusion_model.output_blocks.2.2.conv",
    ),
    "lora_unet_output_blocks_0_1_proj_in": (
        "unet.up_blocks.0.attentions.0.proj_in",
        "diffusion_model.output_blocks.0.1.proj_in",
    ),
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj",
    ),
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": (
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.31.mlp.fc2",
    ),
}
FLUX = {
    "lora_unet_double_blocks_18_txt_mlp_2": (
        "transformer.transformer_blocks.18.ff_context.net.2",
        "diffusion_model.double_blocks.18.txt_mlp.2",
    ),
    "lora_unet_single_blocks_37_modulation_lin": (
        "transformer.single_transformer_blocks.37.norm.linear",
        "diffusion_model.single_blocks.37.modulation.lin",
    ),
    "lora_unet_guidance_in_in_layer": (
        "transformer.time_text_embed.guidance_embedder.linear_1",
        "diffusion_model.guidance_in.in_layer",
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_out_proj": (
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.out_proj",
    ),
}


@pytest.mark.parametrize("table", [SDXL, FLUX], ids=["sdxl", "flux"])
def test_each_form_calls_layers_as_its_programs_do(table):
    tensors = layers(*table)
    assert called(converted(tensors, DIFFUSERS)) == [theirs for theirs, _ in table.values()]
    assert called(converted(tensors, COMFYUI)) == [ours for _, ours in table.values()]
    for form in (DIFFUSERS, COMFYUI):
        assert form_of(converted(tensors, form)) == form
        assert same(converted(converted(tensors, form), KOHYA), tensors)


def test_the_form_of_mixed_or_unknown_names_is_not_guessed():
    assert form_of([*SDXL, *(theirs for theirs, _ in SDXL.values())]) is None
    assert form_of(["weight", "bias"]) is None


T5 = "lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0"


def test_t5_has_a_name_in_comfyuis_form_and_none_that_diffusers_would_read():
    tensors = layers(T5, "lora_unet_double_blocks_0_img_attn_proj")
    result = converted(tensors, COMFYUI)
    assert called(result)[0] == "text_encoders.t5xxl.transformer.encoder.block.23.layer.1.DenseReluDense.wi_0"
    assert same(converted(result, KOHYA), tensors)
    second = {name.replace("lora_te3_", "lora_te2_"): tensor for name, tensor in tensors.items()}
    assert same(converted(second, KOHYA), tensors)  # OneTrainer counts FLUX's encoders without CLIP-G
    with pytest.raises(ValueError, match=f"'{T5}': this layer has no name in the form 'diffusers'"):
        converted(tensors, DIFFUSERS)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", ("lora_B.weight", "lora_A.weight")),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", ("lora.up.weight", "lora.down.weight")),
        ("base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", ("lora_B.default.weight",) * 2),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", ("lora_B", "lora_A")),
        ("lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", ("lora_up.weight", "lora_down.weight")),
        (
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            ("lora_up.weight", "lora_down.weight"),
        ),
    ],
)
def test_older_and_other_names_of_a_layer_are_understood(name, ends):
    ends = (ends[0], ends[1].replace("lora_B.default", "lora_A.default"))
    result = converted(layer(name, ends=ends), KOHYA)
    expected = layer("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q")
    assert same(result, expected)


def test_the_oldest_names_of_a_text_encoder_are_understood():
    name = "text_encoder.text_model.encoder.layers.0.self_attn.to_out"
    tensors = layer(name, alpha=None)
    old = {key.replace(".lora_up.", "_lora.up.").replace(".lora_down.", "_lora.down."): tensors[key] for key in tensors}
    result = converted(old, KOHYA)
    assert called(result) == ["lora_te1_text_model_encoder_layers_0_self_attn_out_proj"]


def test_kohya_calls_sd15_as_diffusers_does_and_its_one_clip_te():
    names = [
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_up_blocks_3_attentions_2_proj_out",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
    ]
    tensors = layers(*names)
    for form in (DIFFUSERS, COMFYUI):
        assert same(converted(converted(tensors, form), KOHYA), tensors)
    assert "diffusion_model.input_blocks.2.1.transformer_blocks.0.attn1.to_q" in called(converted(tensors, COMFYUI))


def test_blocks_with_one_resnet_are_told_by_what_fits():
    names = [
        "input_blocks_3_1_proj_in",
        "output_blocks_2_1_proj_in",
        "output_blocks_3_1_proj_in",
        "output_blocks_1_2_conv",
    ]
    tensors = layers(*(f"lora_unet_{name}" for name in names))
    result = converted(tensors, DIFFUSERS)
    assert called(result)[:3] == [
        "unet.down_blocks.1.attentions.0.proj_in",
        "unet.up_blocks.1.attentions.0.proj_in",
        "unet.up_blocks.1.attentions.1.proj_in",
    ]


def test_a_few_blocks_of_sdxl_alone_stay_those_of_sdxl():
    names = [f"unet.up_blocks.0.attentions.{place}.transformer_blocks.2.attn1.to_q" for place in (0, 1)]
    assert called(converted(layers(*names), COMFYUI)) == [
        f"diffusion_model.output_blocks.{place}.1.transformer_blocks.2.attn1.to_q" for place in (0, 1)
    ]


# What is refused


@every_form
@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_double_blocks_0_img_attn_something",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn3.to_q",
        "unet.down_blocks.1.attentions.7000.nothing",
        "lora_te1_text_model_encoder_layers_0_self_attn",
        "anything",
        "lora_unet_",
    ],
)
def test_an_unknown_layer_is_named(name, form):
    with pytest.raises(ValueError, match=f"'{name}': no such layer of SDXL, SD 1.5 or FLUX is known"):
        converted(layer(name), form)


def test_other_families_are_named():
    name = "transformer.transformer_blocks.40.attn.add_q_proj"
    with pytest.raises(ValueError, match="names of Qwen-Image layers are not known here"):
        converted(layer(name), KOHYA)


def test_two_names_of_one_layer_are_refused():
    tensors = layers("lora_unet_img_in", "diffusion_model.img_in", "lora_unet_double_blocks_0_img_attn_proj")
    with pytest.raises(ValueError, match="'diffusion_model.img_in' and 'lora_unet_img_in' are the same layer"):
        converted(tensors, KOHYA)


def test_half_a_layer_is_refused():
    tensors = layer("lora_unet_img_in")
    del tensors["lora_unet_img_in.lora_up.weight"]
    with pytest.raises(
        ValueError, match="'lora_unet_img_in' holds 'lora_down.weight', 'alpha', which make no LoRA layer"
    ):
        converted(tensors, COMFYUI)


def test_what_other_kinds_are_made_of_is_renamed_where_their_layer_is_whole():
    name, other = "lora_unet_double_blocks_0_img_attn_proj", "transformer.transformer_blocks.0.attn.to_out.0"
    loha = {f"{name}.hada_w{number}_{side}": torch.randn(4, 4) for number in (1, 2) for side in "ab"}
    lokr = {f"lora_unet_single_blocks_0_linear2.{part}": torch.randn(2, 2) for part in ("lokr_w1", "lokr_w2")}
    dora = layer("lora_unet_double_blocks_1_img_attn_proj")
    dora["lora_unet_double_blocks_1_img_attn_proj.dora_scale"] = torch.randn(6, 1)
    tensors = loha | lokr | dora
    result = converted(tensors, DIFFUSERS)
    assert torch.equal(result[f"{other}.hada_w1_a"], loha[f"{name}.hada_w1_a"])
    assert "transformer.transformer_blocks.1.attn.to_out.0.dora_scale" in result
    assert same(converted(result, KOHYA), tensors)


def test_other_kinds_on_fused_layers_are_refused():
    tensors = {f"{QKV}.hada_w{number}_{side}": torch.randn(6, 6) for number in (1, 2) for side in "ab"}
    with pytest.raises(ValueError, match=f"'{QKV}' is loha, and this form has its layer fused or in pieces"):
        converted(tensors, DIFFUSERS)
    assert len(converted(tensors, COMFYUI)) == 4


def test_embeddings_beside_the_layers_are_kept():
    tensors = layer("lora_unet_img_in") | {"bundle_emb.zork.clip_l": torch.randn(2, 4)}
    assert "bundle_emb.zork.clip_l" in converted(tensors, DIFFUSERS)


# Fused layers


def change(tensors):
    """What diffusers' pieces or one fused layer add up to, rows in order; zero rows where a piece is missing."""
    found = list(layers_of(tensors).values())
    return torch.cat([layer.change() for layer in found])


@pytest.mark.parametrize("alpha", [None, 3.0, 0.37])
def test_a_fused_layer_in_pieces_changes_what_it_did(alpha):
    tensors = layer("lora_unet_single_blocks_0_linear1", rows=14, rank=3, alpha=alpha)
    pieces = converted(tensors, DIFFUSERS)
    assert [name.rpartition(".")[2] for name in called(pieces)] == ["to_q", "to_k", "to_v", "proj_mlp"]
    torch.testing.assert_close(change(pieces), change(tensors), rtol=1e-6, atol=1e-6)
    assert same(converted(pieces, KOHYA), tensors)


def pieces_of(ranks, alphas=(2.0, 2.0, 2.0), dtype=torch.float32):
    """diffusers' q, k and v, each trained for itself; rank 0 for one that was not."""
    tensors = {}
    for number, (name, rank, alpha) in enumerate(zip("qkv", ranks, alphas, strict=True)):
        if rank:
            key = f"transformer.transformer_blocks.0.attn.to_{name}"
            own = layer(key, rows=4, rank=rank, alpha=alpha, ends=("lora_B.weight", "lora_A.weight"), seed=number)
            tensors |= {name: tensor.to(dtype) for name, tensor in own.items()}
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("alphas", [(2.0, 2.0, 2.0), (None, None, None), (1.7, 1.7, 1.7)], ids=str)
@pytest.mark.parametrize("ranks", [(2, 2, 2), (3, 3, 3), (2, 0, 2), (0, 5, 0)], ids=str)
def test_pieces_trained_for_themselves_are_stacked_and_come_back(ranks, alphas, dtype):
    tensors = pieces_of(ranks, alphas, dtype)
    result = converted(tensors, KOHYA)
    assert called(result) == [QKV] and len(result[f"{QKV}.lora_down.weight"]) == sum(ranks)
    whole = torch.zeros(12, 5)
    for name, own in layers_of(tensors).items():
        start = 4 * "qkv".index(name[-1])
        whole[start : start + 4] = own.change()
    torch.testing.assert_close(change(result), whole, rtol=1e-5, atol=1e-6)
    assert same(converted(result, DIFFUSERS), tensors)


def test_pieces_of_other_ranks_and_scales_are_stacked_with_their_effect():
    tensors = pieces_of((1, 2, 4), (1.0, 4.0, 2.0))
    result = converted(tensors, KOHYA)
    torch.testing.assert_close(change(result), change(tensors), rtol=1e-6, atol=1e-6)


def random_parts(random, count):
    """A fused layer as files have it: dense, stacked, with zeros where they may be."""
    shares = {3: (1, 1, 1), 4: (1, 1, 1, 4)}[count]
    rank = int(torch.randint(1, 7, (), generator=random))
    up = torch.randn(2 * sum(shares), rank, generator=random)
    down = torch.randn(rank, 5, generator=random)
    chance = torch.rand((), generator=random)
    if chance < 0.2:
        up.zero_()
    elif chance < 0.4:
        owners = torch.randint(count, (rank,), generator=random).sort().values
        rows = torch.repeat_interleave(torch.arange(count), 2 * torch.tensor(shares))
        up[rows[:, None] != owners] = 0.0
    elif chance < 0.6:
        up[up < 0] = -0.0
    if torch.rand((), generator=random) < 0.2:
        down[:] = down[0]
    parts = {UP: up, DOWN: down}
    return parts | ({ALPHA: torch.tensor(1.5 * rank)} if torch.rand((), generator=random) < 0.7 else {})


@pytest.mark.parametrize("count", [3, 4])
def test_any_fused_layer_comes_back_to_the_last_bit(count):
    random = torch.Generator().manual_seed(0)
    stacked = 0
    for _ in range(300):
        parts = random_parts(random, count)
        pieces = in_pieces(parts, count)
        stacked += len(pieces[next(iter(pieces))][DOWN]) < len(parts[DOWN])
        assert same(fused(pieces, count), parts)
    assert 10 < stacked < 290


def test_rows_that_cannot_be_shared_out_are_said():
    with pytest.raises(
        ValueError, match=f"'{QKV}' cannot be converted: its 7 rows cannot be shared out among 3 layers"
    ):
        converted(layer(QKV, rows=7), DIFFUSERS)


def test_the_last_layer_of_flux_has_its_halves_swapped():
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = layer(name, rows=4)
    result = converted(tensors, DIFFUSERS)
    up = result["transformer.norm_out.linear.lora_B.weight"]
    assert torch.equal(up, tensors[f"{name}.lora_up.weight"][[2, 3, 0, 1]])
    assert same(converted(result, COMFYUI), converted(tensors, COMFYUI))


# Alpha


@every_form
def test_folding_leaves_the_change_and_no_alpha(form):
    tensors = layers("lora_unet_img_in", "lora_unet_double_blocks_3_img_mlp_0", alpha=0.3, rank=4)
    result = converted(tensors, form, FOLD)
    assert not [name for name in result if name.endswith(".alpha")]
    torch.testing.assert_close(change(result), change(tensors), rtol=1e-6, atol=1e-7)


def test_folding_shares_powers_of_two_so_that_fp16_holds_small_numbers():
    tensors = {name: tensor.half() * 0.001 for name, tensor in layer("lora_unet_img_in", rank=64, alpha=None).items()}
    tensors["lora_unet_img_in.alpha"] = torch.tensor(1.0)
    result = converted(tensors, KOHYA, FOLD)
    difference = change(result) - change(tensors)
    assert difference.norm() < 5e-4 * change(tensors).norm()  # 1e-3 with all of it in one factor


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr of products"])
def test_other_kinds_are_folded_too(kind):
    parts = {
        "loha": {f"hada_w{number}_{side}": (4, 4) for number in (1, 2) for side in "ab"},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3)},
        "lokr of products": {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 3)},
    }[kind]
    tensors = {f"lora_unet_img_in.{part}": torch.randn(shape) for part, shape in parts.items()}
    tensors["lora_unet_img_in.alpha"] = torch.tensor(0.7)
    result = converted(tensors, COMFYUI, FOLD)
    assert "diffusion_model.img_in.alpha" not in result
    torch.testing.assert_close(change(result), change(tensors), rtol=1e-5, atol=1e-6)


def test_an_oft_keeps_its_alpha_which_is_a_limit():
    tensors = {"lora_unet_img_in.oft_blocks": torch.randn(2, 3, 3), "lora_unet_img_in.alpha": torch.tensor(0.1)}
    assert "lora_unet_img_in.alpha" in converted(tensors, KOHYA, FOLD)


def test_nothing_given_is_changed():
    tensors = layers(QKV, "lora_unet_final_layer_adaLN_modulation_1", "lora_unet_img_in")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for form in (KOHYA, DIFFUSERS, COMFYUI):
        for alpha in (forms.KEEP, FOLD):
            for tensor in converted(tensors, form, alpha).values():
                tensor.mul_(1)
    assert same(before, tensors)
