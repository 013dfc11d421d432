"""What is derived from the purpose and the pictures, and that what the user says wins."""

from dataclasses import asdict

import pytest

from lora_workbench.training import optimizer
from lora_workbench.training.config import KINDS, OPTIMIZERS, LoraConfig, ObjectiveConfig, TextConfig, TrainConfig
from lora_workbench.training.presets import LEARNING_RATE, PRESETS, ExpertSettings, fitted, plan, rounded


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """Every optimizer can be planned, whatever is installed."""
    monkeypatch.setattr(optimizer, "find_spec", lambda name: name)


def planned(preset="character", pictures=20, settings=None, **given):
    return plan(preset, pictures, settings or ExpertSettings(), **given)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("pictures", [1, 12, 40, 2000])
def test_zero_everywhere_gives_a_plan_within_the_limits_of_its_purpose(preset, pictures):
    made = planned(preset, pictures)
    assert PRESETS[preset].fewest_steps <= made.train.steps <= PRESETS[preset].most_steps
    assert made.train.learning_rate == LEARNING_RATE
    assert made.lora.rank == PRESETS[preset].rank and made.lora.alpha_for(made.lora.rank) == made.lora.rank
    assert 7 <= made.train.steps / made.save_every <= 15


def test_more_pictures_get_more_steps():
    assert [planned(pictures=count).train.steps for count in (2, 8, 20, 30, 500)] == [800, 800, 2000, 3000, 3000]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "steps"), [(1, 1, 2000), (4, 1, 500), (2, 4, 250), (16, 1, 200), (256, 64, 200)]
)
def test_a_step_that_sees_more_pictures_is_taken_less_often(batch_size, accumulation, steps):
    settings = ExpertSettings(batch_size=batch_size, accumulation=accumulation)
    assert planned(settings=settings).train.steps == steps


def test_steps_and_rate_go_by_what_batches_hold_and_not_by_their_size():
    settings = ExpertSettings(batch_size=8)
    full, short = planned(settings=settings).train, planned(settings=settings, fill=2.0).train
    assert (short.steps, short.learning_rate) == (1000, 1.4e-4) and (full.steps, full.learning_rate) == (250, 2.8e-4)


def test_steps_and_rate_stop_at_the_same_size_of_a_step():
    """At 4 x 8 pictures a step 46 steps were derived once, at a rate for 16: nothing was learned."""
    many, more = (planned(pictures=200, settings=ExpertSettings(batch_size=size)).train for size in (16, 64))
    assert (many.steps, many.learning_rate) == (more.steps, more.learning_rate) == (200, 4e-4)


def test_regularization_pictures_take_steps_of_their_own():
    assert planned(regularization=20).train.steps == 2 * planned().train.steps
    assert planned(pictures=500, regularization=250).train.steps == 4500
    assert planned(steps=70, regularization=20).train.steps == 70
    assert (
        planned(pictures=1, regularization=20_000).train.steps == 1_000_000
    )  # and not an error about steps nobody chose


def test_what_the_user_says_wins():
    made = planned(steps=123, learning_rate=3e-4, rank=7, save_every=50, seed=9)
    assert (made.train.steps, made.train.learning_rate, made.train.seed) == (123, 3e-4, 9)
    assert (made.lora.rank, made.save_every) == (7, 50)


def test_steps_the_user_gave_are_not_divided_by_the_batch():
    assert planned(settings=ExpertSettings(batch_size=4), steps=100).train.steps == 100


OTHER = {
    "layers": "attention",
    "schedule": "cosine with restarts",
    "checkpointing": "on",
    "save_precision": "bf16",
    "kind": "loha",
    "optimizer": "lion",
    "timesteps": "shift",
    "loss": "huber",
    "huber_schedule": "constant",
    "text_encoder_stop": 0.5,
    "dropout": 0.1,
    "ema": 0.9,
    "timestep_high": 0.9,
    "input_perturbation": 0.1,
    "noise_offset": 0.05,
    "multires_discount": 0.5,
    "mask_floor": 0.2,
    "timestep_low": 0.1,
    "offload": 0.5,
    "weight_decay": 0.1,
}
"""A value for each setting that is neither a number that can be one larger nor a line of text."""
RENAMED = {"text_encoder_rate": "encoder_rate", "text_encoder_stop": "encoder_stop"}
READ_BY_NAME = {"checkpointing", "save_precision", "offload"}
"""What is no part of the plan: the job reads it from the settings."""


def different(name):
    """A valid value of a setting that is not its default."""
    default = getattr(ExpertSettings(), name)
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool):
        return not default
    return "some = 3" if isinstance(default, str) else default + 1


def everything(made):
    """All values of a plan by name."""
    plain = {name: value for name, value in vars(made).items() if name not in ("lora", "train")}
    train = vars(made.train)
    return plain | vars(made.lora) | train | vars(train["objective"]) | vars(train["text"])


@pytest.mark.parametrize("name", [name for name in asdict(ExpertSettings()) if name not in READ_BY_NAME])
def test_every_expert_setting_arrives(name):
    value = different(name)
    assert value != getattr(ExpertSettings(), name)
    made = planned(settings=ExpertSettings(**{name: value}), save_every=1)
    assert everything(made)[RENAMED.get(name, name)] == value


def test_the_defaults_are_those_of_the_configurations_they_become():
    given = asdict(ExpertSettings())
    for config in (TrainConfig, LoraConfig, ObjectiveConfig, TextConfig):
        for name, value in asdict(config()).items():
            name = next((ours for ours, theirs in RENAMED.items() if theirs == name), name)
            assert name == "weight_decay" or given.get(name, value) == value, name


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 1), (0.4, 1), (1.4, 1), (1.6, 2), (3, 2), (4, 5), (12, 10), (40, 50), (80, 100), (120, 100), (300, 200)],
)
def test_checkpoints_fall_on_numbers_people_can_read(value, expected):
    assert rounded(value) == expected


def test_a_plan_says_all_that_was_derived_in_short_lines():
    assert str(planned(steps=300, rank=8, settings=ExpertSettings(alpha=4, batch_size=2, accumulation=3))) == (
        "300 steps at learning rate 0.00024, rank 8, alpha 4, attention + feed-forward, batch 2 x 3, "
        "a checkpoint every 20 steps\n"
        "lora, adamw, constant, noise levels automatic, loss l2, previews every 20 steps, no average"
    )
    assert "alpha 16, attention + feed-forward, batch 1, a" in str(planned())
    told = str(
        planned(
            "style",
            steps=400,
            settings=ExpertSettings(
                schedule="cosine with restarts",
                restarts=3,
                warmup=0.05,
                ema=0.99,
                text_encoder_rate=0.5,
                text_encoder_stop=0.25,
                new_tokens=2,
                validate_every=7,
            ),
        )
    ).splitlines()
    assert told[1] == (
        "lora, adamw, cosine with restarts x 3 after 20 steps of warm-up, noise levels automatic, loss l2, "
        "previews every 50 steps, validation every 7, averaged with decay 0.99"
    )
    assert told[2] == "text encoders at 0.5 times the learning rate for the first 25%, 2 new tokens at 1 times"
    assert all(len(line) < 200 for line in told)


def test_noise_levels_are_those_of_the_family_unless_somebody_says_otherwise():
    """More of low noise for styles was tried, and learned half as surely (docs/benchmarks.md)."""
    assert {planned(preset).train.objective.timesteps for preset in PRESETS} == {"automatic"}
    assert planned("style", settings=ExpertSettings(timesteps="style")).train.objective.timesteps == "style"


# Learning rates


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("adamw", 1e-4),
        ("adamw 8-bit", 1e-4),
        ("adafactor", 1e-4),
        ("prodigy", 1.0),
        ("lion", 3.3e-5),
        ("schedule-free", 2e-4),
    ],
)
def test_each_optimizer_gets_the_learning_rate_it_needs_and_a_given_one_wins(name, rate):
    settings = ExpertSettings(optimizer=name)
    assert planned(settings=settings).train.learning_rate == rate
    assert planned(settings=settings, learning_rate=0.002).train.learning_rate == 0.002


def test_a_step_over_more_pictures_is_larger_by_the_square_root_and_prodigys_is_not():
    def rate(batch_size, name="adamw"):
        return planned(settings=ExpertSettings(batch_size=batch_size, optimizer=name)).train.learning_rate

    assert [rate(size) for size in (1, 4, 9, 16, 100)] == [1e-4, 2e-4, 3e-4, 4e-4, 4e-4]
    assert rate(16, "prodigy") == 1.0


@pytest.mark.parametrize(
    ("settings", "rate", "words"),
    [
        ({"optimizer": "prodigy"}, 1e-4, "1 is usual"),
        ({"optimizer": "adamw"}, 1.0, "for Prodigy"),
        ({"optimizer": "schedule-free", "ema": 0.9}, 0, "averages its averages"),
    ],
)
def test_a_combination_that_is_seldom_meant_is_said_in_the_plan(settings, rate, words):
    made = planned(settings=ExpertSettings(**settings), learning_rate=rate)
    assert len(made.notes) == 1 and words in str(made).splitlines()[-1]
    assert made.notes[0].endswith(".")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_derived_needs_no_note(name):
    assert planned(settings=ExpertSettings(optimizer=name)).notes == ()


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"optimizer": "schedule-free", "schedule": "cosine"}, "schedule is 'cosine', but optimizer 'schedule-free' "),
        ({"optimizer": "prodigy", "lora_plus": 16.0}, "lora_plus is '16.0', but optimizer 'prodigy' "),
        ({"optimizer": "prodigy", "rates": "a = 2"}, "rates is 'a = 2', but optimizer 'prodigy' "),
        ({"optimizer": "prodigy", "text_encoder_rate": 0.5}, "text_encoder_rate is 0.5, but optimizer 'prodigy' "),
        ({"optimizer": "prodigy", "new_tokens": 1, "token_rate": 2.0}, "token_rate is 2, but optimizer 'prodigy' "),
        ({"optimizer": "schedule-free", "max_norm": 1.0}, "max_norm is 1, but optimizer 'schedule-free' trains at "),
    ],
)
def test_a_combination_that_cannot_be_is_one_sentence(settings, start):
    with pytest.raises(ValueError) as error:
        planned(settings=ExpertSettings(**settings))
    assert str(error.value).startswith(start) and str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_missing_package_is_named_before_anything_is_encoded(monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'python -m pip install prodigyopt'"):
        planned(settings=ExpertSettings(optimizer="prodigy"))


# The time box


@pytest.mark.parametrize("minutes", [1.0, 3.0, 20.0, 59.0, 90.0, 10_000.0])
@pytest.mark.parametrize(("step", "save"), [(1.0, 0.0), (2.0, 30.0), (0.1, 40.0), (15.0, 5.0)])
def test_a_time_box_is_filled_and_never_overrun(minutes, step, save):
    whole = planned(settings=ExpertSettings(warmup=100, schedule="cosine"))
    if step + save > 60 * minutes:
        pytest.skip("covered by the test of the sentence")
    made = fitted(whole, minutes, step, save)
    taken = made.train.steps * step + -(-made.train.steps // made.save_every) * save
    assert taken <= 60 * minutes + 1e-6
    assert made.train.steps == whole.train.steps or taken > 60 * minutes - step - save
    assert made.train.steps <= whole.train.steps


@pytest.mark.parametrize("minutes", [1.0, 3.0, 20.0, 90.0])
@pytest.mark.parametrize("every", [0, 7, 150, 800])
@pytest.mark.parametrize("validation", [0.3, 5.0, 70.0])
def test_a_time_box_counts_the_validations_between_checkpoints(minutes, every, validation):
    whole = planned(settings=ExpertSettings(validate_every=every))
    save = 2.0 + validation
    if save + 0.5 > 60 * minutes:
        pytest.skip("covered by the test of the sentence")
    made = fitted(whole, minutes, 0.5, save, seconds_per_validation=validation)
    steps = range(1, made.train.steps + 1)
    saved = {step for step in steps if step % made.save_every == 0 or step == made.train.steps}
    asked = {step for step in steps if step % made.validate_every == 0} - saved
    assert len(steps) * 0.5 + len(saved) * save + len(asked) * validation <= 60 * minutes
    assert every or made.validate_every == made.save_every


def test_time_that_passes_in_any_case_is_not_given_to_steps():
    assert fitted(planned(), 20, 2.0, 0.0, seconds_once=200.0).train.steps == 500
    with pytest.raises(ValueError, match="one step and one checkpoint take 5.0 minutes"):
        fitted(planned(), 4, 60.0, 30.0, seconds_once=210.0)


def test_a_time_box_fits_schedule_and_intervals_in_proportion():
    settings = ExpertSettings(warmup=100, schedule="cosine", preview_every=400, validate_every=100)
    whole = planned(settings=settings)
    made = fitted(whole, 20, 2.0, 0.0)
    assert (whole.train.steps, made.train.steps) == (2000, 600)
    assert (made.train.warmup, made.save_every, made.preview_every, made.validate_every) == (30, 60, 120, 30)
    assert made.notes == ("600 of 2000 steps fit into 20 minutes.",)
    assert fitted(planned(settings=ExpertSettings(warmup=0.1)), 20, 2.0, 0.0).train.warmup == 0.1


def test_checkpoints_take_a_quarter_of_a_time_box_at_most():
    made = fitted(planned(), 10, 0.1, 60.0)
    assert -(-made.train.steps // made.save_every) == 2


def test_a_time_box_that_is_long_enough_changes_nothing():
    assert fitted(planned(), 1000, 1.0, 10.0) == planned()


def test_a_time_box_too_short_for_anything_is_one_sentence():
    with pytest.raises(ValueError, match=r"^stop_after is 1 minutes, but one step and one checkpoint take 1.5 minutes"):
        fitted(planned(), 1, 60, 30)


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
    [
        ("checkpointing", "yes"),
        ("save_precision", "fp8"),
        ("batch_size", 0),
        ("schedule", "fast"),
        ("optimizer", "sgd"),
        ("offload", 2.0),
        ("kind", "x"),
        ("layers", "all"),
    ],
)
def test_an_expert_setting_that_cannot_be_is_named(setting, value):
    with pytest.raises(ValueError, match=f"^{setting} is .*, but must be "):
        planned(settings=ExpertSettings(**{setting: value}))


def test_weight_decay_is_the_usual_one_but_for_oft_unless_it_is_given():
    decays = {kind: planned(settings=ExpertSettings(kind=kind)).train.weight_decay for kind in KINDS}
    assert decays.pop("oft") == 4.0
    assert set(decays.values()) == {TrainConfig().weight_decay} == {0.01}
    for kind in KINDS:
        assert planned(settings=ExpertSettings(kind=kind, weight_decay=0.0)).train.weight_decay == 0.0
    assert planned(settings=ExpertSettings(kind="oft", weight_decay=-0.999)).train.weight_decay == 4.0  # one click on +


def test_the_plan_says_an_unusual_weight_decay():
    assert "oft, adamw with weight decay 4, constant" in str(planned(settings=ExpertSettings(kind="oft")))
    assert "decay" not in str(planned(settings=ExpertSettings()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "rank 16, alpha 16, attention"),
        ({"kind": "oft"}, "rank 16, attention"),
        ({"kind": "oft", "alpha": 0.5}, "rank 16, alpha 0.5, attention"),
        ({"kind": "lokr", "alpha": 8.0}, "rank 16, attention"),
        ({"kind": "lokr", "lokr_factor": 8}, "rank 16, lokr_factor 8, attention"),
        ({"kind": "lokr", "lokr_factor": 8, "alpha": 4.0}, "rank 16, lokr_factor 8, alpha 4, attention"),
    ],
    ids=str,
)
def test_the_plan_says_alpha_only_where_the_kind_has_one(settings, said):
    assert said in str(planned(settings=ExpertSettings(**settings)))


def test_oft_is_given_twice_the_steps_where_they_are_derived():
    steps = {kind: planned(settings=ExpertSettings(kind=kind)).train.steps for kind in KINDS}
    assert steps.pop("oft") == 2 * steps["lora"]
    assert len(set(steps.values())) == 1
    assert planned(settings=ExpertSettings(kind="oft"), steps=100).train.steps == 100


@pytest.mark.parametrize(("weight", "factor"), [(0.0, 1), (0.5, 1.25), (1.0, 1.5), (3.0, 1.5)])
def test_preservation_is_given_the_steps_it_takes_back_where_they_are_derived(weight, factor):
    settings = ExpertSettings(preservation=weight)
    assert planned(settings=settings).train.steps == factor * planned().train.steps
    assert planned(settings=settings, steps=100).train.steps == 100


def test_a_kind_whose_change_grows_slowly_is_given_a_higher_rate():
    rates = {kind: plan("character", 20, ExpertSettings(kind=kind)).train.learning_rate for kind in KINDS}
    assert rates.pop("loha") == 2e-4
    assert set(rates.values()) == {1e-4}
