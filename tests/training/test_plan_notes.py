"""A sentence for what is seldom meant, and none for what is usual."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_workbench.training import optimizer
from lora_workbench.training.batches import Batches
from lora_workbench.training.cache import Cached
from lora_workbench.training.config import LoraConfig, ObjectiveConfig, TextConfig, TrainConfig
from lora_workbench.training.dataset import REGULARIZATION, Dataset, Example
from lora_workbench.training.plan_notes import epoch_of, notes_on, notes_on_pictures
from lora_workbench.training.presets import ExpertSettings, plan


def pictures(*sizes, regularization=0, **changes):
    own = [Example(Path(f"{n}.png"), "a zork", *size) for n, size in enumerate(sizes)]
    others = [Example(Path(f"c{n}.png"), "a", 512, 512, role=REGULARIZATION) for n in range(regularization)]
    return Dataset(Path(), tuple(own + others), resolution=512, **changes)


def masked(fill_masked=False):
    dataset = pictures(SQUARE)
    example = replace(dataset.examples[0], mask=Path("0_mask.png"), fill_masked=fill_masked)
    return replace(dataset, examples=(example,))


SQUARE, WIDE, TALL = (512, 512), (1024, 256), (256, 1024)


@pytest.mark.parametrize(
    ("lora", "rate"),
    [({"alpha": 1.0}, "0.0016"), ({"rank_stabilized": True}, "2.5e-05"), ({"alpha": 4, "kind": "dora"}, "0.0004")],
    ids=str,
)
def test_a_scale_far_from_one_is_said_where_the_rate_is_derived(lora, rate):
    """A change of scale s at rate r / s moves as far in a step as one of scale 1 at rate r."""
    settings = ExpertSettings(**lora)
    (note,) = plan("character", 20, settings).notes
    assert f": {rate} would learn about as fast." in note
    assert plan("character", 20, settings, learning_rate=1e-4).notes == ()


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"alpha": 8},
        {"kind": "lokr", "alpha": 1.0, "lokr_factor": 8},
        {"kind": "lokr"},
    ],
    ids=str,
)
def test_a_usual_scale_or_one_that_alpha_does_not_make_needs_no_note(lora):
    assert plan("character", 20, ExpertSettings(**lora)).notes == ()


@pytest.mark.parametrize("ignored", [{"alpha": 1.0}, {"rank_stabilized": True}], ids=str)
def test_a_scale_that_a_lokr_does_not_take_is_said(ignored):
    (note,) = plan("character", 20, ExpertSettings(kind="lokr", **ignored)).notes
    assert note.startswith("alpha and rank_stabilized have no effect on a LoKr")


def test_the_alpha_of_an_oft_is_said_to_be_a_limit():
    """With a limit of 1 a tenth of the toy world's pictures showed the concept, without one nine tenths."""
    (note,) = plan("character", 20, ExpertSettings(kind="oft", alpha=1.0)).notes
    assert note == "alpha 1 limits how far an OFT may turn the model: 0 sets no limit."


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"timestep_shift": 2.0, "huber_c": 0.5}, "huber_c, timestep_shift"),
        ({"timestep_shift": 2.0, "timesteps": "shift"}, ""),
        ({"timestep_mean": 1.0, "timesteps": "resolution shift"}, "timestep_mean"),
        ({"restarts": 3}, "restarts"),
        ({"restarts": 3, "schedule": "cosine with restarts"}, ""),
        ({"text_encoder_stop": 0.5}, "text_encoder_stop"),
        ({"token_rate": 0.5}, "token_rate"),
        ({"class_words": "woman"}, "class_words"),
        ({"class_words": "woman", "new_tokens": 1}, ""),
        ({"class_words": "woman", "preservation": 1.0}, ""),
        ({"kind": "oft", "rank_stabilized": True}, "rank_stabilized"),
        ({"lokr_factor": 4}, "lokr_factor"),
    ],
    ids=str,
)
def test_what_is_set_and_changes_nothing_is_said(settings, told):
    notes = plan("character", 20, ExpertSettings(**settings)).notes
    assert notes == ((f"Without effect beside the other settings: {told}.",) if told else ())


def test_the_decay_that_older_workflows_hold_is_said_where_it_does_not_suit():
    (note,) = plan("character", 20, ExpertSettings(kind="oft", weight_decay=0.01)).notes
    assert "at weight_decay 0.01: -1 suits it." in note
    assert plan("character", 20, ExpertSettings(weight_decay=0.01)).notes == ()


def test_prodigy_finds_the_rate_whatever_the_scale(monkeypatch):
    monkeypatch.setattr(optimizer, "find_spec", lambda name: name)
    assert plan("character", 20, ExpertSettings(optimizer="prodigy", alpha=1.0)).notes == ()


def test_a_warm_up_as_long_as_the_training_and_text_encoders_stopped_at_once_are_said():
    assert notes_on(LoraConfig(), TrainConfig(steps=100, warmup=99)) == ()
    assert "all 100 steps" in notes_on(LoraConfig(), TrainConfig(steps=100, warmup=100))[0]
    stopped = TrainConfig(text=TextConfig(encoder_rate=0.5, encoder_stop=0.0))
    assert "are not trained" in notes_on(LoraConfig(), stopped)[0]


def test_that_regularization_pictures_take_turns_is_said():
    assert notes_on_pictures(pictures(*[SQUARE] * 5, regularization=5), TrainConfig()) == ()
    (note,) = notes_on_pictures(pictures(*[SQUARE] * 5, regularization=50), TrainConfig())
    assert note == "50 regularization pictures take turns: 5 in each round, as many as of the others."


@pytest.mark.parametrize("regularization", [0, 2, 9])
def test_an_epoch_is_counted_as_batches_make_it(regularization):
    """Pictures of three sizes, some of them for regularization, more than can be shown in one round."""
    dataset = pictures(SQUARE, SQUARE, WIDE, WIDE, TALL, regularization=regularization)
    cached = [Cached(example, dataset.sizes_of(example)[0], Path("l"), Path("t")) for example in dataset.examples]
    for batch_size in (1, 2, 4):
        shown, batches = epoch_of(dataset, batch_size)
        assert Batches(cached, batch_size, seed=0).steps_per_epoch == batches
        assert shown == 5 + min(regularization, 5), "of one size, so that nothing is rounded up"


def test_that_what_is_painted_outside_of_masks_is_learned_too_is_said():
    def told(floor, fill_masked=True):
        return notes_on_pictures(masked(fill_masked), TrainConfig(objective=ObjectiveConfig(mask_floor=floor)))

    (note,) = told(0.1)
    assert note.startswith("What fill_masked paints is learned too, at mask_floor 0.1:")
    assert told(0.0) == told(0.1, False) == ()


def test_that_preservation_outside_of_masks_finds_no_mask_is_said():
    kept = TrainConfig(objective=ObjectiveConfig(mask_preservation=1.0))
    (note,) = notes_on_pictures(pictures(SQUARE), kept)
    assert note.startswith("mask_preservation does nothing here")
    assert notes_on_pictures(masked(), kept) == notes_on_pictures(pictures(SQUARE), TrainConfig()) == ()


def test_batches_that_cannot_be_filled_are_said_with_how_often_a_picture_is_seen():
    config = TrainConfig(steps=100, batch_size=4, accumulation=2)
    assert notes_on_pictures(pictures(*[SQUARE] * 4), config) == ()
    (note,) = notes_on_pictures(pictures(SQUARE, SQUARE, WIDE), config)
    assert "hold 1.5 pictures on average instead of 4" in note and "100 steps show each 100 times" in note


def test_steps_that_do_not_show_all_pictures_are_said():
    assert notes_on_pictures(pictures(*[SQUARE] * 100), TrainConfig(steps=100)) == ()
    (note,) = notes_on_pictures(pictures(*[SQUARE] * 100), TrainConfig(steps=30))
    assert note.startswith("30 steps show 30% of the pictures")
