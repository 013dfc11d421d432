import math

import pytest

from lora_workbench.training.schedule import CONSTANT, COSINE, learning_rate


def rates(steps, **settings):
    return [learning_rate(step, peak=1.0, steps=steps, **settings) for step in range(steps)]


def test_a_constant_rate_is_the_peak_at_every_step():
    assert rates(5, schedule=CONSTANT) == [1.0] * 5


@pytest.mark.parametrize("schedule", [CONSTANT, COSINE])
def test_warm_up_rises_evenly_to_the_peak_and_never_starts_at_zero(schedule):
    assert rates(20, schedule=schedule, warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_cosine_falls_from_the_peak_through_its_half_towards_zero():
    falling = rates(100, schedule=COSINE)
    assert falling[0] == 1.0
    assert falling[50] == pytest.approx(0.5)
    assert falling[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert 0 < falling[-1] < 1e-3
    assert falling == sorted(falling, reverse=True)


def test_a_cosine_after_warm_up_spreads_over_the_steps_that_are_left():
    assert rates(110, schedule=COSINE, warmup=10)[60] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", [CONSTANT, COSINE])
def test_a_warm_up_as_long_as_the_run_never_falls(schedule):
    rising = rates(10, schedule=schedule, warmup=10)
    assert rising == sorted(rising) and rising[-1] == 1.0


def test_past_its_end_a_cosine_stays_at_zero():
    assert learning_rate(500, peak=1.0, steps=100, schedule=COSINE) == 0.0
