"""What Inspect finds out: measures against changes multiplied out, planted faults, and the words of every maker."""

import hashlib
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from lora_workbench.lora_files.inspection import inspection
from lora_workbench.lora_files.inspection_report import findings
from lora_workbench.lora_files.opening import open_lora
from lora_workbench.lora_files.places import places_of
from lora_workbench.training import lora_file

BLOCK = "lora_unet_input_blocks_4_1_transformer_blocks_{}_{}"
PARTS = ("attn1_to_q", "attn2_to_k", "ff_net_2", "proj_in")
LAYERS = [BLOCK.format(number, part) for number in range(4) for part in PARTS]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kohya(layers=LAYERS, rank=4, dtype=torch.float16):
    tensors = {}
    for seed, name in enumerate(layers):
        tensors[f"{name}.lora_down.weight"] = drawn(rank, 24, seed=seed).to(dtype)
        tensors[f"{name}.lora_up.weight"] = drawn(32, rank, seed=100 + seed).to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.fixture
def look(tmp_path):
    """Writes a file and inspects it."""

    def inspected(tensors, entries=None, name="star.safetensors"):
        save_file(tensors, tmp_path / name, entries)
        return inspection(open_lora(tmp_path / name))

    return inspected


# What the weights say


def test_norms_ranks_and_directions_are_those_of_the_changes_multiplied_out(look):
    tensors = kohya(dtype=torch.float32)
    found = look(tensors)
    squares = 0.0
    for layer in found.layers:
        change = 0.5 * tensors[f"{layer.name}.lora_up.weight"] @ tensors[f"{layer.name}.lora_down.weight"]
        energy = torch.linalg.svdvals(change.double()).square()
        assert layer.norm == pytest.approx(change.norm().item(), rel=1e-5)
        assert layer.used == int((energy.cumsum(0) < 0.9 * energy.sum()).sum()) + 1
        assert (layer.rank, layer.alpha, layer.kind, layer.parameters) == (4, 2.0, "lora", 4 * (24 + 32))
        squares += energy.sum().item()
    assert found.norm() == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert [layer.name for layer in found.layers] == LAYERS


def test_a_sound_file_has_nothing_to_watch_out_for(look):
    text = look(kohya(), {"ss_network_dim": "4"}).text()
    assert "Watch out" not in text
    assert "rank: 4 (all 16)" in text
    assert "alpha: 2 (all 16), which scales them by 0.5" in text
    assert "names: as kohya writes them" in text


def test_the_share_of_each_network_is_said(look):
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    tensors = kohya([*LAYERS, text])
    found = look(tensors)
    share = found.norm("clip_l") ** 2 / found.norm() ** 2
    assert 0.01 < share < 0.2
    assert f"CLIP-L {100 * share:.3g} %" in found.text()


def test_kinds_are_named_and_what_depends_on_the_model_is_said(look):
    tensors = kohya(LAYERS[:2])
    tensors[f"{LAYERS[0]}.dora_scale"] = torch.ones(32, 1)
    for part, shape in {"w1_a": (32, 3), "w1_b": (3, 24), "w2_a": (32, 3), "w2_b": (3, 24)}.items():
        tensors[f"{LAYERS[2]}.hada_{part}"] = drawn(*shape)
    tensors |= {f"{LAYERS[3]}.lokr_w1": drawn(4, 4), f"{LAYERS[3]}.lokr_w2": drawn(8, 6)}
    tensors[f"{LAYERS[4]}.oft_blocks"] = drawn(4, 8, 8)
    found = look(tensors)
    assert [layer.kind for layer in found.layers] == ["dora", "lora", "loha", "lokr", "oft"]
    dense = torch.kron(tensors[f"{LAYERS[3]}.lokr_w1"], tensors[f"{LAYERS[3]}.lokr_w2"])
    assert found.layers[3].norm == pytest.approx(dense.norm().item(), rel=1e-5)
    assert found.layers[4].norm is None
    assert "DoRA layers are measured before their magnitudes" in found.text()


def test_hashes_are_those_that_sites_look_files_up_by(look, tmp_path):
    found = look(kohya())
    data = (tmp_path / "star.safetensors").read_bytes()
    payload = data[8 + int.from_bytes(data[:8], "little") :]
    assert f"AutoV2 {hashlib.sha256(data).hexdigest()[:10].upper()}," in found.text()
    assert f"AutoV3 {hashlib.sha256(payload).hexdigest()[:12].upper()}," in found.text()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ("model", "IN04", "attention")),
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", ("model", "IN04", "cross-attention")),
        ("diffusion_model.output_blocks.5.1.transformer_blocks.1.ff.net.2", ("model", "OUT05", "feed-forward")),
        ("lora_unet_middle_block_1_proj_in", ("model", "MID", "other")),
        ("lora_unet_double_blocks_7_txt_mlp_0", ("model", "D07", "feed-forward")),
        ("lora_unet_single_blocks_37_linear1", ("model", "S37", "attention and feed-forward")),
        ("transformer.single_transformer_blocks.3.attn.to_v", ("model", "S03", "attention")),
        ("transformer.single_transformer_blocks.3.proj_mlp", ("model", "S03", "feed-forward")),
        ("transformer.transformer_blocks.12.attn.add_q_proj", ("model", "D12", "attention")),
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj", ("clip_g", "31", "attention")),
        ("text_encoder.text_model.encoder.layers.3.mlp.fc1", ("clip_l", "03", "feed-forward")),
        ("diffusion_model.layers.17.attention.qkv", ("model", "17", "attention")),
        ("lora_unet_blocks_999999999_x", ("model", "rest", "other")),
        ("somewhere", ("model", "rest", "other")),
    ],
)
def test_a_layer_is_placed_in_a_block_as_stack_apply_calls_it(name, place):
    found = places_of([name])[name]
    assert (found.network, found.block, found.part) == place


# Planted faults


def test_dead_layers_are_found(look):
    tensors = kohya()
    tensors[f"{LAYERS[3]}.lora_up.weight"].zero_()
    tensors[f"{LAYERS[9]}.lora_down.weight"].zero_()
    found = look(tensors)
    assert [layer.name for layer in found.dead] == [LAYERS[3], LAYERS[9]]
    assert findings(found) == [f"2 layers change nothing: {LAYERS[3]}, {LAYERS[9]}"]


def test_a_file_that_was_never_trained_changes_nothing(look):
    tensors = {name: tensor * 0 if "lora_up" in name else tensor for name, tensor in kohya().items()}
    assert "It changes nothing: every layer is zero" in look(tensors).text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found(look, value, dtype):
    tensors = kohya(dtype=dtype)
    name = f"{LAYERS[5]}.lora_up.weight"
    tensors[name][3, 2] = value
    found = look(tensors)
    assert found.broken == {name: 1}
    (finding,) = findings(found)
    assert finding == f"1 tensor holds values that are not finite, so pictures will be black or noise: {name}"
    assert math.isfinite(found.norm())


def test_large_values_that_are_finite_are_no_fault(look):
    tensors = kohya(dtype=torch.float32)
    tensors[f"{LAYERS[0]}.lora_up.weight"].fill_(3e38)
    assert look(tensors).broken == {}


def test_odd_ranks_are_found(look):
    tensors = kohya() | kohya([BLOCK.format(7, "attn1_to_q")], rank=6)
    found = look(tensors, {"ss_network_dim": "32"})
    assert findings(found) == [
        f"1 layer of another rank than 4: {BLOCK.format(7, 'attn1_to_q')} (6)",
        "It says its rank is 32, but its layers have rank 4 to 6: it was resized or merged.",
    ]


def test_a_layer_far_stronger_than_the_others_is_found(look):
    tensors = kohya()
    tensors[f"{LAYERS[2]}.lora_up.weight"] *= 60
    assert findings(look(tensors)) == [f"1 layer more than 30 times as strong as most: {LAYERS[2]}"]


def test_tensors_of_no_kind_are_found(look):
    tensors = kohya() | {"lora_unet_x.lora_up.weight": torch.ones(3, 2), "noise": torch.ones(2)}
    (finding,) = findings(look(tensors))
    assert finding == "2 layers or tensors are of no kind that ComfyUI reads: lora_unet_x, noise"
    text = look({"noise": torch.ones(2)}).text()
    assert "No layer in it is one that ComfyUI knows" in text


def test_a_file_that_says_another_family_is_found(look):
    flux = [f"lora_unet_double_blocks_{number}_img_attn_qkv" for number in range(3)]
    (finding,) = findings(look(kohya(flux), {"ss_base_model_version": "sdxl_base_v1-0"}))
    assert finding == "It says it is for SDXL, but its layers are those of FLUX."


def test_weights_that_are_not_those_that_were_hashed_are_found(look, tmp_path):
    path = tmp_path / "ours.safetensors"
    lora_file.write(path, kohya(), {})
    whole = open_lora(path)
    assert findings(inspection(whole)) == []
    changed = {name: tensor * 2 for name, tensor in whole.tensors.items()}
    (finding,) = findings(look(changed, whole.entries))
    assert finding.startswith("Its weights are not those its hash was made of")


def test_a_small_file_cannot_ask_for_a_huge_product(look):
    long = torch.ones(1, 300_000)
    parts = {"w1_a": long.t().contiguous(), "w1_b": long, "w2_a": long.t().contiguous(), "w2_b": long}
    tensors = {f"a.hada_{part}": tensor.half().clone() for part, tensor in parts.items()}
    tensors |= {"b.lora_down.weight": torch.ones(100_000, 1), "b.lora_up.weight": torch.ones(1, 100_000)}
    found = look(tensors)
    assert [layer.norm for layer in found.layers] == [None, None]


@pytest.mark.parametrize("shape", [(0, 24), (4, 0)])
def test_empty_matrices_are_told(look, shape):
    tensors = {"a.lora_down.weight": torch.ones(shape), "a.lora_up.weight": torch.ones(32, shape[0])}
    found = look(tensors)
    assert found.norm() == 0
    assert re.search("changes nothing|of no kind that ComfyUI reads: a", "".join(findings(found)))


# What the file says: as each maker writes


def test_kohyas_words(look):
    text = look(
        kohya(),
        {
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "2.0",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_output_name": "zork_v3",
            "ss_steps": "2400",
            "ss_num_train_images": "240",
            "ss_learning_rate": "0.0001",
            "ss_optimizer": "bitsandbytes.optim.adamw.AdamW8bit",
            "ss_training_finished_at": "1732300000.5",
            "ss_tag_frequency": json.dumps({"10_zork": {"zork": 24, "hat": 3}}),
            "ss_dataset_dirs": json.dumps({"10_zork": {"n_repeats": 10, "img_count": 24}}),
            "ss_clip_skip": "None",
            "ss_my_own": "kept",
        },
    ).text()
    for line in (
        "made by: kohya's scripts",
        "trigger words: zork",
        "title: zork_v3",
        "steps: 2400",
        "pictures: 240",
        "optimizer: bitsandbytes.optim.adamw.AdamW8bit",
        "trained at: 2024-11-22",
        "folder 10_zork: 24 pictures, 10 repeats",
        "commonest in its captions: zork (24), hat (3)",
        "ss_my_own: kept",
    ):
        assert f"\n{line}" in text
    assert "clip skip" not in text and "ss_tag_frequency" not in text


def test_ai_toolkits_words(look):
    layers = [f"diffusion_model.double_blocks.{number}.img_attn.qkv" for number in range(2)]
    tensors = {
        f"{name}.lora_{side}.weight": drawn(*shape) for name in layers for side, shape in (("A", (4, 8)), ("B", (9, 4)))
    }
    found = look(
        tensors,
        {
            "software": json.dumps({"name": "ai-toolkit", "repo": "https://example.com", "version": "0.7.9"}),
            "training_info": json.dumps({"step": 2000, "epoch": 99}),
            "ss_base_model_version": "flux1",
            "name": "zork",
        },
    )
    text = found.text()
    assert text.splitlines()[1].startswith("FLUX LoRA, rank 4, 2 layers")
    for line in (
        "made by: ai-toolkit 0.7.9",
        "title: zork",
        "steps: 2000",
        "epochs: 99",
        "names: as comfyui writes them",
    ):
        assert f"\n{line}" in text
    assert "alpha: none, so strength 1 is the product as it is" in text


def test_onetrainers_words(look):
    config = {
        "base_model_name": "sdxl.safetensors",
        "lora_rank": 4,
        "lora_alpha": 2.0,
        "epochs": 50,
        "optimizer": {"optimizer": "ADAFACTOR"},
        "learning_rate": 0.0003,
    }
    text = look(kohya(), {"ot_branch": "master", "ot_revision": "abc", "ot_config": json.dumps(config)}).text()
    for line in (
        "made by: OneTrainer",
        "trained on: sdxl.safetensors",
        "epochs: 50",
        "rank: 4",
        "alpha: 2.0",
        "optimizer: ADAFACTOR",
        "ot_branch: master",
    ):
        assert f"\n{line}" in text


def test_diffusers_words(look):
    layers = [f"transformer.single_transformer_blocks.{number}.attn.to_q" for number in range(2)]
    tensors = {
        f"{name}.lora_{side}.weight": drawn(*shape) for name in layers for side, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    said = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ["to_q"]}
    text = look(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(said)}).text()
    assert "made by: diffusers or another program with peft" in text
    assert "\nrank: 4\nalpha: 8\n" in text
    assert "names: as diffusers writes them" in text


def test_pictures_and_graphs_in_a_file_are_counted_and_not_printed(look):
    graph = json.dumps({str(number): {"class_type": "KSampler", "inputs": {}} for number in range(9)})
    text = look(kohya(), {"modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 5000, "workflow": graph}).text()
    assert "modelspec.thumbnail: a picture (5,023 characters)" in text
    assert f"workflow: 9 entries ({len(graph):,} characters)" in text
    assert len(text) < 3000


@pytest.mark.parametrize(
    "entries",
    [
        {"ss_tag_frequency": "[" * 100_000},
        {"software": '{"name": ' * 5_000, "training_info": "[1", "ot_config": "7"},
        {"ss_tag_frequency": '{"a": {"b": "c"}, "d": 3}', "ss_dataset_dirs": '{"x": 4, "y": {"img_count": [1]}}'},
        {"ss_training_finished_at": "1e300", "ss_network_dim": "9" * 5000, "a\nb\x1b[31m": "c\x07\r\nd"},
        {f"key {number}": "value" for number in range(500)},
        {"ss_output_name": "x" * 1_000_000},
    ],
)
def test_whatever_a_file_says_the_report_is_short_and_can_be_shown(look, entries):
    text = look(kohya(), entries).text()
    assert len(text) < 10_000
    assert all(line.isprintable() for line in text.split("\n"))
