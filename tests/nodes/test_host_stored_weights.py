"""Models whose weights are not simply there: quantised by ComfyUI, smoothed, merged, or unpacked by another pack."""

import comfy.model_base
import comfy.model_management as mm
import comfy.ops
import comfy.supported_models
import familytoys
import hosttoys
import loratoys
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from torch import nn

from lora_workbench.lora_files.extraction import extracted
from lora_workbench.lora_files.layers import layers_of
from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.extraction import model_pairs
from lora_workbench.nodes.host.identity import identity_of
from lora_workbench.nodes.host.weight_norms import squared_norm
from lora_workbench.training.config import TrainConfig
from lora_workbench.training.loop import train
from toyworld.node_pack import models

pytestmark = pytest.mark.comfy
KIND = "flux"
ENTRIES = [hosttoys.caption(KIND), hosttoys.caption(KIND, 1)]


def made_with(operations, change):
    """A MODEL over layers of another make, each linear layer of the blocks changed by `change(layer)`."""
    with torch.inference_mode():
        settings = comfy.supported_models.Flux(dict(models.TINY_FLUX))
        settings.set_inference_dtype(torch.float32, None)
        settings.custom_operations = operations
        base = comfy.model_base.Flux(settings, device="cpu")
        base.diffusion_model.load_state_dict(hosttoys.model(KIND).model.diffusion_model.state_dict())
        for name, layer in base.diffusion_model.named_modules():
            if "blocks" in name and hasattr(layer, "in_features"):
                change(layer)
        cpu = torch.device("cpu")
        return models.PATCHER(base, load_device=cpu, offload_device=cpu)


def plain_twin(weight_of):
    """The ordinary MODEL with the weights that `weight_of(name)` says."""
    patcher = hosttoys.model(KIND)
    with torch.inference_mode():
        for name, layer in patcher.model.diffusion_model.named_modules():
            if "blocks" in name and hasattr(layer, "in_features"):
                layer.weight.copy_(weight_of(name))
    return patcher


def loss_and_gradients(patcher):
    denoiser = hosttoys.loaded(patcher)
    adapters = hosttoys.attach(denoiser)
    with denoiser.adapted():
        loss = denoiser(hosttoys.latents(KIND), hosttoys.levels(KIND), ENTRIES, hosttoys.SIZE).square().mean()
        loss.backward()
    return loss.item(), {adapter.name: adapter.up.grad.clone() for adapter in adapters}


def assert_trains_as(patcher, twin):
    loss, gradients = loss_and_gradients(patcher)
    expected_loss, expected = loss_and_gradients(twin)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 1e-3 * expected[name].norm(), name


# Quantised by ComfyUI


def quantised(layout, format_name, scale_input=False):
    from comfy.quant_ops import QuantizedTensor

    def change(layer):
        layer.weight = nn.Parameter(QuantizedTensor.from_float(layer.weight.detach(), layout), requires_grad=False)
        layer.layout_type, layer.quant_format = layout, format_name
        if scale_input:
            random = torch.Generator().manual_seed(layer.in_features)
            scale = torch.rand(layer.in_features, generator=random) + 0.5
            layer.pre_quant_scale = nn.Parameter(scale, requires_grad=False)

    return made_with(comfy.ops.mixed_precision_ops({}, torch.float32, full_precision_mm=True), change)


def layer_of(patcher, name):
    return patcher.model.diffusion_model.get_submodule(name)


formats = pytest.mark.parametrize(
    ("layout", "format_name"),
    [
        ("TensorCoreFP8E4M3Layout", "float8_e4m3fn"),
        ("TensorCoreNVFP4Layout", "nvfp4"),
        ("TensorWiseINT8Layout", "int8_tensorwise"),
    ],
)


def skip_without(layout):
    quant_ops = pytest.importorskip("comfy.quant_ops")
    if not hasattr(comfy.ops, "mixed_precision_ops") or layout not in str(vars(quant_ops).get("QUANT_ALGOS", {})):
        pytest.skip(f"this ComfyUI has no {layout}")


@formats
def test_a_lora_on_a_model_that_comfyui_quantised_is_extracted_as_it_was(layout, format_name):
    skip_without(layout)
    model = quantised(layout, format_name)
    tensors = loratoys.lora(hosttoys.model(KIND))
    patched, _ = loras.apply(model, None, tensors, 1.0, 0.0)
    result = extracted(model_pairs(patched, model, lambda done, total: None), rank=16)
    found, wanted = layers_of(result.tensors), layers_of(tensors)
    assert found.keys() == wanted.keys() and result.notes == []
    for name, layer in wanted.items():
        assert (found[name].change() - layer.change()).norm() < 1e-3 * layer.norm(), name


@formats
def test_what_quantising_did_to_a_model_is_extracted_as_no_lora(layout, format_name):
    skip_without(layout)
    pairs = model_pairs(quantised(layout, format_name), hosttoys.model(KIND), lambda done, total: None)
    with pytest.raises(ValueError, match="differ by no more than what storing them as .* rounds"):
        extracted(pairs, rank=16)


@formats
def test_weights_quantised_by_comfyui_are_trained_over_as_what_they_stand_for(layout, format_name):
    skip_without(layout)
    patcher = quantised(layout, format_name)
    with torch.inference_mode():
        twin = plain_twin(lambda name: layer_of(patcher, name).weight.dequantize())
    hosttoys.loaded(patcher)
    before = [(id(p), type(p.data), p.shape) for p in patcher.model.diffusion_model.parameters()]
    assert_trains_as(patcher, twin)
    assert [(id(p), type(p.data), p.shape) for p in patcher.model.diffusion_model.parameters()] == before


def test_a_layer_that_was_smoothed_before_it_was_quantised_scales_its_input_for_base_and_adapter():
    """What a loaded file adds to the weight is multiplied with the scaled input as well."""
    skip_without("TensorCoreNVFP4Layout")
    patcher = quantised("TensorCoreNVFP4Layout", "nvfp4", scale_input=True)
    noisy, sigma, entry = hosttoys.latents(KIND, 1), hosttoys.levels(KIND, 1), ENTRIES[:1]
    denoiser = hosttoys.loaded(patcher)
    adapters = hosttoys.attach(denoiser)
    with denoiser.adapted(), torch.no_grad():
        live = denoiser(noisy, sigma, entry, hosttoys.SIZE)

    def scaled(name):
        layer = layer_of(patcher, name)
        weight = layer.weight.dequantize()
        adapter = next((adapter for adapter in adapters if adapter.name == name), None)
        if adapter is not None:
            weight = weight + 0.5 * adapter.up.detach().t() @ adapter.down.detach()
        return weight * layer.pre_quant_scale

    with torch.inference_mode():
        merged = hosttoys.loaded(plain_twin(scaled))
    hosttoys.attach(merged, active=False)
    with merged.adapted(), torch.no_grad():
        expected = merged(noisy, sigma, entry, hosttoys.SIZE)
    torch.testing.assert_close(live, expected, rtol=1e-3, atol=1e-3)


# Unpacked by another pack


class Packed(torch.Tensor):
    """Bytes that stand for a matrix of another shape, as the GGUF pack holds them."""

    @staticmethod
    def of(weight):
        scale = weight.abs().amax() / 127
        packed = (weight / scale).round().to(torch.int8).view(torch.uint8).flatten().as_subclass(Packed)
        packed.scale, packed.tensor_shape, packed.patches = scale, weight.shape, []
        return packed

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()

    def detach(self, *args, **kwargs):
        return self

    def clone(self, *args, **kwargs):
        return self

    def unpacked(self, dtype):
        plain = self.as_subclass(torch.Tensor)
        return (plain.view(torch.int8).to(dtype) * self.scale.to(dtype)).view(self.tensor_shape)


class PackOps(comfy.ops.manual_cast):
    """Layers as that pack makes them: a method of their own unpacks the weight, and saving shows a stand-in.

    What this proves is that its way of holding weights can be trained over, not that any one of its formats can.
    """

    class Linear(comfy.ops.manual_cast.Linear):
        def cast_bias_weight(self, input=None, dtype=None, device=None, bias_dtype=None):
            if not isinstance(self.weight, Packed):
                return comfy.ops.cast_bias_weight(self, input)
            bias = None if self.bias is None else self.bias.to(input)
            return self.weight.unpacked(input.dtype), bias

        def forward_comfy_cast_weights(self, input):
            return nn.functional.linear(input, *self.cast_bias_weight(input))

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if isinstance(self.weight, Packed):
                destination[f"{prefix}weight"] = torch.empty(self.weight.tensor_shape, device="meta")
                destination[f"{prefix}temp.weight"] = torch.empty(self.weight.tensor_shape, device="meta")


def packed(seed=0):
    def change(layer):
        layer.weight = nn.Parameter(Packed.of(layer.weight.detach() + 0.001 * seed), requires_grad=False)

    return made_with(PackOps, change)


def test_weights_that_another_pack_unpacks_in_its_own_way_are_trained_over():
    patcher = packed()
    assert isinstance(layer_of(patcher, "single_blocks.0.linear1").weight, Packed)
    bytes_before = layer_of(patcher, "single_blocks.0.linear1").weight.as_subclass(torch.Tensor).clone()
    with torch.inference_mode():
        twin = plain_twin(lambda name: layer_of(patcher, name).weight.unpacked(torch.float32))
    assert_trains_as(patcher, twin)
    assert torch.equal(layer_of(patcher, "single_blocks.0.linear1").weight.as_subclass(torch.Tensor), bytes_before)


class Kept(torch.Tensor):
    """A plain weight of that pack's own type, which gives itself away instead of copies."""

    def detach(self, *args, **kwargs):
        return self

    def clone(self, *args, **kwargs):
        return self


def family_gradients(patcher, kind):
    denoiser = hosttoys.loaded(patcher)
    adapters = hosttoys.attach(denoiser)
    entries = [familytoys.caption(kind), familytoys.caption(kind, 1)]
    with denoiser.adapted():
        answer = denoiser(familytoys.latents(kind), familytoys.levels(kind), entries, familytoys.KINDS[kind].size)
        answer.square().mean().backward()
    return adapters.values.grad.clone()


@pytest.mark.parametrize("kind", [kind for kind in ("sd35", "chroma", "z_image") if kind in familytoys.KINDS])
def test_plain_weights_of_another_packs_own_type_are_trained_over_and_left_where_they_are(kind):
    """Norms in ComfyUI's layers, and norms and tokens of a network's own making."""
    patcher, expected = familytoys.model(kind), family_gradients(familytoys.model(kind), kind)
    with torch.inference_mode():
        for module in patcher.model.diffusion_model.modules():
            for name, weight in module.named_parameters(recurse=False):
                module._parameters[name] = nn.Parameter(weight.as_subclass(Kept), requires_grad=False)
    before = [(id(weight), type(weight)) for weight in patcher.model.diffusion_model.parameters()]
    assert {kind for _, kind in before} == {Kept}
    assert torch.equal(family_gradients(patcher, kind), expected)
    assert [(id(weight), type(weight)) for weight in patcher.model.diffusion_model.parameters()] == before


def test_two_packed_models_are_told_apart_by_their_bytes():
    assert identity_of(packed()) == identity_of(packed()) != identity_of(packed(seed=1))


# Merged and patched


def test_a_merged_model_is_trained_as_the_mean_of_both():
    one, other = hosttoys.model("sdxl"), hosttoys.model("sdxl", seed=3)
    merged = ModelMergeSimple().merge(one, other, 0.5)[0]
    mean = hosttoys.model("sdxl")
    with torch.inference_mode():
        pairs = zip(mean.model.diffusion_model.parameters(), other.model.diffusion_model.parameters(), strict=True)
        for weight, second in pairs:
            weight.copy_(0.5 * (weight + second))
    before = hosttoys.digest(one.model.state_dict())

    def losses(patcher):
        denoiser = hosttoys.loaded(patcher)
        adapters = hosttoys.attach(denoiser, active=False)
        steps = train(denoiser, hosttoys.Batches("sdxl"), adapters, TrainConfig(steps=3, learning_rate=1e-2))
        return [step.loss for step in steps]

    assert losses(merged) == pytest.approx(losses(mean), rel=1e-4)
    mm.load_models_gpu([one])
    assert hosttoys.digest(one.model.state_dict()) == before


# Measured by the x-ray


def assert_measured_as(patcher, twin):
    """Only the full x-ray unpacks weights, finds those of the plain model, and leaves the model as it was."""
    key = "diffusion_model.single_blocks.0.linear1.weight"
    before = type(layer_of(patcher, "single_blocks.0.linear1").weight)
    with torch.inference_mode():
        assert squared_norm(patcher, key) is None
        found = squared_norm(patcher, key, quantised=True)
        expected = layer_of(twin, "single_blocks.0.linear1").weight.double().square().sum().item()
        assert found == pytest.approx(expected, rel=0.02)
        part = squared_norm(patcher, key, (0, 10, 20), quantised=True)
    weight = layer_of(twin, "single_blocks.0.linear1").weight[10:30]
    assert part == pytest.approx(weight.double().square().sum().item(), rel=0.02)
    assert type(layer_of(patcher, "single_blocks.0.linear1").weight) is before


@formats
def test_quantised_weights_are_measured_as_what_they_stand_for(layout, format_name):
    skip_without(layout)
    patcher = quantised(layout, format_name)
    with torch.inference_mode():
        twin = plain_twin(lambda name: layer_of(patcher, name).weight.dequantize())
    assert_measured_as(patcher, twin)


def test_packed_weights_are_measured_as_what_they_stand_for():
    patcher = packed()
    with torch.inference_mode():
        twin = plain_twin(lambda name: layer_of(patcher, name).weight.unpacked(torch.float32))
    assert_measured_as(patcher, twin)
