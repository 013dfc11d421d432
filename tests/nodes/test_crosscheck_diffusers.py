"""The numbers of diffusers' training scripts, and files that diffusers reads: checks against code we did not write."""

import diffusersnets
import familytoys
import hosttoys
import pytest
import torch
import torch.nn.functional as F

from lora_workbench.training import objective as asking
from lora_workbench.training.config import LoraConfig, ObjectiveConfig
from lora_workbench.training.families import FLUX, SD15, SDXL
from lora_workbench.training.lora import Adapters, Part
from lora_workbench.training.lora_file import file_tensors
from lora_workbench.training.noise import noise_like
from lora_workbench.training.objective import Objective
from lora_workbench.training.timesteps import resolution_shift, with_odds
from toyworld.node_pack import models

pytestmark = pytest.mark.comfy
diffusers = pytest.importorskip("diffusers")

SEED, NUMBER = 3, 1
SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def toys(kind):
    """The helper that makes models and batches of this kind."""
    return familytoys if kind in familytoys.KINDS else hosttoys


def ours(kind):
    """Loss and adapter gradients of one of our batches, and what the network was given for it."""
    denoiser = hosttoys.loaded(toys(kind).model(kind))
    adapters = hosttoys.attach(denoiser)
    given = []
    handle = denoiser.network.register_forward_pre_hook(
        lambda _, args, named: given.append((args, named)), with_kwargs=True
    )
    objective = Objective(ObjectiveConfig(), SEED)
    with denoiser.adapted():
        (losses,) = objective.terms(denoiser, objective.question(denoiser, toys(kind).Batches(kind)[NUMBER], NUMBER))
        loss = losses.mean()
        loss.backward()
    handle.remove()
    return denoiser, adapters, loss.item(), [tensor.grad.clone() for tensor in adapters.parameters()], given[0]


def theirs(denoiser, adapters, noisy, time, named, wanted):
    """Loss and gradients as diffusers' scripts compute them, over the same network."""
    adapters.zero_grad()
    with denoiser.adapted():
        answer = denoiser.network(noisy, time, **named)
        loss = F.mse_loss(answer.float(), wanted.float(), reduction="mean")
        loss.backward()
    return loss.item(), [tensor.grad for tensor in adapters.parameters()]


def assert_same(our_loss, our_gradients, their_loss, their_gradients):
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8


# Loss and gradients


@pytest.mark.parametrize(
    ("kind", "prediction"), [("sdxl", "epsilon"), ("sdxl_vpred", "v_prediction"), ("sd15", "epsilon")]
)
def test_the_loss_and_gradients_of_sdxl_and_sd15_are_those_of_diffusers_training_scripts(kind, prediction):
    """train_text_to_image_lora(_sdxl).py: add_noise, then noise or get_velocity as the target, mean squared error."""
    denoiser, adapters, our_loss, our_gradients, ((network_input, time), named) = ours(kind)
    scheduler = diffusers.DDPMScheduler(**SDXL_NOISE, prediction_type=prediction)
    batch = toys(kind).Batches(kind)[NUMBER]
    noise = noise_like(batch.latents, SEED, "noise", NUMBER)
    steps = time.round().long()
    noisy = scheduler.add_noise(batch.latents, noise, steps)
    torch.testing.assert_close(network_input, noisy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(time, steps.float(), rtol=0, atol=1e-3)
    wanted = noise if prediction == "epsilon" else scheduler.get_velocity(batch.latents, noise, steps)
    assert_same(our_loss, our_gradients, *theirs(denoiser, adapters, noisy, steps.float(), named, wanted))


def test_the_noise_levels_of_an_sdxl_model_are_those_of_diffusers_schedule():
    alpha_bar = diffusers.DDPMScheduler(**SDXL_NOISE).alphas_cumprod
    levels = hosttoys.loaded(hosttoys.model("sdxl")).sigmas
    torch.testing.assert_close(levels, ((1 - alpha_bar) / alpha_bar).sqrt(), rtol=1e-4, atol=1e-5)


def test_fluxs_loss_and_gradients_are_those_of_diffusers_training_script(monkeypatch):
    """train_dreambooth_lora_flux.py: (1 - sigma) x + sigma n, target n - x, time sigma, mean squared error."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    places = torch.tensor([850, 300])  # of its 1,000 levels
    sigma = scheduler.sigmas[places]
    monkeypatch.setattr(asking, "training_sigmas", lambda *_: sigma)
    denoiser, adapters, our_loss, our_gradients, ((network_input, time), named) = ours("flux")
    batch = hosttoys.Batches("flux")[NUMBER]
    noise = noise_like(batch.latents, SEED, "noise", NUMBER)
    noisy = scheduler.scale_noise(batch.latents, scheduler.timesteps[places], noise)
    torch.testing.assert_close(network_input, noisy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(time, scheduler.timesteps[places] / 1000, rtol=1e-6, atol=1e-6)
    assert_same(our_loss, our_gradients, *theirs(denoiser, adapters, noisy, time, named, noise - batch.latents))


@pytest.mark.parametrize("kind", ["sd3", "sd35"])
def test_sd3s_loss_and_gradients_are_those_of_diffusers_training_script(kind, monkeypatch):
    """train_dreambooth_lora_sd3.py: (1 - sigma) x + sigma n, time 1000 sigma, mean squared error.

    With `--precondition_outputs`, its default, it compares x_t - sigma v with x and weighs by sigma^-2; without, v with
    n - x. Both are one loss.
    """
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    places = torch.tensor([850, 300])  # of its 1,000 levels
    sigma = scheduler.sigmas[places]
    monkeypatch.setattr(asking, "training_sigmas", lambda *_: sigma)
    denoiser, adapters, our_loss, our_gradients, ((network_input, time), named) = ours(kind)
    batch = familytoys.Batches(kind)[NUMBER]
    noise = noise_like(batch.latents, SEED, "noise", NUMBER)
    noisy = scheduler.scale_noise(batch.latents, scheduler.timesteps[places], noise)
    torch.testing.assert_close(network_input, noisy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(time, scheduler.timesteps[places], rtol=1e-6, atol=1e-3)
    assert_same(our_loss, our_gradients, *theirs(denoiser, adapters, noisy, time, named, noise - batch.latents))
    with denoiser.adapted(), torch.no_grad():
        answer = denoiser.network(noisy, time, **named)
    level = sigma.view(-1, 1, 1, 1)
    preconditioned = level**-2 * (noisy - level * answer - batch.latents).square()
    assert preconditioned.mean().item() == pytest.approx(our_loss, rel=1e-4)


def test_the_levels_of_an_sd3_model_are_those_of_diffusers_schedule():
    """ModelSamplingDiscreteFlow with shift 3, as SD 3's checkpoints are sampled."""
    sampling = familytoys.model("sd3").model.model_sampling
    expected = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[:1000].flip(0)
    torch.testing.assert_close(sampling.sigmas, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", [256, 512, 768, 1024, 1536])
def test_the_shift_of_fluxs_levels_is_that_of_diffusers(side):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    levels = torch.linspace(0.01, 1, 100)
    mu = calculate_shift((side // 16) ** 2, 256, 4096, 0.5, 1.15)
    expected = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, levels)
    torch.testing.assert_close(with_odds(levels, resolution_shift((side, side))), expected, rtol=1e-5, atol=1e-6)


def test_the_sizes_sdxl_is_told_are_the_time_ids_of_diffusers():
    """add_time_ids are (original, crop, target) sizes; the UNet embeds each as 256 numbers, cosines first."""
    from diffusers.models.embeddings import get_timestep_embedding

    _, _, _, _, (_, named) = ours("sdxl")
    width, height = hosttoys.Batches("sdxl")[NUMBER].size
    time_ids = torch.tensor([height, width, 0, 0, height, width])
    expected = get_timestep_embedding(time_ids, 256, flip_sin_to_cos=True, downscale_freq_shift=0).flatten()
    torch.testing.assert_close(named["y"][0, -6 * 256 :], expected, rtol=1e-4, atol=1e-4)


# Files


def full_size_tensors(family, network):
    """A LoRA file for every adapted layer of the real architecture, random throughout."""
    config = LoraConfig(rank=2, alpha=1.0)
    adapters = Adapters.build([Part("lora_unet_", network, family.layers)], config, seed=0)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters:
            adapter.up.copy_(torch.randn(adapter.up.shape, generator=random))
    return file_tensors(adapters.state(), config, torch.float32)


@pytest.fixture(scope="module")
def sdxl_tensors():
    import comfy.ops
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = comfy.supported_models.SDXL(dict(models.FULL_SDXL)).unet_config
    return full_size_tensors(SDXL, UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init))


@pytest.fixture(scope="module")
def flux_tensors():
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    return full_size_tensors(FLUX, Flux(**models.FULL_FLUX, device="meta", operations=comfy.ops.disable_weight_init))


def test_every_layer_of_a_full_size_sdxl_lora_finds_its_place_in_diffusers_unet(sdxl_tensors):
    from diffusers.utils import convert_unet_state_dict_to_peft

    unet = diffusersnets.network("sdxl")
    layers = len(sdxl_tensors) // 3
    assert layers == 70 * 10  # transformer blocks, each with eight attention and two feed-forward layers
    converted, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(dict(sdxl_tensors), unet_config=unet.config)
    assert len(alphas) == layers and set(alphas.values()) == {1.0}
    tensors = convert_unet_state_dict_to_peft(
        {name.removeprefix("unet."): tensor for name, tensor in converted.items()}
    )
    assert_fits(tensors, unet, layers)


def test_every_layer_of_a_full_size_sd15_lora_finds_its_place_in_diffusers_unet():
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from diffusers.utils import convert_unet_state_dict_to_peft

    network = UNetModel(**familytoys.FULL_UNET, device="meta", operations=comfy.ops.disable_weight_init)
    tensors = full_size_tensors(SD15, network)
    unet = diffusersnets.network("sd15")
    layers = len(tensors) // 3
    assert layers == 16 * 10
    converted, _ = diffusers.StableDiffusionPipeline.lora_state_dict(dict(tensors), unet_config=unet.config)
    names = {name.removeprefix("unet."): tensor for name, tensor in converted.items()}
    assert_fits(convert_unet_state_dict_to_peft(names), unet, layers)


def test_every_layer_of_a_full_size_flux_lora_finds_its_place_in_diffusers_transformer(flux_tensors):
    transformer = diffusersnets.network("flux")
    assert len(flux_tensors) == 3 * (19 * 8 + 38 * 2)
    converted = diffusers.FluxPipeline.lora_state_dict(dict(flux_tensors))
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}
    # Its attention keeps q, k and v apart: two fused layers of a double block are six, one of a single block is four.
    assert_fits(tensors, transformer, 19 * (6 + 2 + 4) + 38 * (4 + 1))


def assert_fits(tensors, network, layers):
    modules = dict(network.named_modules())
    names = {name.rsplit(".lora_", 1)[0] for name in tensors}
    assert len(names) == layers and len(tensors) == 2 * layers
    for name in names:
        module = modules[name]
        assert tensors[f"{name}.lora_A.weight"].shape[1] == module.in_features, name
        assert tensors[f"{name}.lora_B.weight"].shape[0] == module.out_features, name


def test_what_diffusers_adds_to_a_flux_layer_is_what_kohyas_formula_adds(flux_tensors):
    name = "lora_unet_double_blocks_3_txt_attn_qkv"
    down, up, alpha = (flux_tensors[f"{name}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    converted = diffusers.FluxPipeline.lora_state_dict(dict(flux_tensors))
    parts = [f"transformer.transformer_blocks.3.attn.add_{part}_proj" for part in "qkv"]
    added = torch.cat([converted[f"{part}.lora_B.weight"] @ converted[f"{part}.lora_A.weight"] for part in parts])
    torch.testing.assert_close(added, alpha / len(down) * up @ down, rtol=1e-5, atol=1e-5)
