"""What a LoRA file says about itself, to other tools and to us."""

import json

import pytest

from lora_workbench.training.config import LoraConfig, TrainConfig
from lora_workbench.training.description import description, tag_frequency
from lora_workbench.training.families import FLUX, SDXL


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
