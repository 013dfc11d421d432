"""What a LoRA file says about itself, to other tools and to us."""

import base64
import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_workbench.training.config import OPTIMIZERS, LoraConfig, ObjectiveConfig, TextConfig, TrainConfig
from lora_workbench.training.description import (
    OURS,
    STRENGTH,
    VERSION,
    add_cover,
    amend,
    description,
    read,
    recommended,
    settings_of,
    tag_frequency,
)
from lora_workbench.training.families import FLUX, SDXL
from lora_workbench.training.lora_file import write


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
    return description(**{**facts, **changes})


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


# The words of other trainers


@pytest.mark.parametrize(
    ("lora", "family", "module", "arguments"),
    [
        (LoraConfig(), SDXL, "networks.lora", {}),
        (LoraConfig(), FLUX, "networks.lora_flux", {}),
        (LoraConfig(conv_rank=4, alpha=2), SDXL, "networks.lora", {"conv_dim": "4", "conv_alpha": "2.0"}),
        (LoraConfig(kind="dora"), SDXL, "lycoris.kohya", {"algo": "lora", "dora_wd": "True"}),
        (LoraConfig(kind="loha"), SDXL, "lycoris.kohya", {"algo": "loha"}),
        (LoraConfig(kind="lokr"), FLUX, "lycoris.kohya", {"algo": "lokr", "full_matrix": "True"}),
        (LoraConfig(kind="lokr", lokr_factor=8), FLUX, "lycoris.kohya", {"algo": "lokr", "factor": "8"}),
        (LoraConfig(kind="oft"), SDXL, "lycoris.kohya", {"algo": "diag-oft"}),
    ],
)
def test_each_kind_is_called_what_kohya_and_lycoris_call_it(lora, family, module, arguments):
    entries = described(lora=lora, family=family)
    assert entries["ss_network_module"] == module
    assert json.loads(entries["ss_network_args"]) == {"layers": lora.layers, **arguments}


def test_a_rank_stabilized_lora_says_the_alpha_that_loaders_must_use():
    """Trap 19: alpha' / rank = alpha / sqrt(rank)."""
    entries = described(lora=LoraConfig(rank=16, alpha=8, rank_stabilized=True))
    assert float(entries["ss_network_alpha"]) / 16 == pytest.approx(8 / 16**0.5)


def test_an_oft_says_the_alpha_of_its_file_which_is_a_limit_and_no_multiple_of_the_rank():
    assert described(lora=LoraConfig(rank=16, kind="oft"))["ss_network_alpha"] == "0.0"
    assert described(lora=LoraConfig(rank=16, kind="oft", alpha=2))["ss_network_alpha"] == "2.0"


OBJECTIVES = {
    "ss_loss_type": ({"loss": "smooth l1"}, "smooth_l1"),
    "ss_huber_c": ({"loss": "huber", "huber_c": 0.2}, "0.2"),
    "ss_huber_schedule": ({"loss": "huber"}, "snr"),
    "ss_min_snr_gamma": ({"min_snr_gamma": 5.0}, "5.0"),
    "ss_debiased_estimation": ({"debiased": True}, "True"),
    "ss_noise_offset": ({"noise_offset": 0.05}, "0.05"),
    "ss_multires_noise_iterations": ({"multires_iterations": 6}, "6"),
    "ss_multires_noise_discount": ({"multires_iterations": 6, "multires_discount": 0.4}, "0.4"),
    "ss_ip_noise_gamma": ({"input_perturbation": 0.1}, "0.1"),
    "modelspec.timestep_range": ({"timestep_low": 0.1, "timestep_high": 0.75}, "100,750"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_differs_from_a_plain_objective_is_said_and_what_does_not_is_not(name):
    settings, value = OBJECTIVES[name]
    assert described(config=TrainConfig(objective=ObjectiveConfig(**settings)))[name] == value
    assert described().get(name) in (None, "l2")


def test_flux_says_how_its_noise_levels_are_drawn():
    objective = ObjectiveConfig(timesteps="shift", timestep_shift=2.5)
    entries = described(family=FLUX, prediction="flow", config=TrainConfig(objective=objective))
    expected = {
        "ss_timestep_sampling": "shift",
        "ss_discrete_flow_shift": "2.5",
        "ss_guidance_scale": "1.0",
        "ss_model_prediction_type": "raw",
    }
    assert expected.items() <= entries.items()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_is_called_by_its_class(optimizer):
    entries = described(config=TrainConfig(optimizer=optimizer, weight_decay=0.1))
    name, rest = entries["ss_optimizer"].split("(")
    assert rest == "weight_decay=0.1)" and name.count(".") >= 1 and name.rsplit(".", 1)[1][0].isupper()


def test_the_rate_of_the_text_encoders_is_that_of_the_rest_times_its_factor():
    entries = described(config=TrainConfig(learning_rate=2e-4, text=TextConfig(encoder_rate=0.5)))
    assert float(entries["ss_text_encoder_lr"]) == 1e-4
    assert "ss_text_encoder_lr" not in described()


def test_a_warm_up_given_as_a_fraction_is_said_in_steps():
    assert described(config=TrainConfig(steps=200, warmup=0.1))["ss_lr_warmup_steps"] == "20"


# Our own words


def test_all_settings_come_back_from_the_file():
    lora, config = LoraConfig(rank=8, kind="lokr"), TrainConfig(steps=7, objective=ObjectiveConfig(noise_offset=0.1))
    settings = settings_of(described(lora=lora, config=config, settings={"save_every": 3}))
    assert LoraConfig(**settings["lora"]) == lora and settings["save_every"] == 3
    train = settings["train"]
    objective, text = ObjectiveConfig(**train.pop("objective")), TextConfig(**train.pop("text"))
    assert TrainConfig(**train, objective=objective, text=text) == config


def test_the_file_names_what_it_was_made_of_and_with():
    entries = described(dataset="abc", base_model="def", average="EMA", workflow={"1": {}}, node="1")
    told = {name.removeprefix(OURS): value for name, value in entries.items() if name.startswith(OURS)}
    told.pop("settings")
    assert told == {
        "step": "50",
        "dataset": "abc",
        "base_model": "def",
        "average": "EMA",
        "workflow": '{"1": {}}',
        "node": "1",
        "version": VERSION,
    }
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text("utf-8")
    assert re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1] == VERSION


def test_settings_of_a_file_that_is_not_ours_are_none():
    assert settings_of({}) == settings_of({f"{OURS}settings": "[]"}) == settings_of({f"{OURS}settings": "{"}) == {}


# The cover


@pytest.fixture
def lora_file(tmp_path) -> Path:
    path = tmp_path / "star.safetensors"
    write(path, {"a": torch.arange(6.0)}, described())
    return path


def test_the_cover_is_where_comfyui_and_the_model_spec_look_for_it(lora_file):
    before = read(lora_file)
    assert add_cover(lora_file, Image.new("RGB", (1024, 512), "magenta"))
    entries = read(lora_file)
    (cover,) = json.loads(entries["ssmd_cover_images"])
    picture = Image.open(io.BytesIO(base64.b64decode(cover)))
    assert picture.size == (384, 192) and picture.getpixel((9, 9))[0] > 240
    assert entries["modelspec.thumbnail"] == f"data:image/jpeg;base64,{cover}"
    assert before.items() <= entries.items()
    assert torch.equal(load_file(lora_file)["a"], torch.arange(6.0))


def test_a_cover_is_put_in_once_so_that_other_prompts_later_change_no_file(lora_file):
    add_cover(lora_file, Image.new("RGB", (64, 64), "magenta"))
    before = lora_file.read_bytes()
    assert not add_cover(lora_file, Image.new("RGB", (64, 64), "green"))
    assert lora_file.read_bytes() == before


def test_the_same_picture_gives_the_same_file(lora_file, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(lora_file.read_bytes())
    for path in (lora_file, other):
        add_cover(path, Image.effect_mandelbrot((300, 300), (-2, -1, 1, 1), 50))
    assert lora_file.read_bytes() == other.read_bytes()


def test_what_is_known_later_can_be_said_later(lora_file):
    os.utime(lora_file, ns=(10**18, 10**18))
    amend(lora_file, strength="0.85")
    assert read(lora_file)[f"{OURS}strength"] == "0.85" and lora_file.stat().st_mtime_ns == 10**18
    assert torch.equal(load_file(lora_file)["a"], torch.arange(6.0))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "half.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0torn")
    with pytest.raises(ValueError, match="^The LoRA file 'half.safetensors' cannot be read"):
        read(path)


@pytest.mark.parametrize(
    "said, strength",
    [("0.85", 0.85), ("2", 2.0), *((odd, None) for odd in ("", "strong", "nan", "inf", "1e9", "1e300", "-3", "0"))],
)
def test_the_recommended_strength_is_a_number_in_the_file_or_none(said, strength):
    assert recommended({STRENGTH: said}) == strength
    assert recommended({}) is None
