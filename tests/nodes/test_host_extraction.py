"""What two loaded models differ in: a LoRA that was put on comes back, from models however they are stored."""

import math

import comfy.model_management as mm
import comfy.utils
import hosttoys
import pytest
import queueing
import torch

from lora_workbench.lora_files.extraction import extracted
from lora_workbench.lora_files.layers import layers_of
from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.extraction import clip_pairs, model_pairs, network_names, text_names

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", ["sdxl", "flux"])
RANK = 3


def watch(done, total):
    assert 0 < done <= total


def lora(weights, names, size=0.1, seed=0):
    """A LoRA of rank 3 for every layer of a model, each `size` times as large as its weight."""
    made, tensors = torch.Generator().manual_seed(seed), {}
    for key, name in names.items():
        weight = weights[key]
        if weight.ndim < 2:
            continue
        up = torch.randn(len(weight), RANK, generator=made)
        down = torch.randn(RANK, weight[0].numel(), generator=made)
        up *= size * weight.float().norm() / (up @ down).norm()
        tensors[f"{name}.lora_up.weight"] = up.reshape(*up.shape, *[1] * (weight.ndim - 2))
        tensors[f"{name}.lora_down.weight"] = down.reshape(RANK, *weight.shape[1:])
    return tensors


def of_model(model, **options):
    return lora(model.model.state_dict(), network_names(model), **options)


def of_clip(clip):
    names = {key: name for key, name in text_names(clip).items() if name.startswith("lora_te")}
    return lora(clip.cond_stage_model.state_dict(), names, seed=1)


def baked(model, tensors, storage):
    """Another MODEL of the same kind with the LoRA in its weights, stored like the first."""
    kind = "flux" if type(model.model).__name__ == "Flux" else "sdxl"
    other = hosttoys.model(kind, storage=storage, compute=torch.float32)
    layers = layers_of(tensors)
    with torch.inference_mode():
        for key, name in network_names(other).items():
            weight = comfy.utils.get_attr(other.model, key)
            if name in layers:
                weight.copy_(weight.float() + layers[name].change().view_as(weight))
    return other


def errors(result, tensors):
    """How far the layers are from what they should be, relative to that: at worst, and all together."""
    found, wanted = layers_of(result.tensors), layers_of(tensors)
    assert found.keys() == wanted.keys()
    apart = [(found[name].change() - layer.change()).norm().item() for name, layer in wanted.items()]
    sizes = [layer.norm() for layer in wanted.values()]
    return max(one / other for one, other in zip(apart, sizes, strict=True)), math.hypot(*apart) / math.hypot(*sizes)


@every_kind
def test_a_lora_on_model_and_clip_comes_back(kind):
    model, clip, _ = queueing.shared_models(kind)
    tensors = of_model(model) | of_clip(clip)
    before = queueing.portrait(model)
    patched, patched_clip = loras.apply(model, clip, tensors, 1.0, 1.0)
    pairs = [*model_pairs(patched, model, watch), *clip_pairs(patched_clip, clip, watch)]
    result = extracted(pairs, rank=16)
    assert max(errors(result, tensors)) < 1e-3
    assert max(result.ranks.values()) == RANK and result.kept > 0.9999 and result.notes == []
    assert queueing.portrait(model) == before


@every_kind
def test_it_comes_back_while_the_patched_model_is_loaded(kind):
    """ComfyUI has then changed the weights in place, which both MODELs share."""
    model, clip, _ = queueing.random_models(kind)
    tensors = of_model(model)
    patched, _ = loras.apply(model, None, tensors, 1.0, 0.0)
    with torch.inference_mode():
        mm.load_models_gpu([patched], force_patch_weights=True)
    assert patched.model is model.model
    result = extracted(model_pairs(patched, model, watch), rank=16)
    assert max(errors(result, tensors)) < 1e-3


@every_kind
@pytest.mark.parametrize("storage, error", [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.float8_e4m3fn, 0.15)])
def test_it_comes_back_from_a_model_that_was_stored_with_it(kind, storage, error):
    base = hosttoys.model(kind, storage=storage, compute=torch.float32)
    tensors = of_model(base)
    result = extracted(model_pairs(baked(base, tensors, storage), base, watch), rank=16)
    assert errors(result, tensors)[1] < error
    assert max(result.ranks.values()) == RANK
    coarse = storage == torch.float8_e4m3fn
    said = [
        note for note in result.notes if "stored as float8_e4m3fn: about 26 % of the difference is rounding" in note
    ]
    assert bool(said) == coarse == (result.rounding > 0.05)


def test_the_share_of_rounding_is_what_rounding_really_was():
    base = hosttoys.model("sdxl", storage=torch.float8_e4m3fn, compute=torch.float32)
    tensors = of_model(base)
    layers, noise, whole = layers_of(tensors), 0.0, 0.0
    other = baked(base, tensors, torch.float8_e4m3fn)
    for key, name in network_names(base).items():
        if name in layers:
            one, two = (comfy.utils.get_attr(model.model, key).float().flatten(1) for model in (other, base))
            noise += (one - two - layers[name].change()).square().sum().item()
            whole += (one - two).square().sum().item()
    result = extracted(model_pairs(other, base, watch), rank=16)
    assert result.rounding == pytest.approx((noise / whole) ** 0.5, rel=0.1)


def test_a_change_below_what_8_bits_can_hold_is_refused_in_a_sentence():
    base = hosttoys.model("sdxl", storage=torch.float8_e4m3fn, compute=torch.float32)
    other = baked(base, of_model(base, size=0.01), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="differ by no more than what storing them as float8_e4m3fn rounds"):
        extracted(model_pairs(other, base, watch), rank=16)


def test_equal_models_and_strangers_are_refused():
    model = queueing.shared_models("sdxl")[0]
    with pytest.raises(ValueError, match="The two models are the same"):
        extracted(model_pairs(model.clone(), model, watch), rank=4)
    with pytest.raises(ValueError, match="The two models share no layer"):
        extracted(model_pairs(queueing.shared_models("flux")[0], model, watch), rank=4)


def test_names_are_those_that_kohyas_scripts_use():
    names = text_names(queueing.shared_models("flux")[1])
    layer = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert names[f"t5xxl.transformer.{layer}"] == "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert names["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"].startswith("lora_te1_text_model")
    names = text_names(queueing.shared_models("sdxl")[1])
    assert names["clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.weight"].startswith("lora_te2_text_model")
