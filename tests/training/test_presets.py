"""What is derived from the purpose and the pictures, and that what the user says wins."""

from dataclasses import asdict

import pytest

from lora_workbench.training.config import LoraConfig, TrainConfig
from lora_workbench.training.families import FAMILIES, FLUX, SDXL
from lora_workbench.training.presets import LEARNING_RATES, PRESETS, ExpertSettings, plan, rounded


def planned(preset="character", family=SDXL, pictures=20, settings=None, **given):
    return plan(preset, family, pictures, settings or ExpertSettings(), **given)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
@pytest.mark.parametrize("pictures", [1, 12, 40, 2000])
def test_zero_everywhere_gives_a_plan_within_the_limits_of_its_purpose(preset, family, pictures):
    made = planned(preset, family, pictures)
    assert PRESETS[preset].fewest_steps <= made.train.steps <= PRESETS[preset].most_steps
    assert made.train.learning_rate == LEARNING_RATES[family.name]
    assert made.lora.rank == PRESETS[preset].rank and made.lora.scale == 1
    assert 7 <= made.train.steps / made.save_every <= 15


def test_more_pictures_get_more_steps():
    assert [planned(pictures=count).train.steps for count in (2, 8, 20, 30, 500)] == [800, 800, 2000, 3000, 3000]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "steps"), [(1, 1, 2000), (4, 1, 500), (2, 5, 200), (256, 64, 1)]
)
def test_a_step_that_sees_more_pictures_is_taken_less_often(batch_size, accumulation, steps):
    settings = ExpertSettings(batch_size=batch_size, accumulation=accumulation)
    assert planned(settings=settings).train.steps == steps


def test_regularization_pictures_take_steps_of_their_own():
    assert planned(regularization=20).train.steps == 2 * planned().train.steps
    assert planned(pictures=500, regularization=250).train.steps == 4500
    assert planned(steps=70, regularization=20).train.steps == 70


def test_what_the_user_says_wins():
    made = planned(steps=123, learning_rate=3e-4, rank=7, save_every=50, seed=9)
    assert (made.train.steps, made.train.learning_rate, made.train.seed) == (123, 3e-4, 9)
    assert (made.lora.rank, made.save_every) == (7, 50)


def test_steps_the_user_gave_are_not_divided_by_the_batch():
    assert planned(settings=ExpertSettings(batch_size=4), steps=100).train.steps == 100


def test_every_expert_setting_arrives():
    given = ExpertSettings(
        layers="attention",
        alpha=4.0,
        batch_size=2,
        accumulation=3,
        schedule="cosine",
        warmup=10,
        weight_decay=0.1,
        clip_norm=0.5,
    )
    made = planned(settings=given)
    arrived = asdict(made.train) | asdict(made.lora)
    wanted = {name: value for name, value in asdict(given).items() if name not in ("checkpointing", "save_precision")}
    assert wanted.items() <= arrived.items()


def test_the_defaults_are_those_of_the_configurations_they_become():
    given, defaults = ExpertSettings(), asdict(TrainConfig()) | asdict(LoraConfig())
    assert {name: getattr(given, name) for name in asdict(given).keys() & defaults.keys()}.items() <= defaults.items()


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 1), (0.4, 1), (1.4, 1), (1.6, 2), (3, 2), (4, 5), (12, 10), (40, 50), (80, 100), (120, 100), (300, 200)],
)
def test_checkpoints_fall_on_numbers_people_can_read(value, expected):
    assert rounded(value) == expected


def test_a_plan_says_itself_in_one_line():
    assert str(planned(steps=300, rank=8, settings=ExpertSettings(alpha=4, batch_size=2, accumulation=3))) == (
        "300 steps at learning rate 0.0001, rank 8, alpha 4, attention + feed-forward, batch 2 x 3, "
        "a checkpoint every 20 steps"
    )
    assert "alpha 16, attention + feed-forward, batch 1, a" in str(planned(family=FLUX))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"preset": "animal"}, "preset is 'animal', but must be one of 'character', 'object', 'style', 'concept'."),
        ({"steps": -1}, "steps is -1, but must be between 1 and 1000000."),
        ({"steps": 1_000_001}, "steps is 1000001, "),
        ({"learning_rate": 11.0}, "learning_rate is 11.0, "),
        ({"learning_rate": float("nan")}, "learning_rate is nan, "),
        ({"rank": 1025}, "rank is 1025, but must be between 1 and 1024."),
        ({"save_every": -5}, "save_every is -5, "),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(given, words):
    with pytest.raises(ValueError) as error:
        planned(**given)
    assert str(error.value).startswith(words) and str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("checkpointing", "yes"), ("save_precision", "fp8"), ("batch_size", 0), ("schedule", "linear"), ("layers", "all")],
)
def test_an_expert_setting_that_cannot_be_is_named(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} is .*, but must be "):
        planned(settings=ExpertSettings(**{setting: value}))
