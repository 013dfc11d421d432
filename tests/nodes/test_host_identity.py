"""Two MODELs have the same identity when they would train the same, and in any session."""

import hosttoys
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.identity import identity_of
from lora_workbench.training.config import LoraConfig
from lora_workbench.training.lora_file import file_tensors

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", hosttoys.KINDS)


def lora_for(patcher, fill=0.01):
    """A LoRA file's tensors for the model's first adaptable layers."""
    denoiser = hosttoys.loaded(patcher)
    state = {name: torch.full_like(tensor, fill) for name, tensor in hosttoys.attach(denoiser).state().items()}
    return file_tensors(state, LoraConfig(rank=3), torch.float32)


@every_kind
def test_the_same_weights_loaded_twice_are_the_same_model(kind):
    assert identity_of(hosttoys.model(kind)) == identity_of(hosttoys.model(kind))


@every_kind
def test_loading_cloning_and_using_a_model_do_not_change_what_it_is(kind):
    patcher = hosttoys.model(kind)
    before = identity_of(patcher)
    denoiser = hosttoys.loaded(patcher)
    hosttoys.attach(denoiser)
    with denoiser.adapted():
        denoiser(
            hosttoys.latents(kind), hosttoys.levels(kind), [hosttoys.caption(kind)] * 2, hosttoys.SIZE
        ).sum().backward()
    assert identity_of(patcher) == identity_of(patcher.clone()) == before


def test_other_weights_or_another_kind_are_another_model():
    known = [identity_of(hosttoys.model(kind)) for kind in hosttoys.KINDS] + [
        identity_of(hosttoys.model("sdxl", seed=1))
    ]
    assert len(set(known)) == 4


@every_kind
def test_a_lora_patched_on_is_another_model_whether_it_is_loaded_or_not(kind):
    bare = hosttoys.model(kind)
    patched, _ = loras.apply(bare, None, lora_for(bare), 1.0, 1.0)
    weaker, _ = loras.apply(bare, None, lora_for(bare), 0.5, 1.0)
    other, _ = loras.apply(bare, None, lora_for(bare, fill=0.02), 1.0, 1.0)
    names = [identity_of(patcher) for patcher in (bare, patched, weaker, other)]
    assert len(set(names)) == 4
    hosttoys.loaded(patched)
    assert [identity_of(patcher) for patcher in (bare, patched, weaker, other)] == names


def test_another_sampling_is_another_model_even_with_the_same_weights():
    patcher, twin = hosttoys.model("sdxl"), hosttoys.model("sdxl_vpred")
    patched = [ModelSamplingDiscrete().patch(patcher, name, zsnr)[0] for name, zsnr in SAMPLINGS]
    assert len({identity_of(other) for other in patched}) == len(SAMPLINGS)
    assert identity_of(patcher) != identity_of(twin)


SAMPLINGS = [("eps", False), ("v_prediction", False), ("v_prediction", True), ("eps", True)]


def test_a_sampling_that_another_node_patched_and_loaded_changes_nothing():
    patcher = hosttoys.model("sdxl")
    before = identity_of(patcher)
    other = ModelSamplingDiscrete().patch(patcher, "v_prediction", True)[0]
    name = identity_of(other)
    hosttoys.loaded(other)
    other.pre_run()
    assert (identity_of(patcher), identity_of(other)) == (before, name)


@pytest.mark.parametrize("parameters", [49408 * 1280, 32128 * 4096, 2**24 + 1, 1, 2, 7, 8, 9])
def test_tensors_of_any_size_are_read_within_their_bounds(parameters):
    class Patcher:
        backup, patches, object_patches = {}, {}, {}

        class model:  # noqa: N801
            @staticmethod
            def state_dict():
                return {"weight": torch.ones(1).expand(parameters)}

    assert len(identity_of(Patcher)) == 32
