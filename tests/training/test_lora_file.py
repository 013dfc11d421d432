import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toys import Batches, Denoiser, Network

from lora_workbench.training.config import LoraConfig, TrainConfig
from lora_workbench.training.families import FLUX, SDXL
from lora_workbench.training.lora_file import kohya_keys, metadata, tag_frequency, write, write_atomically

LAYER = "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
WEIGHTS = {f"{LAYER}.down": torch.randn(4, 6), f"{LAYER}.up": torch.randn(4, 5)}


def described(**changes):
    facts = {
        "title": "star",
        "family": SDXL,
        "prediction": "eps",
        "lora": LoraConfig(rank=4, alpha=2),
        "config": TrainConfig(steps=100),
        "triggers": {"zork": 2},
        "resolution": 1024,
        "captions": ["zork, star, magenta", "zork, a magenta star stands on a blue background"],
        "step": 50,
    }
    return metadata(**{**facts, **changes})


# Keys


def test_each_layer_is_three_tensors_under_kohyas_names():
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    tensors = kohya_keys(WEIGHTS, LoraConfig(rank=4), torch.float32)
    assert set(tensors) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"}
    assert torch.equal(tensors[f"{name}.lora_down.weight"], WEIGHTS[f"{LAYER}.down"])
    assert torch.equal(tensors[f"{name}.lora_up.weight"], WEIGHTS[f"{LAYER}.up"].t())


@pytest.mark.parametrize(("alpha", "written"), [(0, 4.0), (2, 2.0), (16, 16.0)])
def test_alpha_is_always_written_and_gives_the_scale_of_training(alpha, written):
    """Trap 18: without it, strengths differ between tools."""
    config = LoraConfig(rank=4, alpha=alpha)
    tensors = kohya_keys(WEIGHTS, config, torch.float16)
    (value,) = (tensor for name, tensor in tensors.items() if name.endswith(".alpha"))
    assert value.item() == written and value.shape == ()
    assert value.item() / 4 == config.scale


def test_a_file_merged_by_kohyas_formula_gives_what_the_adapters_gave():
    """W' = W + alpha / rank * up @ down."""
    denoiser = Denoiser()
    with torch.no_grad():
        for adapter in denoiser.adapters:
            adapter.up.normal_(generator=torch.Generator().manual_seed(1))
    tensors = kohya_keys(denoiser.adapters.state(), denoiser.adapters.config, torch.float32)
    merged = Network()
    for name in denoiser.adapters.members:
        key = "lora_unet_" + name.replace(".", "_")
        down, up, alpha = (tensors[f"{key}.{part}"] for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        merged.get_submodule(name).weight += alpha / len(down) * up @ down
    batch = Batches(2)[0]
    sigma = torch.tensor([0.5, 3.0])
    with denoiser.adapted():
        live = denoiser(batch.latents, sigma, batch.text, batch.size)
    text = torch.stack([entry["cross_attn"] for entry in batch.text])
    torch.testing.assert_close(merged(batch.latents, sigma, text, batch.size), live.detach(), rtol=1e-4, atol=1e-5)


# Metadata


def test_the_trigger_word_is_where_comfyui_and_others_look_for_it():
    entries = described()
    assert next(iter(json.loads(entries["ss_tag_frequency"])["star"])) == "zork"
    assert entries["modelspec.trigger_phrase"] == "zork"


def test_without_a_trigger_word_none_is_invented():
    entries = described(triggers={}, captions=["star, magenta"])
    assert "modelspec.trigger_phrase" not in entries
    assert json.loads(entries["ss_tag_frequency"]) == {"star": {"star": 1, "magenta": 1}}


def test_every_concept_is_called_by_its_own_trigger_word():
    entries = described(triggers={"zork": 8, "blip": 4})
    assert entries["modelspec.trigger_phrase"] == "zork, blip"
    frequency = json.loads(entries["ss_tag_frequency"])["star"]
    assert list(frequency.items())[:2] == [("zork", 8), ("blip", 4)]


def test_the_tag_frequency_counts_pictures_and_never_holds_a_sentence():
    captions = [
        "zork, star, red hat",
        "zork, star, star",
        "zork standing in my grandmother's kitchen in Bremen on a Sunday",
        "A secret. Told here.",
        "",
    ]
    assert tag_frequency(captions, {"zork": 5}) == {"zork": 5, "star": 2, "red hat": 1}


def test_no_caption_sentence_is_anywhere_in_the_metadata():
    assert "stands on" not in json.dumps(described())


@pytest.mark.parametrize(
    ("family", "prediction", "expected"),
    [
        (SDXL, "eps", ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon")),
        (SDXL, "v", ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "v")),
        (FLUX, "flow", ("flux1", "flux-1-dev/lora", None)),
    ],
)
def test_the_file_says_which_family_it_is_for(family, prediction, expected):
    entries = described(family=family, prediction=prediction)
    names = ("ss_base_model_version", "modelspec.architecture", "modelspec.prediction_type")
    assert tuple(entries.get(name) for name in names) == expected


def test_the_fields_that_the_model_spec_asks_for_are_there():
    entries = described()
    for field in ("sai_model_spec", "architecture", "implementation", "title", "resolution"):
        assert entries[f"modelspec.{field}"]
    assert entries["modelspec.resolution"] == "1024x1024"


def test_the_settings_of_the_training_are_there_as_text():
    entries = described()
    expected = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_steps": "50", "ss_max_train_steps": "100"}
    assert {name: entries[name] for name in expected} == expected
    assert all(isinstance(value, str) for value in entries.values())


def test_titles_and_tags_in_any_script_are_readable():
    entries = described(title="星", captions=["zork, étoile"])
    assert "étoile" in entries["ss_tag_frequency"] and "星" in entries["ss_tag_frequency"]


# Writing


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "deep" / "star.safetensors"
    tensors = kohya_keys(WEIGHTS, LoraConfig(rank=4), torch.bfloat16)
    entries = described(title="星", captions=["zork, étoile"])
    write(path, tensors, entries)
    back = load_file(path)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == entries


def test_equal_training_gives_equal_bytes_because_nothing_says_when(tmp_path):
    tensors = kohya_keys(WEIGHTS, LoraConfig(rank=4), torch.float16)
    write(tmp_path / "one.safetensors", tensors, described())
    write(tmp_path / "two.safetensors", dict(reversed(tensors.items())), dict(reversed(described().items())))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6], ids=["NaN", "infinite", "infinite once halved"])
def test_a_value_that_is_not_finite_means_no_file(tmp_path, value):
    weights = {**WEIGHTS, f"{LAYER}.up": torch.full((4, 5), value)}
    with pytest.raises(ValueError, match="^'star.safetensors' was not written: 'lora_unet_.*' is not finite"):
        write(tmp_path / "star.safetensors", kohya_keys(weights, LoraConfig(rank=4), torch.float16), {})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.bin"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "caption",
    [
        "zork, a woman, looking left, on a street",
        "zork, The harbour, ships",
        "zork, ships, and gulls",
        "zork, ships, in the harbour of Bremen",
        "zork, ships, seen at night.",
    ],
)
def test_a_sentence_with_commas_leaves_no_fragment_behind(caption):
    assert tag_frequency([caption, "zork, ship, night"], {"zork": 2}) == {"zork": 2, "ship": 1, "night": 1}
