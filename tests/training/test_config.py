import math

import pytest

from lora_workbench.training.config import LoraConfig, TextConfig, TrainConfig


@pytest.mark.parametrize(
    ("config", "setting", "value"),
    [
        (LoraConfig, "rank", 0),
        (LoraConfig, "rank", 1025),
        (LoraConfig, "alpha", -1.0),
        (LoraConfig, "layers", "everything"),
        (TrainConfig, "steps", 0),
        (TrainConfig, "steps", 1_000_001),
        (TrainConfig, "learning_rate", 0.0),
        (TrainConfig, "learning_rate", 11.0),
        (TrainConfig, "learning_rate", math.nan),
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "accumulation", 0),
        (TrainConfig, "warmup", -1),
        (TrainConfig, "weight_decay", -0.1),
        (TrainConfig, "clip_norm", -1.0),
        (TrainConfig, "schedule", "polynomial"),
        (TrainConfig, "optimizer", "sgd"),
        (TrainConfig, "restarts", 0),
        (TrainConfig, "lora_plus", 0.0),
        (TrainConfig, "ema", 1.0),
    ],
)
def test_a_setting_out_of_range_is_one_sentence_naming_it_and_its_value(config, setting, value):
    with pytest.raises(ValueError) as error:
        config(**{setting: value})
    sentence = str(error.value)
    assert setting in sentence and str(value) in sentence
    assert sentence.endswith(".") and "\n" not in sentence and "must be" in sentence


def test_a_misspelt_setting_is_an_error_and_never_a_silent_default():
    with pytest.raises(TypeError, match="learnin_rate"):
        TrainConfig(learnin_rate=1.0)


def test_alpha_zero_means_the_same_as_rank():
    assert LoraConfig(rank=32).alpha_for(32) == LoraConfig(rank=32, alpha=32).alpha_for(32) == 32
    assert LoraConfig(rank=32).alpha_for(8) == 8, "and of another rank, that one"
    assert LoraConfig(rank=32, alpha=4).alpha_for(32) == 4


def test_a_rank_stabilized_alpha_gives_every_loader_alpha_over_the_root_of_the_rank():
    """Kalajdzievski 2023."""
    assert LoraConfig(rank=16, alpha=8, rank_stabilized=True).alpha_for(16) / 16 == 8 / 16**0.5


def test_more_steps_at_a_constant_rate_are_the_same_training_gone_further():
    assert TrainConfig(steps=100).identity() == TrainConfig(steps=900).identity()


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine"},
        {"schedule": "linear"},
        {"schedule": "cosine with restarts"},
        {"warmup": 0.1},
        {"text": TextConfig(encoder_rate=0.5, encoder_stop=0.5)},
    ],
    ids=str,
)
def test_more_steps_are_another_training_where_they_bend_the_learning_rate(settings):
    assert TrainConfig(steps=100, **settings).identity() != TrainConfig(steps=900, **settings).identity()


@pytest.mark.parametrize(
    "settings",
    [{"warmup": 10}, {"text": TextConfig(encoder_rate=0.5)}, {"text": TextConfig(encoder_stop=0.5)}],
    ids=str,
)
def test_more_steps_are_the_same_training_where_nothing_hangs_on_them(settings):
    assert TrainConfig(steps=100, **settings).identity() == TrainConfig(steps=900, **settings).identity()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"learning_rate": 2e-4}, {"accumulation": 2}, {"batch_size": 2}, {"warmup": 5}, {"clip_norm": 0.5}],
)
def test_whatever_changes_the_weights_is_another_training(change):
    assert TrainConfig().identity() != TrainConfig(**change).identity()
