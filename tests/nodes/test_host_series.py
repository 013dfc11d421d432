import math

import pytest

from lora_workbench.nodes.host.series import Series

pytestmark = pytest.mark.comfy


def filled(points, most=8):
    series = Series(most)
    changed = [series.add(step, value) for step, value in points]
    return series, changed


def test_few_points_stay_as_they_are():
    points = [(step, float(step)) for step in range(1, 8)]
    series, changed = filled(points)
    assert series.points == points and not any(changed)


def test_many_points_become_means_over_equally_many_steps_and_the_last_step_is_that_of_its_group():
    series, changed = filled([(step, float(step)) for step in range(1, 9)])
    assert series.points == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]
    assert changed == [False] * 7 + [True]
    assert not series.add(9, 9.0) and series.points[-1] == (8, 7.5)
    assert not series.add(10, 10.0) and series.points[-1] == (10, 9.5)


def test_a_hundred_thousand_steps_stay_short_and_keep_their_mean():
    series, _ = filled([(step, math.sin(step)) for step in range(1, 100_001)], most=400)
    assert 200 <= len(series.points) < 400
    assert series.points[-1][0] > 100_000 - 1000
    mean = sum(value for _, value in series.points) / len(series.points)
    assert mean == pytest.approx(sum(math.sin(step) for step in range(1, 100_001)) / 100_000, abs=2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_left_out(value):
    series, changed = filled([(1, 1.0), (2, value), (3, 3.0)])
    assert series.points == [(1, 1.0), (3, 3.0)] and not any(changed)


def test_a_training_that_goes_back_draws_that_part_again():
    series, changed = filled([(1, 1.0), (2, 2.0), (3, 3.0), (2, 5.0), (3, 6.0)])
    assert series.points == [(1, 1.0), (2, 5.0), (3, 6.0)]
    assert changed == [False, False, False, True, False]
