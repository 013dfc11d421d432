"""Step 0 of a warm start answers as ComfyUI's loader does with the same file, whatever form the file has."""

import re

import comfy.utils
import hosttoys
import pytest
import torch
from hostanswers import denoised_by_comfyui, denoised_by_us
from safetensors.torch import save_file

from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.new_tokens import NewTokens
from lora_workbench.nodes.host.warm_start import warm_start
from lora_workbench.training.config import ATTENTION_AND_FEED_FORWARD, KINDS, LoraConfig
from lora_workbench.training.embeddings import bundled
from lora_workbench.training.lora import Adapters, Part
from lora_workbench.training.lora_file import file_tensors
from lora_workbench.training.memory import MemoryPlan

pytestmark = pytest.mark.comfy
both_models = pytest.mark.parametrize("model", ["sdxl", "flux"])
STRENGTH = {"lora": 0.1, "dora": 0.1, "loha": 0.4, "lokr": 0.3, "oft": 0.1}
FLUX_PARTS = {
    "attn.to_q": ("img_attn.qkv", 0, 96),
    "attn.to_k": ("img_attn.qkv", 96, 96),
    "attn.to_v": ("img_attn.qkv", 192, 96),
    "attn.to_out.0": ("img_attn.proj", 0, 96),
    "ff.net.0.proj": ("img_mlp.0", 0, 384),
}


def drawn(*shape, seed=0, strength=0.1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * strength


def build(denoiser, seed=0, **config):
    config = LoraConfig(**{"rank": 3, "alpha": 1.5, **config})
    return Adapters.build([hosttoys.part(denoiser)], config, seed)


def trained(patcher, **config):
    """The tensors of a file that changes the model visibly."""
    denoiser = hosttoys.loaded(patcher)
    adapters = build(denoiser, seed=7, **config)
    denoiser.prepare(adapters, MemoryPlan())
    random = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for adapter in adapters:
            for name, tensor in adapter.tensors.items():
                noise = torch.randn(tensor.shape, generator=random) * STRENGTH[adapters.config.kind]
                tensor.copy_(tensor * (1 + noise) if name == "magnitude" else noise)
    return file_tensors(adapters.state(), adapters.config, torch.float32)


def started(patcher, tensors, path, clip=None, **config):
    """The adapters that begin as this file, the model that carries them, and the line about it."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    denoiser = hosttoys.loaded(patcher)
    adapters = build(denoiser, **config)
    line = warm_start(adapters, patcher, clip, path)
    denoiser.prepare(adapters, MemoryPlan())
    assert line.startswith("Started from 'star.safetensors': ") and line.endswith(".") and "\n" not in line
    return denoiser, adapters, line


def effects(model, patcher, denoiser, tensors):
    """What the adapters and what the loader change about an answer."""
    noisy, sigma, entry = hosttoys.latents(model, 1), hosttoys.levels(model, 1), hosttoys.caption(model)
    bare = denoised_by_comfyui(patcher, model, noisy, sigma, entry)
    live = denoised_by_us(denoiser, noisy, sigma, [entry])
    with_file, _ = loras.apply(patcher, None, tensors, 1.0, 1.0)
    loaded = denoised_by_comfyui(with_file, model, noisy, sigma, entry)
    assert (loaded - bare).norm() > 0.01 * bare.norm()
    return live - bare, loaded - bare, loaded


def assert_equal(model, patcher, denoiser, tensors):
    live, loaded, answer = effects(model, patcher, denoiser, tensors)
    assert (live - loaded).norm() < 1e-3 * answer.norm()
    assert (live - loaded).norm() < 5e-3 * loaded.norm()


# Forms of keys


def as_comfyui_keys(tensors, patcher):
    """`diffusion_model.<layer>.lora_up.weight`, with dots."""
    names = {
        f"lora_unet_{name.replace('.', '_')}": f"diffusion_model.{name}"
        for name, _ in patcher.model.diffusion_model.named_modules()
    }
    return {f"{names[key.split('.')[0]]}.{key.split('.', 1)[1]}": tensor for key, tensor in tensors.items()}


def as_diffusers_keys(tensors, patcher):
    """`unet.<diffusers' layer>.lora_A.weight` as peft writes them, without alpha: all of it in the factors."""
    names = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    found = {}
    for theirs, ours in names.items():
        key = "lora_unet_" + ours.removesuffix(".weight").replace(".", "_")
        if theirs.endswith(".weight") and f"{key}.lora_down.weight" in tensors:
            layer = "unet." + theirs.removesuffix(".weight").replace(".to_", ".processor.to_")
            layer = layer.removesuffix(".0") if layer.endswith("to_out.0") else layer
            scale = tensors[f"{key}.alpha"] / 3
            found[f"{layer}.lora_A.weight"] = tensors[f"{key}.lora_down.weight"]
            found[f"{layer}.lora_B.weight"] = tensors[f"{key}.lora_up.weight"] * scale
    return found


def split_flux_keys():
    """diffusers' FLUX has q, k and v apart, each with a down factor of its own."""
    tensors = {}
    for number, (name, (_, _, rows)) in enumerate(FLUX_PARTS.items()):
        layer = f"transformer.transformer_blocks.0.{name}"
        tensors[f"{layer}.lora_A.weight"] = drawn(2, 96, seed=number)
        tensors[f"{layer}.lora_B.weight"] = drawn(rows, 2, seed=number + 50, strength=0.3)
    layer = "transformer.single_transformer_blocks.1"
    tensors[f"{layer}.proj_mlp.lora_A.weight"] = drawn(2, 96, seed=90)
    tensors[f"{layer}.proj_mlp.lora_B.weight"] = drawn(384, 2, seed=91, strength=0.3)
    return tensors


FORMS = {
    "kohya": lambda tensors, _: tensors,
    "ComfyUI": as_comfyui_keys,
    "no alpha": lambda tensors, _: {name: t for name, t in tensors.items() if not name.endswith("alpha")},
}


@both_models
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [3, 7], ids=["same rank", "grown"])
def test_step_zero_is_what_the_loader_gives(model, form, rank, tmp_path):
    """Trap 5: alpha counts, and where there is none the scale is 1."""
    patcher = hosttoys.model(model)
    tensors = FORMS[form](trained(patcher), patcher)
    denoiser, adapters, line = started(patcher, tensors, tmp_path / "star.safetensors", rank=rank, alpha=5.0)
    assert f"{len(adapters)} layers at rank {rank}, with all of its effect." in line
    assert_equal(model, patcher, denoiser, tensors)


def test_step_zero_of_a_file_with_diffusers_keys_is_what_the_loader_gives(tmp_path):
    patcher = hosttoys.model("sdxl")
    ours = trained(patcher, layers="attention")
    tensors = as_diffusers_keys(ours, patcher)
    assert len(tensors) == 2 * len(ours) / 3
    denoiser, _, _ = started(patcher, tensors, tmp_path / "star.safetensors", layers="attention")
    assert_equal("sdxl", patcher, denoiser, tensors)


@pytest.mark.parametrize(("rank", "share"), [(6, "with all of its effect"), (4, "which keeps 9")])
def test_split_q_k_and_v_become_one_layer_and_need_their_ranks_together(rank, share, tmp_path):
    patcher, tensors = hosttoys.model("flux"), split_flux_keys()
    denoiser, _, line = started(patcher, tensors, tmp_path / "star.safetensors", rank=rank)
    assert share in line and "4 layers" in line
    if rank == 6:
        assert_equal("flux", patcher, denoiser, tensors)


@both_models
def test_a_cut_says_what_share_of_the_effect_it_keeps_and_keeps_it(model, tmp_path):
    patcher = hosttoys.model(model)
    tensors = trained(patcher, rank=8)
    denoiser, adapters, line = started(patcher, tensors, tmp_path / "star.safetensors", rank=6)
    kept = whole = 0.0
    for adapter in adapters:
        up, down, alpha = (tensors[f"{adapter.key}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        sizes = torch.linalg.svdvals((up @ down * alpha / 8).double())
        kept, whole = kept + sizes[:6].square().sum(), whole + sizes.square().sum()
    assert f"at rank 6, which keeps {100 * (kept / whole).sqrt().item():.4g} % of its effect." in line
    live, loaded, _ = effects(model, patcher, denoiser, tensors)
    assert torch.cosine_similarity(live.flatten(), loaded.flatten(), 0) > 0.8


# Kinds


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
@both_models
def test_a_file_of_another_kind_starts_a_lora_by_what_it_changes(model, kind, tmp_path):
    """At full rank nothing is lost; the DoRA and the OFT depend on the weights they were made for."""
    patcher = hosttoys.model(model)
    tensors = trained(patcher, kind=kind, layers="attention")
    denoiser, _, line = started(patcher, tensors, tmp_path / "star.safetensors", rank=96, layers="attention")
    assert "with all of its effect" in line
    assert_equal(model, patcher, denoiser, tensors)


def with_magnitude_per_output(tensors, patcher):
    """A DoRA as LyCORIS writes it by default."""
    for key in [key for key in tensors if key.endswith(".lora_up.weight")]:
        rows = len(tensors[key])
        tensors[key.replace("lora_up.weight", "dora_scale")] = 1 + drawn(rows, 1).abs()
    return tensors


def test_a_dora_with_magnitudes_per_output_starts_a_lora(tmp_path):
    patcher = hosttoys.model("flux")
    tensors = with_magnitude_per_output(trained(patcher, layers="attention"), patcher)
    denoiser, _, _ = started(patcher, tensors, tmp_path / "star.safetensors", rank=96, layers="attention")
    assert_equal("flux", patcher, denoiser, tensors)


@both_models
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_same_kind_is_taken_over_with_convolutions(model, kind, tmp_path):
    patcher = hosttoys.model(model)
    tensors = trained(patcher, kind=kind, conv_rank=2)
    denoiser, _, line = started(patcher, tensors, tmp_path / "star.safetensors", kind=kind, conv_rank=2)
    assert "with all of its effect" in line
    assert_equal(model, patcher, denoiser, tensors)


@both_models
def test_a_lora_starts_a_dora(model, tmp_path):
    patcher = hosttoys.model(model)
    tensors = trained(patcher, conv_rank=2)
    denoiser, _, _ = started(patcher, tensors, tmp_path / "star.safetensors", kind="dora", rank=4, conv_rank=2)
    assert_equal(model, patcher, denoiser, tensors)


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_kinds_that_cannot_begin_as_a_lora_say_so_in_one_sentence(kind, tmp_path):
    patcher = hosttoys.model("sdxl")
    tensors = trained(patcher)
    with pytest.raises(ValueError, match=r"^'star.safetensors' has layer '.*set the kind to lora.*\.$") as error:
        started(patcher, tensors, tmp_path / "star.safetensors", kind=kind)
    assert "\n" not in str(error.value)


@both_models
@pytest.mark.parametrize(
    "division",
    [
        {"lokr_factor": 4, "rank": 2},
        {"lokr_factor": 4, "rank": 1024, "conv_rank": 1024},
        {"lokr_factor": -1, "rank": 1024, "conv_rank": 2},
        {"lokr_factor": 0, "rank": 8, "conv_rank": 4},
    ],
    ids=str,
)
def test_a_lokr_divided_in_another_way_names_the_settings_with_which_all_of_it_fits(model, division, tmp_path):
    patcher, path = hosttoys.model(model), tmp_path / "star.safetensors"
    tensors = trained(patcher, kind="lokr", **division)
    settings = {"kind": "lokr", "rank": 16, "conv_rank": division.get("conv_rank", 0) and 16}
    with pytest.raises(ValueError, match=r" set lokr_factor to .* and .*, or start from nothing\.$") as error:
        started(patcher, tensors, path, **settings)
    named = {name: int(value) for name, value in re.findall(r"(\w+) to (-?\d+)", str(error.value))}
    denoiser, adapters, line = started(patcher, tensors, path, **settings | named)
    ranks = {tensor.shape[1] for adapter in adapters for name, tensor in adapter.tensors.items() if name == "lokr_w2_a"}
    at = f" at rank {', '.join(map(str, sorted(ranks)))}" if ranks else ""
    assert f"{len(adapters)} layers{at}, with all of its effect" in line
    assert_equal(model, patcher, denoiser, tensors)


def test_a_lokr_of_pieces_of_a_layer_names_no_settings_that_would_not_help(tmp_path):
    """diffusers' FLUX has q, k and v apart."""
    tensors = {}
    for name in ("to_q", "to_k", "to_v"):
        layer = f"transformer.transformer_blocks.0.attn.{name}"
        tensors |= {f"{layer}.lokr_w1": drawn(4, 4, strength=0.4), f"{layer}.lokr_w2": drawn(24, 24)}
    patcher, path = hosttoys.model("flux"), tmp_path / "star.safetensors"
    with pytest.raises(ValueError, match="in another form .*: set the kind to lora, or start from nothing"):
        started(patcher, tensors, path, kind="lokr", rank=2)
    denoiser, _, line = started(patcher, tensors, path, rank=96)
    assert "with all of its effect" in line
    assert_equal("flux", patcher, denoiser, tensors)


# What fits and what does not


def test_layers_that_are_not_trained_here_are_named(tmp_path):
    patcher = hosttoys.model("sdxl")
    tensors = trained(patcher, layers=ATTENTION_AND_FEED_FORWARD) | {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": drawn(2, 64),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": drawn(128, 2),
    }
    _, adapters, line = started(patcher, tensors, tmp_path / "star.safetensors", layers="attention")
    whole = len({key.split(".")[0] for key in tensors})
    assert f"{len(adapters)} layers" in line
    assert "not trained here and left out: input_blocks.3.1.transformer_blocks.0.ff.net.0.proj, " in line
    assert line.endswith(f" and {whole - len(adapters) - 3} more.")


def test_text_encoders_begin_too_where_they_are_trained(tmp_path):
    patcher, clip, path = hosttoys.model("sdxl"), hosttoys.clip("sdxl"), tmp_path / "star.safetensors"
    key = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    encoder = clip.cond_stage_model.clip_g.transformer
    layer = encoder.get_submodule("text_model.encoder.layers.0.mlp.fc1")
    tensors = {
        f"{key}.lora_down.weight": drawn(2, layer.in_features),
        f"{key}.lora_up.weight": drawn(layer.out_features, 2, seed=1),
        f"{key}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, path)
    parts = [Part("lora_te2_", encoder, {ATTENTION_AND_FEED_FORWARD: r"\.mlp\.fc[12]$"})]
    adapters = Adapters.build(parts, LoraConfig(rank=2), 0)
    line = warm_start(adapters, patcher, clip, path)
    adapter = adapters.members[key]
    torch.testing.assert_close(
        adapter.up.t() @ adapter.down, tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"] / 2
    )
    assert "1 layer at" in line and not any(other.up.any() for other in adapters if other is not adapter)


# New words

WORD = {"clip_l": 3 * drawn(2, 64), "clip_g": drawn(2, 64, seed=1)}


def with_words(path, words, count):
    """New words beside an adapter, begun as a file with these embeddings, and the line about it."""
    patcher, clip = hosttoys.model("sdxl"), hosttoys.clip("sdxl")
    save_file(trained(patcher) | bundled(words), path)
    tokens = NewTokens(clip, {"zork": "red star"}, count, seed=0)
    adapters = Adapters.build([hosttoys.part(hosttoys.loaded(patcher))], LoraConfig(rank=3), 0, tokens.adapters(1.0))
    return clip, tokens, adapters, warm_start(adapters, patcher, clip, path, tokens)


def test_a_new_word_begins_as_the_embedding_in_the_file(tmp_path, host_folder):
    path = tmp_path / "star.safetensors"
    clip, tokens, adapters, line = with_words(path, {"zork": WORD}, 2)
    rows = tokens.rows(adapters.state())["zork"]
    for name, expected in WORD.items():
        torch.testing.assert_close(rows[name], expected, rtol=1e-6, atol=1e-6)
    assert line.endswith(" The word 'zork' goes on with its embedding.") and "bundle_emb" not in line
    again = NewTokens(clip, {"zork": "red star"}, 2, seed=0)
    again.begin_as({"zork": WORD})
    assert all(torch.equal(again.rows(adapters.state())["zork"][name], rows[name]) for name in WORD)


@pytest.mark.parametrize(
    ("words", "count", "said"),
    [
        ({"zork": WORD}, 3, "'zork' is left out: it has 2 tokens there, so set new_tokens to 2 to go on from them."),
        ({"blib": WORD}, 2, "'blib' is left out: it is no new token of this training."),
        ({"zork": {"clip_l": WORD["clip_l"]}}, 2, "it has no rows for the 64 numbers a token has in clip_g."),
        ({"zork": {**WORD, "clip_l": drawn(2, 32)}}, 2, "it has no rows for the 64 numbers a token has in clip_l."),
        ({"zork": {**WORD, "clip_l": torch.zeros(2, 64)}}, 2, "'zork' is left out: its rows are zero or not finite."),
    ],
)
def test_words_that_do_not_fit_begin_as_their_class_and_say_why(words, count, said, tmp_path, host_folder):
    clip, tokens, adapters, line = with_words(tmp_path / "star.safetensors", words, count)
    assert said in line
    begun, classes = tokens.rows(adapters.state()), NewTokens(clip, {"zork": "red star"}, count, seed=0).rows()
    assert all(torch.equal(begun["zork"][name], rows) for name, rows in classes["zork"].items())


def test_a_file_for_another_family_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^'star.safetensors' has no layer that fits this model: .*\.$"):
        started(hosttoys.model("sdxl"), trained(hosttoys.model("flux")), tmp_path / "star.safetensors")


def test_a_file_for_other_layers_only_is_refused_in_one_sentence(tmp_path):
    patcher = hosttoys.model("sdxl")
    tensors = {name: tensor for name, tensor in trained(patcher).items() if "_ff_" in name}
    with pytest.raises(ValueError, match=r"^'star.safetensors' changes other layers than those .*ff.net.*\.$"):
        started(patcher, tensors, tmp_path / "star.safetensors", layers="attention")


def test_starting_leaves_the_model_as_it_was(tmp_path):
    patcher = hosttoys.model("sdxl")
    tensors = trained(patcher, kind="dora")
    before = hosttoys.digest(patcher.model.state_dict()), dict(patcher.patches)
    started(patcher, tensors, tmp_path / "star.safetensors", kind="lora", rank=16)
    assert (hosttoys.digest(patcher.model.state_dict()), patcher.patches) == before
