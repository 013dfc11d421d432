"""Children of a family and nodes that change how a MODEL samples: training sees what sampling would see."""

import comfy.supported_models
import familytoys
import hosttoys
import pytest
import torch
from comfy_extras.nodes_model_advanced import (
    ModelSamplingAuraFlow,
    ModelSamplingContinuousEDM,
    ModelSamplingDiscrete,
    ModelSamplingFlux,
    ModelSamplingSD3,
)

from lora_workbench.nodes.host.identity import identity_of
from lora_workbench.nodes.host.prediction import prediction_of
from toyworld.node_pack import models

pytestmark = pytest.mark.comfy


def sdxl_from_checkpoint(*marks):
    """A MODEL as a checkpoint with these empty keys becomes one; NoobAI's v-prediction checkpoints have both."""
    settings = comfy.supported_models.SDXL(dict(models.TINY_SDXL))
    settings.set_inference_dtype(torch.float32, None)
    base = settings.get_model({mark: torch.tensor([]) for mark in marks}, device=torch.device("cpu"))
    return models.PATCHER(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def test_what_a_checkpoint_of_sdxl_predicts_and_how_its_noise_ends_is_read_from_it():
    expected = {(): ("eps", False), ("v_pred",): ("v", False), ("v_pred", "ztsnr"): ("v", True)}
    for marks, (prediction, ends_in_noise) in expected.items():
        denoiser = hosttoys.loaded(sdxl_from_checkpoint(*marks))
        assert (denoiser.prediction, bool(denoiser.sigmas[-1] > 1000)) == (prediction, ends_in_noise)


def test_edm_checkpoints_of_sdxl_are_refused():
    with pytest.raises(ValueError, match="an objective that cannot be trained|only 1 can be trained"):
        prediction_of(sdxl_from_checkpoint("edm_mean", "edm_std"))


def patched(kind):
    """A MODEL with a node behind it, and the levels at which it is asked."""
    discrete = ModelSamplingDiscrete().patch
    if kind == "v on eps":
        return discrete(hosttoys.model("sdxl"), "v_prediction", False)[0], "sdxl", torch.tensor([3.0])
    if kind == "v to pure noise":
        return discrete(hosttoys.model("sdxl_vpred"), "v_prediction", True)[0], "sdxl", torch.tensor([4000.0])
    if kind == "flux shift":
        return ModelSamplingFlux().patch(hosttoys.model("flux"), 1.3, 0.4, 512, 512)[0], "flux", torch.tensor([0.6])
    if kind == "sd3 shift":
        return ModelSamplingSD3().patch(familytoys.model("sd3"), 5.0)[0], "sd3", torch.tensor([0.6])
    return ModelSamplingAuraFlow().patch_aura(familytoys.model("sd3"), 1.73)[0], "sd3", torch.tensor([0.6])


@pytest.mark.parametrize("kind", ["v on eps", "v to pure noise", "flux shift", "sd3 shift", "another time scale"])
def test_the_answer_of_a_model_with_a_sampling_node_is_the_one_that_samplers_get(kind):
    patcher, name, sigma = patched(kind)
    toys = familytoys if name in familytoys.KINDS else hosttoys
    noisy, entry = toys.latents(name, 1), toys.caption(name)
    denoiser = hosttoys.loaded(patcher)
    hosttoys.attach(denoiser, active=False)
    size = familytoys.KINDS[name].size if toys is familytoys else hosttoys.SIZE
    with denoiser.adapted(), torch.no_grad():
        raw = denoiser(noisy, sigma, [entry], size)
    ours = patcher.get_model_object("model_sampling").calculate_denoised(sigma, raw, noisy)
    theirs = familytoys.denoised_by_comfyui(patcher, name, noisy, sigma, entry, denoiser.family.guidance)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_sampling_node_makes_another_run_of_it_and_leaves_the_model_behind_it_alone():
    bare = familytoys.model("sd3")
    shifted = ModelSamplingSD3().patch(bare, 5.0)[0]
    assert identity_of(shifted) != identity_of(bare) == identity_of(familytoys.model("sd3"))
    times = []
    for patcher in (bare, ModelSamplingAuraFlow().patch_aura(bare, 1.73)[0]):
        denoiser = hosttoys.loaded(patcher)
        hosttoys.attach(denoiser, active=False)
        handle = denoiser.network.register_forward_pre_hook(lambda _, args: times.append(args[1].item()))
        with denoiser.adapted(), torch.no_grad():
            entry = familytoys.caption("sd3")
            denoiser(familytoys.latents("sd3", 1), torch.tensor([0.6]), [entry], familytoys.SIZE)
        handle.remove()
    assert times == pytest.approx([600.0, 0.6])


@pytest.mark.parametrize(("sampling", "prediction"), [("v_prediction", "v"), ("eps", "eps")])
def test_continuous_levels_are_trained_where_the_answer_means_the_same(sampling, prediction):
    patcher = ModelSamplingContinuousEDM().patch(hosttoys.model("sdxl"), sampling, 120.0, 0.002)[0]
    assert prediction_of(patcher) == prediction


@pytest.mark.parametrize("sampling", ["edm", "edm_playground_v2.5", "cosmos_rflow"])
def test_continuous_levels_with_another_meaning_are_refused(sampling):
    patcher = ModelSamplingContinuousEDM().patch(hosttoys.model("sdxl"), sampling, 120.0, 0.002)[0]
    with pytest.raises(ValueError, match="cannot be trained: remove the node|only 1 can be trained"):
        prediction_of(patcher)
