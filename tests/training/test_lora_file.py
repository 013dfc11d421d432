import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toys import Batches, Denoiser, Network

from lora_workbench.training.config import DORA, LoraConfig
from lora_workbench.training.lora_file import file_tensors, write

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
WEIGHTS = {f"{LAYER}.down": torch.randn(4, 6), f"{LAYER}.up": torch.randn(4, 5)}

ENTRIES = {f"ss_{letter}": letter for letter in "abcdefgh"}


# Keys


def test_each_layer_is_three_tensors_under_kohyas_names():
    tensors = file_tensors(WEIGHTS, LoraConfig(rank=4), torch.float32)
    assert set(tensors) == {f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight", f"{LAYER}.alpha"}
    assert torch.equal(tensors[f"{LAYER}.lora_down.weight"], WEIGHTS[f"{LAYER}.down"])
    assert torch.equal(tensors[f"{LAYER}.lora_up.weight"], WEIGHTS[f"{LAYER}.up"].t())


@pytest.mark.parametrize(("alpha", "written"), [(0, 4.0), (2, 2.0), (16, 16.0)])
def test_alpha_is_always_written_and_gives_the_scale_of_training(alpha, written):
    """Trap 18: without it, strengths differ between tools."""
    config = LoraConfig(rank=4, alpha=alpha)
    tensors = file_tensors(WEIGHTS, config, torch.float16)
    (value,) = (tensor for name, tensor in tensors.items() if name.endswith(".alpha"))
    assert value.item() == written and value.shape == ()
    assert value.item() == config.alpha_for(4)


def test_a_file_merged_by_kohyas_formula_gives_what_the_adapters_gave():
    """W' = W + alpha / rank * up @ down."""
    denoiser = Denoiser()
    with torch.no_grad():
        for adapter in denoiser.adapters:
            adapter.up.normal_(generator=torch.Generator().manual_seed(1))
    tensors = file_tensors(denoiser.adapters.state(), denoiser.adapters.config, torch.float32)
    merged = Network()
    for key, adapter in denoiser.adapters.members.items():
        down, up, alpha = (tensors[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        merged.get_submodule(adapter.name).weight += alpha / len(down) * up @ down
    batch = Batches(2)[0]
    sigma = torch.tensor([0.5, 3.0])
    with denoiser.adapted():
        live = denoiser(batch.latents, sigma, batch.text, batch.size)
    text = torch.stack([entry["cross_attn"] for entry in batch.text])
    torch.testing.assert_close(merged(batch.latents, sigma, text, batch.size), live.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "of_the_change"), [(torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_a_doras_change_survives_rounding_although_it_is_a_thousandth_of_the_weight(dtype, of_the_change):
    """At the width of a real layer, where rounding the columns' lengths would be as large as the change itself."""
    random = torch.Generator().manual_seed(0)
    weight, down = (torch.randn(640, 640, generator=random) * spread for spread in (0.02, 0.02))
    down, up = down[:4], torch.randn(4, 640, generator=random) * 5e-4
    length = weight.norm(dim=0, keepdim=True) * (1 + 5e-4 * torch.randn(1, 640, generator=random))
    trained = {f"{LAYER}.{name}": tensor for name, tensor in (("down", down), ("up", up), ("magnitude", length))}

    def change(dtype):
        tensors = file_tensors(trained, LoraConfig(rank=4, kind=DORA), dtype)
        up, down, scale = (
            tensors[f"{LAYER}.{part}"].float() for part in ("lora_up.weight", "lora_down.weight", "dora_scale")
        )
        turned = weight + up @ down
        return scale * turned / turned.norm(dim=0, keepdim=True) - weight

    exact = change(torch.float32)
    assert 1e-4 < exact.norm() / weight.norm() < 2e-3
    assert (change(dtype) - exact).norm() / exact.norm() < of_the_change


# Writing


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "deep" / "star.safetensors"
    tensors = file_tensors(WEIGHTS, LoraConfig(rank=4), torch.bfloat16)
    entries = {"modelspec.title": "星", "ss_output_name": "étoile"}
    write(path, tensors, entries)
    back = load_file(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata().items() >= entries.items()


def test_the_hash_is_that_of_the_tensors_whatever_the_file_says_about_itself(tmp_path):
    """As kohya's scripts and the model metadata specification define it, so that web UIs find the file again."""
    tensors = file_tensors(WEIGHTS, LoraConfig(rank=4), torch.float16)
    told = []
    for name in ("one", "another"):
        path = tmp_path / f"{name}.safetensors"
        write(path, tensors, {"ss_output_name": name})
        with safe_open(path, framework="pt") as file:
            told.append(file.metadata())
        data = path.read_bytes()
        digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
        assert (told[-1]["sshs_model_hash"], told[-1]["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
    assert told[0]["sshs_model_hash"] == told[1]["sshs_model_hash"]


def test_equal_training_gives_equal_bytes_because_nothing_says_when(tmp_path):
    tensors = file_tensors(WEIGHTS, LoraConfig(rank=4), torch.float16)
    write(tmp_path / "one.safetensors", tensors, ENTRIES)
    write(tmp_path / "two.safetensors", dict(reversed(tensors.items())), dict(reversed(ENTRIES.items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6], ids=["NaN", "infinite", "infinite once halved"])
def test_a_value_that_is_not_finite_means_no_file(tmp_path, value):
    weights = {**WEIGHTS, f"{LAYER}.up": torch.full((4, 5), value)}
    with pytest.raises(ValueError, match="^'star.safetensors' was not written: 'lora_unet_.*' is not finite"):
        write(tmp_path / "star.safetensors", file_tensors(weights, LoraConfig(rank=4), torch.float16), {})
    assert list(tmp_path.iterdir()) == []
