"""The preview is the result (promise 2): the same picture as the graph's own nodes make, pixel for pixel."""

import hosttoys
import pytest
import torch

from lora_workbench.nodes.host.sampling import SamplerSettings, encode_prompt, sample_picture

pytestmark = pytest.mark.comfy


def settings_for(kind, **changes):
    flux = kind == "flux"
    facts = {
        "width": 96,
        "height": 64,
        "seed": 11,
        "cfg": 1.0 if flux else 5.0,
        "sampler": "euler",
        "scheduler": "simple" if flux else "normal",
        "steps": 3,
    }
    return SamplerSettings(**{**facts, **changes})


def by_the_graphs_nodes(patcher, clip, vae, prompt, settings):
    """CLIPTextEncode, EmptyLatentImage, KSampler and VAEDecode, as the executor calls them."""
    import nodes

    with torch.inference_mode():
        (positive,), (negative,) = (nodes.CLIPTextEncode().encode(clip, text) for text in (prompt, ""))
        (latent,) = nodes.EmptyLatentImage().generate(settings.width, settings.height)
        (samples,) = nodes.KSampler().sample(
            patcher,
            settings.seed,
            settings.steps,
            settings.cfg,
            settings.sampler,
            settings.scheduler,
            positive,
            negative,
            latent,
        )
        (pictures,) = nodes.VAEDecode().decode(vae, samples)
    return pictures[0]


@pytest.mark.parametrize("kind", hosttoys.KINDS)
@pytest.mark.parametrize(
    "changes", [{}, {"seed": 2**63}, {"sampler": "euler_ancestral"}], ids=["euler", "large seed", "ancestral"]
)
def test_a_picture_is_the_one_the_graph_makes_pixel_for_pixel(kind, changes):
    patcher, clip, settings = hosttoys.model(kind), hosttoys.clip(kind), settings_for(kind, **changes)
    vae = hosttoys.autoencoder(patcher)
    prompts = encode_prompt(clip, "a (red:1.2) circle"), encode_prompt(clip, "")
    ours = sample_picture(patcher, vae, *prompts, settings)
    assert ours.shape == (64, 96, 3)
    assert torch.equal(ours, by_the_graphs_nodes(patcher, clip, vae, "a (red:1.2) circle", settings))


def test_a_picture_leaves_the_global_random_state_as_it_was():
    """Trap 21."""
    patcher, clip = hosttoys.model("sdxl"), hosttoys.clip("sdxl")
    vae = hosttoys.autoencoder(patcher)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    prompts = encode_prompt(clip, "a red circle"), encode_prompt(clip, "")
    sample_picture(patcher, vae, *prompts, settings_for("sdxl", sampler="euler_ancestral"))
    assert torch.equal(torch.get_rng_state(), before)
