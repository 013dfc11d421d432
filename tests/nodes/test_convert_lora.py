"""Convert LoRA: the files it writes are read whole by ComfyUI and diffusers, and do what they did before."""

import importlib.util
import logging
import os
from types import SimpleNamespace

import comfy.lora
import comfy.model_base
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import diffusersnets
import familytoys
import folder_paths
import pytest
import queueing
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from safetensors.torch import load_file, save_file

from lora_workbench.lora_files import forms
from lora_workbench.nodes.convert_lora import FORMS, LoraWorkbenchConvertLora
from lora_workbench.training.description import read
from toyworld.node_pack import models

pytestmark = pytest.mark.comfy
every_form = pytest.mark.parametrize("form", FORMS)
every_toy = pytest.mark.parametrize("kind", ["sdxl", "flux"])
needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
CLIP_BLOCKS = {"clip_l": 12, "clip_g": 32}
RANK, SHAPE, FUSED_SHAPE = 2, (6, 3), (3 * 3072 + 12288, 3)
"""Of every tiny layer. diffusers knows how many rows a fused layer of FLUX must have."""


# Files


def layers(network):
    """Every layer of a network that a LoRA can be on, by its path."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def file_for(shapes):
    """A LoRA in kohya's names for layers with weights of these shapes."""
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, (rows, columns, *kernel) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, *kernel, generator=random) * 0.1
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, RANK, *[1 for _ in kernel], generator=random) * 0.1
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


def kohya(prefix, path):
    return prefix + path.replace(".", "_")


def clip_paths(encoder):
    inner = [f"self_attn.{name}" for name in ATTENTION] + ["mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{block}.{name}" for block in range(CLIP_BLOCKS[encoder]) for name in inner]


def full_unet(config):
    return UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)


FULL = {
    "sdxl": lambda: (full_unet(comfy.supported_models.SDXL(dict(models.FULL_SDXL)).unet_config), models.FULL_SDXL),
    "sd15": lambda: (full_unet(familytoys.FULL_UNET), familytoys.FULL_UNET),
    "flux": lambda: (
        Flux(**models.FULL_FLUX, device="meta", operations=comfy.ops.disable_weight_init),
        models.FULL_FLUX,
    ),
}
CLIPS = {
    "sdxl": {"lora_te1_": "clip_l", "lora_te2_": "clip_g"},
    "sd15": {"lora_te_": "clip_l"},
    "flux": {"lora_te1_": "clip_l"},
}


@pytest.fixture(scope="module", params=FULL)
def full(request):
    """A real architecture: its kind, the names ComfyUI's loader knows, and a tiny LoRA for every layer and CLIP."""
    network, config = FULL[request.param]()
    clips = CLIPS[request.param]
    names = [kohya("lora_unet_", path) for path in layers(network)]
    names += [kohya(prefix, path) for prefix, encoder in clips.items() for path in clip_paths(encoder)]
    shapes = {name: FUSED_SHAPE if name.endswith("_linear1") else SHAPE for name in names}
    return request.param, known(request.param, network, config, clips.values()), file_for(shapes)


def known(kind, network, config, clips):
    """The names under which ComfyUI's loader knows the weights of a model that is too large to make here."""
    family = comfy.model_base.Flux if kind == "flux" else comfy.model_base.BaseModel
    model = family.__new__(family)
    state = {f"diffusion_model.{name}": tensor for name, tensor in network.state_dict().items()}
    object.__setattr__(model, "state_dict", lambda: state)
    object.__setattr__(model, "model_config", SimpleNamespace(unet_config=dict(config)))
    keys = comfy.lora.model_lora_keys_unet(model, {})
    texts = {f"{encoder}.transformer.{path}.weight": None for encoder in clips for path in clip_paths(encoder)}
    return comfy.lora.model_lora_keys_clip(SimpleNamespace(state_dict=lambda: texts), keys)


# What ComfyUI makes of them


@pytest.mark.parametrize(("form", "alpha"), [*((form, forms.KEEP) for form in FORMS), (forms.DIFFUSERS, forms.FOLD)])
def test_comfyuis_loader_leaves_no_key_of_a_converted_file(full, form, alpha, caplog):
    kind, keys, tensors = full
    result = forms.converted(tensors, form, alpha)
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(dict(result), keys)
    assert [record.message for record in caplog.records if "not loaded" in record.message] == []
    targets = {target[0] if isinstance(target, tuple) else target for target in patches}
    assert len(targets) == len(tensors) // 3


@every_form
def test_a_round_trip_gives_the_same_names_and_the_same_bytes(full, form):
    tensors = forms.converted(full[2], forms.KOHYA)  # kohya has names of its own for SD 1.5
    back = forms.converted(forms.converted(tensors, form), forms.KOHYA)
    assert list(back) == list(tensors)
    assert all(same_bytes(back[name], tensor) for name, tensor in tensors.items())


def same_bytes(one, other):
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def toy_file(kind):
    """A LoRA for every layer of a toy and of its text encoders that a LoRA can be on."""
    patcher, clip, _ = queueing.shared_models(kind)
    shapes = {
        kohya("lora_unet_", path): layer.weight.shape for path, layer in layers(patcher.model.diffusion_model).items()
    }
    encoders = clip.cond_stage_model
    for prefix, encoder in (("lora_te1_", "clip_l"), ("lora_te2_", "clip_g")):
        if hasattr(encoders, encoder):
            found = layers(getattr(encoders, encoder).transformer.text_model.encoder)
            shapes |= {kohya(f"{prefix}text_model_encoder_", path): layer.weight.shape for path, layer in found.items()}
    return file_for(shapes)


def changes(kind, tensors):
    """Every weight that the loader changes -> what it changes about it, at uneven strengths."""
    patcher, clip, _ = queueing.shared_models(kind)
    patched = comfy.sd.load_lora_for_models(patcher, clip, dict(tensors), 0.7, 0.4)
    result = {}
    for held in (patched[0], patched[1].patcher):
        for key, patches in held.patches.items():
            weight = torch.zeros(comfy.utils.get_attr(held.model, key).shape)
            result[key] = comfy.lora.calculate_weight(patches, weight, key)
    return result


@every_toy
@every_form
@pytest.mark.parametrize("alpha", [forms.KEEP, forms.FOLD])
def test_a_converted_file_changes_every_weight_as_before(kind, form, alpha, caplog):
    tensors = toy_file(kind)
    before = changes(kind, tensors)
    with caplog.at_level(logging.WARNING):
        after = changes(kind, forms.converted(tensors, form, alpha))
    assert [record.message for record in caplog.records if "not loaded" in record.message] == []
    assert before.keys() == after.keys() and len(before) == len(tensors) // 3
    for key, change in before.items():
        torch.testing.assert_close(after[key], change, rtol=1e-5, atol=1e-7)


# What diffusers makes of them

PREFIXES = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.")


def read_by_diffusers(kind, tensors, network):
    """The tensors that diffusers finds in a file, by network and as peft calls them, and those it is left with."""
    import diffusers
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    if kind == "flux":
        state = diffusers.FluxPipeline.lora_state_dict(dict(tensors))
        # What it converts itself and is in no block it leaves without its prefix.
        state = {name if name.startswith(PREFIXES) else f"transformer.{name}": state[name] for name in state}
    else:
        pipeline = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
        state, _ = pipeline.lora_state_dict(dict(tensors), unet_config=network.config)
    found = {}
    for prefix in PREFIXES:
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if own and prefix.startswith("text"):
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        elif own and "lora_A" not in next(iter(own)):
            own = convert_unet_state_dict_to_peft(own)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        found[prefix] = own
    return found, state


def modules_of(kind, network):
    """The names of the layers that diffusers has, by network."""
    found = {"transformer." if kind == "flux" else "unet.": set(layers(network))}
    texts = {"clip_l": "text_encoder.", "clip_g": "text_encoder_2."}
    return found | {texts[encoder]: set(clip_paths(encoder)) for encoder in CLIPS[kind].values()}


KOHYAS, ITS_OWN, COMFYUIS = (forms.KOHYA, forms.KEEP), (forms.DIFFUSERS, forms.FOLD), (forms.COMFYUI, forms.KEEP)
READ = {"sdxl": [KOHYAS, ITS_OWN], "sd15": [KOHYAS, ITS_OWN], "flux": [KOHYAS, ITS_OWN, COMFYUIS]}
"""What diffusers reads of each kind; the names that U-Nets have in checkpoints it reads in kohya's form only."""


@needs_diffusers
def test_diffusers_conversion_leaves_no_key_and_finds_a_layer_for_each(full):
    kind, _, tensors = full
    network = diffusersnets.network(kind)
    for form, alpha in READ[kind]:
        found, left = read_by_diffusers(kind, forms.converted(tensors, form, alpha), network)
        assert left == {}
        for prefix, names in modules_of(kind, network).items():
            assert {name.removesuffix(".lora_A.weight") for name in found[prefix] if ".lora_A" in name} == names
            assert len(found[prefix]) == 2 * len(names)


@needs_diffusers
def test_diffusers_reads_alpha_of_its_own_form_in_flux_files():
    import diffusers

    tensors = forms.converted(file_for({"lora_unet_double_blocks_0_img_attn_qkv": (9, 3)}), forms.DIFFUSERS)
    _, alphas = diffusers.FluxPipeline.lora_state_dict(tensors, return_alphas=True)
    assert {name: alpha.item() for name, alpha in alphas.items()} == {
        f"transformer.transformer_blocks.0.attn.to_{name}.alpha": 1.5 for name in "qkv"
    }


# The node


def write(folder, name, tensors, **entries):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, entries)


def convert(lora, **given):
    settings = {"name": "people/new", "form": "diffusers", "alpha": "keep", "precision": "as it is", **given}
    return tuple(queueing.run(LoraWorkbenchConvertLora, lora=lora, **settings).values())


def test_the_node_writes_a_file_that_every_loader_lists(folder):
    write(folder, "old.safetensors", toy_file("flux"), ss_base_model_version="flux1", ss_network_dim="2")
    stack, name, report = convert("old.safetensors")
    assert (stack, name) == ([(name, 1.0, 1.0)], os.path.join("people", "new.safetensors"))
    assert name in folder_paths.get_filename_list("loras")
    assert "'old.safetensors' (kohya)" in report and "layers" in report
    entries = read(folder / name)
    assert entries["ss_base_model_version"] == "flux1" and entries["sshs_model_hash"]
    back = convert(name, name="back", form="kohya")[1]
    old, new = load_file(folder / "old.safetensors"), load_file(folder / back)
    assert old.keys() == new.keys() and all(same_bytes(new[key], old[key]) for key in old)


def test_the_same_conversion_writes_nothing_and_another_overwrites_nothing(folder):
    write(folder, "old.safetensors", toy_file("sdxl"))
    first = convert("old.safetensors")[1]
    before = os.stat(folder / first)
    assert convert("old.safetensors")[1] == first
    assert os.stat(folder / first).st_mtime_ns == before.st_mtime_ns
    second = convert("old.safetensors", form="comfyui")[1]
    assert second == os.path.join("people", "new_v2.safetensors")
    assert convert("old.safetensors", form="comfyui")[1] == second
    assert len(list(folder.rglob("*"))) == 4


def test_a_name_from_another_node_wins_and_nothing_chosen_is_a_sentence(folder):
    write(folder, "old.safetensors", toy_file("flux"))
    assert "'old.safetensors'" in convert("none", lora_name="old.safetensors")[2]
    with pytest.raises(ValueError, match="No LoRA is chosen"):
        convert("none")


def test_alpha_is_folded_before_numbers_are_rounded(folder):
    tensors = {name: tensor.half() for name, tensor in toy_file("sdxl").items()}
    write(folder, "old.safetensors", tensors, ss_network_dim="2", ss_network_alpha="1.5")
    name = convert("old.safetensors", alpha="fold", form="kohya", precision="fp32")[1]
    folded = load_file(folder / name)
    layer = "lora_unet_middle_block_1_proj_in"
    up, down, alpha = (tensors[f"{layer}.{part}"].float() for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    product = folded[f"{layer}.lora_up.weight"] @ folded[f"{layer}.lora_down.weight"]
    torch.testing.assert_close(product, alpha / 2 * up @ down, rtol=1e-6, atol=1e-8)
    assert not [key for key in folded if key.endswith(".alpha")]
    assert read(folder / name)["ss_network_alpha"] == "2"


def test_what_diffusers_does_not_read_is_said(folder):
    write(folder, "old.safetensors", toy_file("sdxl"))
    assert "choose alpha 'fold'" in convert("old.safetensors")[2]
    assert "fold" not in convert("old.safetensors", alpha="fold")[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_file_that_is_not_finite_is_refused_and_nothing_is_written(folder, value):
    tensors = toy_file("flux")
    key = next(iter(tensors))
    tensors[key][0] = value
    write(folder, "old.safetensors", tensors)
    with pytest.raises(ValueError, match=f"'{key}' holds values that are not finite"):
        convert("old.safetensors")
    assert [path.name for path in folder.iterdir()] == ["old.safetensors"]


def test_the_lengths_of_a_doras_columns_keep_their_precision(folder):
    tensors = toy_file("flux")
    layer = next(iter(tensors)).split(".")[0]
    width = tensors[f"{layer}.lora_down.weight"].shape[1]
    lengths = tensors[f"{layer}.dora_scale"] = torch.linspace(1, 1.001, width)[None]
    write(folder, "old.safetensors", tensors)
    made = load_file(folder / convert("old.safetensors", form="kohya", precision="bf16")[1])
    assert torch.equal(made[f"{layer}.dora_scale"], lengths)
    assert made[f"{layer}.lora_down.weight"].dtype == torch.bfloat16


def test_values_too_large_for_fp16_are_named(folder):
    tensors = toy_file("flux")
    key = next(iter(tensors))
    tensors[key][0] = 1e6
    write(folder, "old.safetensors", tensors)
    with pytest.raises(ValueError, match="too large for this precision"):
        convert("old.safetensors", form="kohya", precision="fp16")
