"""Every kind of adapter does alive what its file does when ComfyUI loads it, and is learned by the right gradients."""

import hosttoys
import pytest
import torch
from hostanswers import denoised_by_comfyui, denoised_by_us

from lora_workbench.nodes.host import loras
from lora_workbench.training import lora_file
from lora_workbench.training.config import KINDS, LoraConfig
from lora_workbench.training.lora import Adapters
from lora_workbench.training.memory import EVERY_BLOCK, NO_BLOCK, MemoryPlan

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", KINDS)
both_models = pytest.mark.parametrize("model", ["sdxl", "flux"])
SETTINGS = {"rank": 3, "alpha": 1.5, "conv_rank": 2}


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
@every_kind
@pytest.mark.parametrize("stabilized", [False, True], ids=["alpha over rank", "rank-stabilized"])
def test_the_live_model_is_what_comfyuis_loader_makes_of_its_file(model, kind, stabilized):
    patcher, (noisy, sigma, entry) = hosttoys.model(model), question(model)
    bare = denoised_by_comfyui(patcher, model, noisy, sigma, entry)
    denoiser, adapters = adapted(patcher, kind=kind, rank_stabilized=stabilized)
    live = denoised_by_us(denoiser, noisy, sigma, [entry])
    assert distance(live, bare) > 0.02
    for dtype, of_the_effect in ((torch.float32, 1e-3), (torch.float16, 2e-2)):
        tensors = lora_file.file_tensors(adapters.state(), adapters.config, dtype)
        with_file, _ = loras.apply(patcher, None, tensors, 1.0, 1.0)
        loaded = denoised_by_comfyui(with_file, model, noisy, sigma, entry)
        assert distance(loaded, live) < 1e-3, dtype
        assert distance(loaded - bare, live - bare) < of_the_effect, dtype
