"""What pictures drawn with a LoRA show: likeness, copies, variety, bleed, adherence, and the size of the change."""

import math
import time

import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from lora_workbench.training import signals
from lora_workbench.training.checkpoint import Checkpoint
from lora_workbench.training.scores import Score, Scored
from lora_workbench.training.signals import fingerprint


def rows(*vectors: list[float]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(vectors, dtype=torch.float32), dim=1)


def around(centre: int, spread: float, count: int = 8, seed: int = 0) -> Tensor:
    """Embeddings about an axis."""
    drawn = spread * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    drawn[:, centre] += 1
    return torch.nn.functional.normalize(drawn, dim=1)


def drawing(seed: int) -> Image.Image:
    """A picture of random rectangles."""
    random = torch.Generator().manual_seed(seed)
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    for left, top, width, height, grey in torch.randint(0, 48, (12, 5), generator=random).tolist():
        pen.rectangle((left, top, left + width, top + height), fill=(4 * grey, 5 * grey, 3 * grey))
    return picture


def test_likeness_is_the_mean_cosine_to_the_three_nearest():
    training = rows([1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1])
    assert signals.likeness(rows([1, 0]), training) == pytest.approx((1 + 0.8 + 0.6) / 3)
    assert signals.likeness(rows([1, 0], [0, 1]), training) == pytest.approx((1 + 0.8 + 0.6) / 3)
    assert signals.likeness(rows([1, 0]), training[:2]) == pytest.approx(0.9)


def test_own_likeness_leaves_each_picture_out():
    assert signals.own_likeness(rows([1, 0], [0.8, 0.6])) == pytest.approx(0.8)
    assert signals.own_likeness(rows([1, 0])) is None


def test_likeness_is_scaled_from_the_untrained_model_to_the_training_pictures_themselves():
    training, base = around(0, 0.1), around(1, 0.1)
    half = torch.nn.functional.normalize(training + base, dim=1)
    assert signals.scaled_likeness(base, base, training) == 0
    assert signals.scaled_likeness(around(0, 0.1, seed=7), base, training) == pytest.approx(1, abs=0.1)
    assert 0.5 < signals.scaled_likeness(half, base, training) < 0.9
    assert signals.scaled_likeness(base, training, training) is None, "the base draws them as well"
    assert signals.scaled_likeness(base, base, training[:1]) is None


def test_a_fingerprint_knows_its_picture_smaller_brighter_and_mirrored():
    one = fingerprint(drawing(1))
    changed = drawing(1).resize((40, 40)).point(lambda level: min(255, level + 12))
    assert one.bits_from(one) == (0, False)
    assert one.bits_from(fingerprint(changed))[0] <= signals.COPIED_BITS
    bits, mirrored = one.bits_from(fingerprint(ImageOps.mirror(drawing(1))))
    assert bits <= signals.COPIED_BITS and mirrored
    assert one.bits_from(fingerprint(drawing(2)))[0] > signals.COPIED_BITS


TRAINING = around(0, 0.3)
PRINTS = [fingerprint(drawing(seed)) for seed in range(8)]


def test_a_copy_is_both_near_and_of_the_same_hash():
    copied, alike, other = TRAINING[3], around(0, 0.01, 1)[0], around(1, 0.3, 1)[0]
    pictures = torch.stack([copied, copied, other])
    prints = [fingerprint(drawing(3).resize((50, 50))), fingerprint(drawing(99)), PRINTS[3]]
    found = signals.near_copies(pictures, prints, TRAINING, PRINTS)
    assert [(copy.picture, copy.training, copy.mirrored) for copy in found] == [(0, 3, False)]
    assert signals.near_copies(alike[None], [fingerprint(drawing(99))], TRAINING, PRINTS) == []


def test_a_mirrored_copy_is_found_too():
    mirrored = fingerprint(ImageOps.mirror(drawing(5)))
    (copy,) = signals.near_copies(TRAINING[5:6], [mirrored], TRAINING, PRINTS)
    assert (copy.training, copy.mirrored) == (5, True)
    assert "cat.png (mirrored, " in signals.copy_note([copy], ["dog.png"] * 5 + ["cat.png"])


def test_duplicates_among_the_training_pictures_do_not_hide_a_copy():
    twice, prints = torch.cat([TRAINING, TRAINING]), PRINTS + PRINTS
    assert len(signals.near_copies(TRAINING[3:4], [PRINTS[3]], twice, prints)) == 1


def test_among_thousands_of_training_pictures_a_copy_is_found_at_once():
    training, prints = around(0, 0.3, 4000), [PRINTS[number % 8] for number in range(4000)]
    started = time.process_time()
    (copy,) = signals.near_copies(training[1003:1004], [PRINTS[3]], training, prints)
    assert copy.training == 1003
    assert time.process_time() - started < 6  # pair by pair it takes a quarter of a minute


def test_without_two_different_training_pictures_nothing_can_be_called_a_copy():
    assert signals.near_copies(TRAINING[:1], PRINTS[:1], TRAINING[:1], PRINTS[:1]) == []
    assert signals.near_copies(TRAINING[:1], PRINTS[:1], TRAINING[[0, 0]], [PRINTS[0]] * 2) == []
    assert signals.copy_note([], []) == ""


def test_variety_is_relative_to_the_base():
    base = [around(0, 0.5, 4, seed) for seed in (1, 2)]
    assert signals.variety(base, base) == 1
    narrow = signals.variety([around(0, 0.1, 4, seed) for seed in (1, 2)], base)
    assert narrow < signals.LEAST_VARIETY and "less variety" in signals.variety_note(narrow)
    assert signals.variety_note(1.0) == signals.variety_note(None) == ""


def test_one_seed_a_prompt_says_nothing_about_variety():
    assert signals.variety([TRAINING[:1]], [TRAINING[:1]]) is None
    assert signals.variety([TRAINING[:2]], [TRAINING[[0, 0]]]) is None, "the base draws the same twice"


def test_bleed_is_the_change_in_units_of_another_seed():
    base, other_seed = around(0, 0.3, seed=1), around(0, 0.3, seed=2)
    assert signals.bleed(base, base, other_seed) == pytest.approx(0, abs=1e-6)
    assert signals.bleed(other_seed, base, other_seed) == pytest.approx(1)
    assert signals.bleed(around(1, 0.3), base, other_seed) > 1
    assert signals.bleed(base, base, base) is None
    assert "spills over" in signals.bleed_note(0.7)
    assert signals.bleed_note(0.3) == signals.bleed_note(None) == ""


def test_adherence_is_judged_only_where_pictures_match_their_own_captions():
    captions = around(0, 0.5, seed=1)
    matching = torch.nn.functional.normalize(captions + 0.3 * around(1, 0.5, seed=2), dim=1)
    assert signals.can_judge_adherence(matching, captions)
    assert signals.adherence(matching, captions) > signals.adherence(matching, captions.roll(1, 0))
    assert not signals.can_judge_adherence(around(1, 0.01), captions), "an encoder of another space"
    assert not signals.can_judge_adherence(matching, captions[:1].expand(8, -1)), "the same caption everywhere"
    assert not signals.can_judge_adherence(matching[:1], captions[:1]), "one picture"


def grown(*effects: float, every: int = 100) -> list[Scored]:
    entries = enumerate(effects, start=1)
    return [Scored(Checkpoint(every * number, "", f"{number}"), Score(effect=effect)) for number, effect in entries]


@pytest.mark.parametrize("effects", [[1, 2, 3, 4, 5], [1, 1.4, 1.7, 2, 2.2], [3], [], [1, 1.9, 4.2, 5], [1, 2.5]])
def test_weights_that_grow_as_they_do_are_no_news(effects):
    assert signals.weight_notes(grown(*effects)) == []


def test_a_file_that_changes_nothing_is_named():
    (note,) = signals.weight_notes(grown(0, 1, 1.5, 2))
    assert note == "Step 100 changes no weight at all: it has learned nothing."


def test_a_jump_up_and_a_fall_are_named_with_the_file_before():
    (note,) = signals.weight_notes(grown(1, 1.2, 1.4, 9, 9.2))
    assert note.startswith("Step 400 changes the weights 6.4 times as much as step 300: the training became unstable")
    (note,) = signals.weight_notes(grown(5, 6, 1, 1.5))
    assert note.startswith("Step 300 changes the weights only 17 % as much as step 200")


def test_averages_and_unmeasured_files_do_not_count_as_jumps():
    entries = grown(1, 1.5, 2)
    average = Scored(Checkpoint(300, "", "a", average="EMA"), Score(effect=0.1))
    broken = [Scored(Checkpoint(400, "", "b"), Score(effect=effect, broken="damaged")) for effect in (None, math.inf)]
    assert signals.weight_notes([*entries, average, *broken]) == []


def asked(*changes: float, held_out: int = 0) -> Score:
    """Losses that lie as far above those of `asked(0, 0, ...)`, as ln."""
    losses = [[0.1 * math.exp(change), 0.3 * math.exp(change)] for change in changes]
    return Score(losses[:held_out], losses[held_out:])


NAMES = [f"{letter}.png" for letter in "abcdef"]


def test_a_caption_that_misleads_the_untrained_model_is_named():
    blank = asked(*[0.0] * 6, held_out=2)
    told = asked(-0.3, -0.2, -0.05, 0.9, 0.01, -0.1, held_out=2)
    (note,) = signals.caption_notes(told, blank, NAMES)
    assert note.startswith("The caption of d.png tells the untrained model less than no caption would")


def test_right_captions_are_left_alone():
    """What the toy FLUX gave for eight of them: some help much, most little, and one seems to harm."""
    told = asked(-0.28, -0.18, -0.05, -0.01, 0.05, -0.02, -0.01, -0.02)
    assert signals.caption_notes(told, asked(*[0.0] * 8), list("abcdefgh")) == []


def test_small_effects_of_captions_need_small_deviations_only():
    blank = asked(*[0.0] * 6)
    told = asked(-0.012, -0.008, -0.011, 0.03, -0.009, -0.01)
    assert [note.split()[3] for note in signals.caption_notes(told, blank, NAMES)] == ["d.png"]
    assert signals.caption_notes(asked(*[0.01] * 6), blank, NAMES) == []


def test_captions_that_mostly_mislead_are_told_in_one_sentence():
    (note,) = signals.caption_notes(asked(0.9, 0.7, 1.2, 1.0, 1.6, -0.02), asked(*[0.0] * 6), NAMES)
    assert "without most of the captions" in note


def test_few_captions_and_losses_that_do_not_fit_say_nothing():
    assert signals.caption_notes(asked(0, 0, 0.9), asked(0, 0, 0), NAMES[:3]) == []
    assert signals.caption_notes(asked(*[0.9] * 6), Score(), NAMES) == []
    assert signals.caption_notes(asked(*[0.9] * 6), asked(*[0.0] * 5), NAMES) == []
