"""D, H and what is made of them, from made-up losses."""

import math

import pytest

from lora_workbench.training.scores import (
    EFFORTS,
    Score,
    agree,
    comparable,
    differences,
    leak,
    mean_difference,
    percent_better,
    standard_error,
    without_words,
)
from lora_workbench.training.timesteps import VALIDATION_PLACES

BASE = [[0.1, 0.4, 2.0], [0.2, 0.8, 4.0]]


def scaled(*factors):
    return [[factor * level for level in levels] for factor, levels in zip(factors, BASE, strict=True)]


def test_the_difference_is_the_mean_over_levels_of_the_logarithm_of_the_ratio_to_the_base():
    values = [[0.1 * 2, 0.4 / 4, 2.0 * 16], [0.2, 0.8, 4.0]]
    assert differences(values, BASE) == [pytest.approx(math.log(8) / 3), 0.0]
    assert mean_difference(values, BASE) == pytest.approx(math.log(8) / 6)


def test_what_changes_nothing_is_exactly_as_good_as_the_base():
    assert differences(BASE, [list(levels) for levels in BASE]) == [0.0, 0.0]
    assert percent_better(BASE, BASE) == 0.0


@pytest.mark.parametrize(("factor", "percent"), [(0.88, 12.0), (1.1, -10.0), (0.5, 50.0)])
def test_percent_says_how_much_lower_the_losses_are(factor, percent):
    assert percent_better(scaled(factor, factor), BASE) == pytest.approx(percent)


def test_levels_and_pictures_count_alike_however_large_their_losses_are():
    hard = [[0.1, 0.4, 2000.0], [0.2, 0.8, 4.0]]
    assert percent_better([[0.1, 0.4, 1000.0], [0.2, 0.8, 2.0]], hard) == pytest.approx(
        percent_better([[0.05, 0.4, 2000.0], [0.1, 0.8, 4.0]], hard)
    )


def test_the_standard_error_is_of_the_paired_difference():
    assert standard_error([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]) == pytest.approx(0.0, abs=1e-12)
    assert standard_error([0.3, 0.1], [0.0, 0.0]) == pytest.approx(0.1)
    assert standard_error([0.3], [0.0]) == 0.02


@pytest.mark.parametrize("values", [None, [], [[0.1, 0.4, 2.0]], [[0.1, 0.4], [0.2, 0.8]], scaled(1, math.nan)])
def test_losses_of_other_pictures_or_levels_or_no_numbers_are_not_compared(values):
    assert not comparable(values, BASE) and not comparable(BASE, values) and not agree(values, BASE)


def test_two_measurements_of_one_model_agree_within_what_kernels_differ_by():
    assert agree(scaled(1.001, 0.999), BASE) and not agree(scaled(1.0, 1.01), BASE)


def test_the_efforts_cost_what_the_table_says():
    forwards = {name: 2 * effort.pictures * len(effort.levels) for name, effort in EFFORTS.items()}
    assert forwards == {"quick": 16, "standard": 32, "thorough": 96}
    assert EFFORTS["quick"].levels == EFFORTS["standard"].levels == VALIDATION_PLACES, "so the trainer's figures fit"


@pytest.mark.parametrize(("without", "expected"), [(0.8, 0.0), (1.0, 1.0), (0.8**0.5, 0.5)])
def test_the_leak_says_how_much_of_the_gain_needs_the_trigger_word(without, expected):
    scores = [Score(scaled(factor, factor)) for factor in (0.8, without)]
    assert leak(*scores, Score(BASE), Score(BASE)) == pytest.approx(expected)


def test_the_leak_compares_the_captions_without_the_word_with_a_base_that_was_told_the_same():
    told_less = Score(scaled(1.3, 1.2))
    file = Score([[0.8 * level for level in levels] for levels in told_less.held_out])
    assert leak(Score(scaled(0.8, 0.8)), file, Score(BASE), told_less) == pytest.approx(0.0)


def test_the_leak_is_of_training_pictures_where_none_were_held_out_and_of_no_gain_there_is_none():
    on_training = [Score(training=scaled(factor, factor)) for factor in (0.5, 0.5**0.5, 1, 1)]
    assert leak(on_training[0], on_training[1], *on_training[2:]) == pytest.approx(0.5)
    assert leak(Score(scaled(1.1, 1.1)), Score(BASE), Score(BASE), Score(BASE)) is None
    assert leak(Score(), Score(), Score(), Score()) is None


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("zork, a red circle", "a red circle"),
        ("a photo of Zork, standing", "a photo of, standing"),
        ("a zork star on blue", "a star on blue"),
        ("red, zork, blue", "red, blue"),
        ("zorkish things", "zorkish things"),
        ("zork", ""),
        ("big zork", ""),
    ],
)
def test_words_are_taken_out_whole_with_the_commas_they_leave_behind(caption, left):
    words = ("zork", "big zork") if caption == "big zork" else ("zork",)
    assert without_words(caption, words) == left


def test_a_caption_without_the_words_stays_as_it_is():
    assert without_words("a  photo ,  of (red:1.3) things", ()) == "a photo, of (red:1.3) things"
    assert without_words("a red circle on a blue background", ("zork", "")) == "a red circle on a blue background"
