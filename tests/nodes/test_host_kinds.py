"""Every kind of adapter does alive what its file does when ComfyUI loads it, and is learned by the right gradients."""

import logging

import hosttoys
import pytest
import torch
from hostanswers import denoised_by_comfyui, denoised_by_us

from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.proof import prove
from lora_workbench.training import lora_file
from lora_workbench.training.config import KINDS, LoraConfig, TrainConfig
from lora_workbench.training.loop import train
from lora_workbench.training.lora import Adapters
from lora_workbench.training.memory import EVERY_BLOCK, NO_BLOCK, MemoryPlan

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", KINDS)
both_models = pytest.mark.parametrize("model", ["sdxl", "flux"])
SETTINGS = {"rank": 3, "alpha": 1.5, "conv_rank": 2}
FORMS = [*({"kind": kind} for kind in KINDS), {"kind": "lokr", "lokr_factor": 4}]
"""Settings of every form an adapter has; a LoKr's large factor is whole, or of low rank."""


STRENGTH = {"lora": 0.1, "dora": 0.1, "loha": 0.4, "lokr": 0.3, "oft": 0.1}


def activate(adapters):
    """Every trained number away from where it began, by enough to be seen."""
    random, strength = torch.Generator().manual_seed(9), STRENGTH[adapters.config.kind]
    with torch.no_grad():
        for adapter in adapters:
            for name, tensor in adapter.tensors.items():
                drawn = torch.randn(tensor.shape, generator=random) * strength
                tensor.copy_(tensor * (1 + drawn) if name == "magnitude" else drawn)


def adapted(patcher, *, checkpointing=False, active=True, **config):
    """A loaded model with adapters of a kind, and these."""
    denoiser = hosttoys.loaded(patcher)
    adapters = Adapters.build([hosttoys.part(denoiser)], LoraConfig(**{**SETTINGS, **config}), seed=0)
    denoiser.prepare(adapters, MemoryPlan(recompute=EVERY_BLOCK if checkpointing else NO_BLOCK))
    if active:
        activate(adapters)
    return denoiser, adapters


def question(model):
    return hosttoys.latents(model, 1), hosttoys.levels(model, 1), hosttoys.caption(model)


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


@both_models
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha over rank", "rank-stabilized"])
def test_the_live_model_is_what_comfyuis_loader_makes_of_its_file(model, form, stabilized):
    patcher, (noisy, sigma, entry) = hosttoys.model(model), question(model)
    bare = denoised_by_comfyui(patcher, model, noisy, sigma, entry)
    denoiser, adapters = adapted(patcher, **form, rank_stabilized=stabilized)
    live = denoised_by_us(denoiser, noisy, sigma, [entry])
    assert distance(live, bare) > 0.02
    for dtype, of_the_effect in ((torch.float32, 1e-3), (torch.float16, 2e-2)):
        tensors = lora_file.file_tensors(adapters.state(), adapters.config, dtype)
        with_file, _ = loras.apply(patcher, None, tensors, 1.0, 1.0)
        loaded = denoised_by_comfyui(with_file, model, noisy, sigma, entry)
        assert distance(loaded, live) < 1e-3, dtype
        assert distance(loaded - bare, live - bare) < of_the_effect, dtype


@both_models
@every_kind
def test_every_layer_of_every_kind_is_proved_and_the_effect_is_that_of_loading(model, kind, tmp_path, caplog):
    """Promise 3."""
    patcher, path = hosttoys.model(model), tmp_path / "star.safetensors"
    _, adapters = adapted(patcher, kind=kind)
    lora_file.write(path, lora_file.file_tensors(adapters.state(), adapters.config, torch.float32), {})
    proof = prove(patcher, path)
    assert proof.holds and proof.layers == len(adapters)
    before = {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}
    with caplog.at_level(logging.DEBUG):
        patched, _ = loras.apply(patcher, None, loras.read_lora(path), 1.0, 0.0)
        hosttoys.loaded(patched)
    assert not [record.message for record in caplog.records if "not loaded" in record.message.lower()]
    changes = [(tensor - before[name]).double().square().sum() for name, tensor in patched.model.state_dict().items()]
    assert proof.effect == pytest.approx(sum(changes).sqrt().item(), rel=1e-3)


@both_models
@every_kind
def test_fresh_adapters_make_a_file_without_effect(model, kind, tmp_path):
    patcher, path = hosttoys.model(model), tmp_path / "star.safetensors"
    _, adapters = adapted(patcher, kind=kind, active=False)
    lora_file.write(path, lora_file.file_tensors(adapters.state(), adapters.config, torch.float32), {})
    proof = prove(patcher, path)
    assert proof.matched == proof.layers == len(adapters) and proof.effect < 1e-4


def gradients(model, kind, *, checkpointing=False, **options):
    denoiser, adapters = adapted(hosttoys.model(model, **options), kind=kind, checkpointing=checkpointing)
    noisy, sigma, entry = question(model)
    with denoiser.adapted():
        loss = denoiser(noisy, sigma, [entry], hosttoys.SIZE).square().mean()
        loss.backward()
    return loss.item(), adapters


@both_models
@every_kind
def test_checkpointing_blocks_changes_neither_loss_nor_gradients(model, kind):
    (loss, plain), (again, recomputed) = (gradients(model, kind, checkpointing=which) for which in (False, True))
    assert again == pytest.approx(loss, rel=1e-5)
    assert distance(recomputed.values.grad, plain.values.grad) < 1e-3
    assert all(tensor.grad.any() for adapter in plain for tensor in adapter.tensors.values())


@every_kind
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16], ids=["fp8", "bf16"])
def test_weights_kept_in_fewer_bits_are_adapted_by_every_kind(kind, storage):
    """They are cast on their way, and the reference is a model whose weights hold the same rounded numbers."""
    loss, adapters = gradients("flux", kind, storage=storage, compute=torch.float32)
    rounded = hosttoys.model("flux", storage=storage, compute=torch.float32)
    exact = hosttoys.model("flux")
    with torch.inference_mode():
        for name, weight in exact.model.diffusion_model.named_parameters():
            weight.copy_(rounded.model.diffusion_model.get_parameter(name).to(torch.float32))
    denoiser, expected = adapted(exact, kind=kind)
    noisy, sigma, entry = question("flux")
    with denoiser.adapted():
        expected_loss = denoiser(noisy, sigma, [entry], hosttoys.SIZE).square().mean()
        expected_loss.backward()
    assert loss == pytest.approx(expected_loss.item(), rel=1e-4)
    assert distance(adapters.values.grad, expected.values.grad) < 1e-3


@both_models
@every_kind
def test_after_training_steps_the_model_is_bit_for_bit_what_it_was(model, kind):
    patcher = hosttoys.model(model)
    before, keys = hosttoys.digest(patcher.model.state_dict()), list(patcher.model.state_dict())
    denoiser, adapters = adapted(patcher, kind=kind, checkpointing=True, active=False, dropout=0.1)
    start = adapters.values.detach().clone()
    for step in train(denoiser, hosttoys.Batches(model), adapters, TrainConfig(steps=2, learning_rate=1e-2)):
        assert not step.skipped
        assert not [name for name, module in denoiser.network.named_modules() if "forward" in module.__dict__]
    assert not torch.equal(adapters.values, start)
    assert (hosttoys.digest(patcher.model.state_dict()), list(patcher.model.state_dict())) == (before, keys)
