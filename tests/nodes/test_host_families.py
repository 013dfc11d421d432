"""Every family of image models trains through the same path: ComfyUI's answer, the right gradients, a file that loads.

The models are tiny and real: ComfyUI's own classes with random weights.
"""

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import familytoys
import hosttoys
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch import nn

from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.encoders import GraphEncoder
from lora_workbench.nodes.host.proof import prove
from lora_workbench.nodes.host.sampling import SamplerSettings, sample_picture
from lora_workbench.nodes.host.text_encoders import entries_of
from lora_workbench.training import lora_family, lora_file
from lora_workbench.training.config import LoraConfig, ObjectiveConfig, TrainConfig
from lora_workbench.training.families import FULL, LAYER_PRESETS
from lora_workbench.training.loop import train
from lora_workbench.training.lora import Adapters
from lora_workbench.training.memory import EVERY_BLOCK, MemoryPlan
from lora_workbench.training.objective import Objective

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", familytoys.KINDS)
CONFIG = LoraConfig(rank=3, alpha=1.5)


def denoised_by_us(denoiser, kind, noisy, sigma, entries):
    with denoiser.adapted(), torch.no_grad():
        raw = denoiser(noisy, sigma, entries, familytoys.KINDS[kind].size)
    return denoiser.patcher.get_model_object("model_sampling").calculate_denoised(sigma, raw, noisy)


def one(kind):
    """One noisy picture, its level and its caption."""
    return familytoys.latents(kind, 1), familytoys.levels(kind, 1), familytoys.caption(kind)


@every_kind
def test_without_effect_of_adapters_the_answer_is_the_one_comfyuis_samplers_get(kind):
    patcher = familytoys.model(kind)
    noisy, sigma, entry = one(kind)
    denoiser = hosttoys.loaded(patcher)
    hosttoys.attach(denoiser, active=False)
    ours = denoised_by_us(denoiser, kind, noisy, sigma, [entry])
    theirs = familytoys.denoised_by_comfyui(patcher, kind, noisy, sigma, entry, denoiser.family.guidance)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def plain_autograd(kind, names, adapters, guidance, noisy, sigma, entries):
    """Loss and gradients by peft's own layers in a second, ordinary model, through ComfyUI's own model function."""
    base = familytoys.model(kind, inference=False).model
    network = base.diffusion_model
    inject_adapter_in_model(PeftConfig(r=3, lora_alpha=1.5, target_modules=names), network)
    factors = {}
    with torch.no_grad():
        for adapter in adapters:
            layer = network.get_submodule(adapter.name)
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            down.copy_(adapter.down)
            up.copy_(adapter.up.t())
            factors[adapter.name] = down, up
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):  # blocks may add into what they have normalised
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    raw = []
    network.register_forward_hook(lambda module, args, output: raw.append(output))
    frame = base.latent_format.latent_dimensions == 3
    mm.in_training = True
    try:
        for number, entry in enumerate(entries):
            latent = noisy[number : number + 1]
            latent = latent.unsqueeze(2) if frame else latent
            positive = comfy.sampler_helpers.convert_cond([familytoys.condition(kind, entry, guidance)])
            (made,) = comfy.samplers.encode_model_conds(base.extra_conds, positive, latent, latent.device, "positive")
            given = {k: v.process_cond(batch_size=1, area=None).cond for k, v in made["model_conds"].items()}
            base.apply_model(latent, sigma[number : number + 1], **given)
        loss = torch.cat(raw).square().mean()
        loss.backward()
    finally:
        mm.in_training = False
    # In a last block what belongs to the text alone is computed for nobody.
    unused = {name for name, (down, _) in factors.items() if down.grad is None}
    assert len(unused) < len(factors) / 4
    return loss.item(), {
        name: (torch.zeros_like(down), torch.zeros_like(up.t())) if name in unused else (down.grad, up.grad.t())
        for name, (down, up) in factors.items()
    }


@every_kind
def test_every_gradient_is_that_of_peft_under_plain_autograd_with_and_without_recomputing(kind):
    noisy, sigma = familytoys.latents(kind), familytoys.levels(kind)
    entries = [familytoys.caption(kind), familytoys.caption(kind, 1)]
    expected = None
    for checkpointing in (False, True):
        denoiser = hosttoys.loaded(familytoys.model(kind))
        adapters = hosttoys.attach(denoiser, checkpointing=checkpointing)
        if expected is None:
            names = [adapter.name for adapter in adapters]
            expected_loss, expected = plain_autograd(
                kind, names, adapters, denoiser.family.guidance, noisy, sigma, entries
            )
            largest = max(tensor.abs().max() for pair in expected.values() for tensor in pair)
        with denoiser.adapted():
            loss = denoiser(noisy, sigma, entries, familytoys.KINDS[kind].size).square().mean()
            loss.backward()
        assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
        for adapter in adapters:
            for ours, theirs in zip((adapter.down.grad, adapter.up.grad), expected[adapter.name], strict=True):
                assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6 * largest, (adapter.name, checkpointing)


def portrait(patcher):
    """All that must be the same after training as before."""
    network = patcher.model.diffusion_model
    return (
        hosttoys.digest(patcher.model.state_dict()),
        [(type(module).__name__, sorted(module.__dict__)) for module in network.modules()],
        [(id(tensor), tensor.requires_grad, tensor.is_inference()) for tensor in network.parameters()],
        network.training,
    )


@every_kind
def test_training_lowers_the_loss_the_file_is_what_was_trained_and_the_model_is_as_it_was(kind, tmp_path):
    """Promises 1 and 3: with every linear layer of the blocks, recomputing each block."""
    patcher = familytoys.model(kind)
    denoiser = hosttoys.loaded(patcher)
    before = portrait(patcher)
    config = LoraConfig(rank=4, layers=FULL)
    adapters = Adapters.build([hosttoys.part(denoiser)], config, seed=0)
    denoiser.prepare(adapters, MemoryPlan(recompute=EVERY_BLOCK))
    noisy, sigma, entry = one(kind)
    bare = denoised_by_us(denoiser, kind, noisy, sigma, [entry])

    objective, batch = Objective(ObjectiveConfig(), 0), familytoys.Batches(kind)[0]

    def asked():
        """The loss over what training asks in its first steps."""
        with denoiser.adapted(), torch.no_grad():
            questions = [objective.question(denoiser, batch, number) for number in range(4)]
            return sum(term.mean().item() for question in questions for term in objective.terms(denoiser, question))

    untrained = asked()
    for _ in train(denoiser, [batch] * 16, adapters, TrainConfig(steps=16, learning_rate=2e-2)):
        pass
    assert asked() < 0.95 * untrained
    live = denoised_by_us(denoiser, kind, noisy, sigma, [entry])
    assert portrait(patcher) == before

    path = tmp_path / "trained.safetensors"
    lora_file.write(path, lora_file.file_tensors(adapters.state(), config, torch.float32), {})
    proof = prove(patcher, path)
    assert proof.holds and proof.layers == len(adapters)
    with_file, _ = loras.apply(patcher, None, loras.read_lora(path), 1.0, 1.0)
    loaded = familytoys.denoised_by_comfyui(with_file, kind, noisy, sigma, entry, denoiser.family.guidance)
    assert (live - loaded).norm() <= 1e-3 * (loaded - bare).norm()
    mm.load_models_gpu([patcher])
    assert portrait(patcher)[0] == before[0]


@every_kind
def test_presets_of_a_family_grow_and_every_layer_they_name_is_there(kind):
    denoiser = hosttoys.loaded(familytoys.model(kind))
    counts = {
        preset: len(Adapters.build([hosttoys.part(denoiser)], LoraConfig(layers=preset), seed=0))
        for preset in LAYER_PRESETS
    }
    attention_and_feed_forward, attention, full = (counts[preset] for preset in LAYER_PRESETS)
    assert 0 < attention < attention_and_feed_forward <= full
    names = {type(module).__name__ for module in denoiser.network.modules()}
    assert set(denoiser.family.blocks) <= names


class PlainVae:
    """A VAE that shows latents as they are."""

    def decode(self, samples):
        samples = samples.flatten(2, 3) if samples.ndim == 5 else samples
        return samples[:, :3].movedim(1, -1)


@every_kind
def test_a_preview_can_be_made(kind):
    patcher = familytoys.model(kind)
    family = hosttoys.loaded(patcher).family
    width, height = familytoys.KINDS[kind].size
    settings = SamplerSettings(width, height, 0, family.cfg, family.sampler, family.scheduler, steps=2)
    prompts = [[familytoys.condition(kind, familytoys.caption(kind, number), None)] for number in range(2)]
    picture = sample_picture(patcher, PlainVae(), *prompts, settings)
    assert picture.isfinite().all() and picture.std() > 0


@every_kind
def test_a_lora_that_was_trained_here_is_known_to_be_for_this_model_by_its_layers_and_its_metadata(kind):
    """So Stack Apply and the Picker take it, and refuse it where it does not belong."""
    patcher = familytoys.model(kind)
    denoiser = hosttoys.loaded(patcher)
    keys = [f"{adapter.key}.alpha" for adapter in Adapters.build([hosttoys.part(denoiser)], CONFIG, seed=0)]
    described = {"ss_base_model_version": denoiser.family.base_model_version}
    assert lora_family.family_of(described) == loras.model_family(patcher)
    assert not lora_family.mismatch(lora_family.family_of(keys), loras.model_family(patcher))
    assert lora_family.mismatch("sdxl", loras.model_family(patcher))


# What the encoders of such families say


def test_masks_and_token_numbers_stay_what_they_are_and_only_the_dimension_of_the_batch_is_dropped():
    """Networks tell a mask of integers from numbers that are added to attention by its type alone."""
    encoded = {
        "cond": torch.zeros(1, 6, 40, dtype=torch.float16),
        "attention_mask": torch.ones(1, 6, dtype=torch.int64),
        "t5xxl_ids": torch.tensor([3, 1], dtype=torch.int32),
        "pooled_output": None,
    }
    entry = entries_of(encoded)
    assert {name: (tuple(value.shape), value.dtype) for name, value in entry.items()} == {
        "cross_attn": ((6, 40), torch.float32),
        "attention_mask": ((6,), torch.int64),
        "t5xxl_ids": ((2,), torch.int32),
    }


def test_a_vae_for_videos_gives_a_picture_without_the_dimension_of_frames():
    patcher, clip = familytoys.model("qwen_image"), hosttoys.clip("flux")

    class VideoVae:
        latent_channels, patcher = 16, clip.patcher

        def encode(self, pixels):
            return torch.ones(1, 16, 1, pixels.shape[1] // 8, pixels.shape[2] // 8)

    encoder = GraphEncoder(patcher, clip, VideoVae())
    assert encoder.latents(torch.zeros(64, 48, 3)).shape == (16, 8, 6)


def test_pictures_whose_network_is_told_different_things_go_through_in_turn_and_keep_their_order():
    """Lumina is told how many words count, which cannot be said for two pictures at once."""
    denoiser = hosttoys.loaded(familytoys.model("lumina2"))
    hosttoys.attach(denoiser)
    entries = [familytoys.caption("lumina2", number) for number in range(3)]
    entries[1]["attention_mask"] = torch.tensor([1, 1, 1, 0, 0, 0])
    noisy, sigma = familytoys.latents("lumina2", 3), torch.tensor([0.3, 0.8, 0.5])
    together = denoised_by_us(denoiser, "lumina2", noisy, sigma, entries)
    apart = [denoised_by_us(denoiser, "lumina2", noisy[[i]], sigma[[i]], entries[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)
