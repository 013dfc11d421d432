"""The file is proved (promise 3): read back through ComfyUI's own mapping, every layer matched, with an effect."""

import logging

import hosttoys
import pytest
import torch

from lora_workbench.nodes.host import loras
from lora_workbench.nodes.host.proof import prove
from lora_workbench.training import lora_file
from lora_workbench.training.config import LoraConfig

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", hosttoys.KINDS)
CONFIG = LoraConfig(rank=3, alpha=1.5)


def written(patcher, path, *, active=True, change=lambda tensors: tensors, dtype=torch.float32):
    adapters = hosttoys.attach(hosttoys.loaded(patcher), active=active)
    lora_file.write(path, change(lora_file.file_tensors(adapters.state(), CONFIG, dtype)), {})
    return adapters


@every_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_written_file_is_proved_layer_by_layer(kind, dtype, tmp_path):
    patcher = hosttoys.model(kind)
    adapters = written(patcher, tmp_path / "star.safetensors", dtype=dtype)
    proof = prove(patcher, tmp_path / "star.safetensors")
    assert proof.holds
    assert proof.matched == proof.layers == len(adapters)
    assert str(proof).startswith(f"proved: {len(adapters)} of {len(adapters)} layers load in ComfyUI")


@every_kind
def test_the_effect_is_the_size_of_what_loading_changes_about_the_weights(kind, tmp_path):
    patcher, path = hosttoys.model(kind), tmp_path / "star.safetensors"
    written(patcher, path)
    before = {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}
    patched, _ = loras.apply(patcher, None, loras.read_lora(path), 1.0, 0.0)
    hosttoys.loaded(patched)
    changes = [(tensor - before[name]).double().square().sum() for name, tensor in patched.model.state_dict().items()]
    assert prove(patcher, path).effect == pytest.approx(sum(changes).sqrt().item(), rel=1e-3)


def test_a_file_that_is_on_a_model_is_free_to_be_replaced(tmp_path):
    """On Windows no file can be that is mapped into memory; what is mapped changes with its file."""
    patcher, path = hosttoys.model("sdxl"), tmp_path / "star.safetensors"
    written(patcher, path)
    lora = loras.read_lora(path)
    before = {name: tensor.clone() for name, tensor in lora.items()}
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.items())


@every_kind
def test_loading_the_file_says_nothing_about_keys_that_were_not_loaded(kind, tmp_path, caplog):
    patcher, path = hosttoys.model(kind), tmp_path / "star.safetensors"
    written(patcher, path)
    with caplog.at_level(logging.DEBUG):
        prove(patcher, path)
        patched, clip = loras.apply(patcher, hosttoys.clip(kind), loras.read_lora(path), 1.0, 1.0)
        hosttoys.loaded(patched)
    assert not [record.message for record in caplog.records if "not loaded" in record.message.lower()]
    assert len(patched.patches) == prove(patcher, path).layers


def test_a_file_without_effect_is_not_proved(tmp_path):
    patcher, path = hosttoys.model("sdxl"), tmp_path / "star.safetensors"
    written(patcher, path, active=False)
    proof = prove(patcher, path)
    assert proof.effect == 0 and not proof.holds and "NOT PROVED" in str(proof)


def test_a_file_with_a_layer_that_the_model_lacks_is_not_proved(tmp_path):
    patcher, path = hosttoys.model("sdxl"), tmp_path / "star.safetensors"
    adapters = written(
        patcher,
        path,
        change=lambda tensors: {name.replace("middle_block", "muddle_block"): t for name, t in tensors.items()},
    )
    proof = prove(patcher, path)
    assert proof.matched < proof.layers == len(adapters) and not proof.holds


def test_a_file_of_another_family_matches_nothing(tmp_path):
    path = tmp_path / "star.safetensors"
    written(hosttoys.model("flux"), path)
    proof = prove(hosttoys.model("sdxl"), path)
    assert proof.matched == 0 and not proof.holds


def test_proving_leaves_the_model_as_it_was(tmp_path):
    patcher, path = hosttoys.model("sdxl"), tmp_path / "star.safetensors"
    written(patcher, path)
    before = hosttoys.digest(patcher.model.state_dict()), dict(patcher.patches)
    prove(patcher, path)
    assert (hosttoys.digest(patcher.model.state_dict()), patcher.patches) == before
