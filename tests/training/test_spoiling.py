"""A training that makes the network far worse is told from one that only goes up and down."""

import math

from lora_workbench.training.spoiling import spoilt

BEFORE = [[0.1, 0.03, 0.01, 0.003], [0.2, 0.05, 0.02, 0.004]]


def times(factor):
    return [[factor * loss for loss in picture] for picture in BEFORE]


def test_more_than_twice_the_loss_is_said_in_one_sentence():
    told = spoilt(times(12.0), BEFORE)
    assert told == (
        "The loss on the same pictures and noise is 12.0 times what it was before training: learning_rate is too high."
    )


def test_up_to_twice_the_loss_is_nothing_and_less_is_nothing():
    assert spoilt(times(1.9), BEFORE) == spoilt(times(1.0), BEFORE) == spoilt(times(0.1), BEFORE) == ""


def test_one_noise_level_alone_does_not_decide():
    now = times(1.0)
    now[0][3] *= 20
    assert spoilt(now, BEFORE) == ""


def test_losses_that_are_no_numbers_are_left_to_whoever_looks_for_them():
    assert spoilt(times(math.nan), BEFORE) == spoilt(times(math.inf), BEFORE) == spoilt(times(0.0), BEFORE) == ""
