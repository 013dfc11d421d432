"""Curves whose kind is known, with the noise that noise levels and pictures make, and what is said about them."""

import math
from collections import Counter

import numpy as np
import pytest

from lora_workbench.training import curve as module
from lora_workbench.training.curve import SENTENCES, Smoother, diagnose, smoothed, theil_sen

STEPS, CURVES = 1500, 12
T = np.arange(STEPS) / STEPS


def settled(rng):
    return -rng.uniform(0.3, 0.6) * (1 - np.exp(-T / rng.uniform(0.08, 0.16)))


def still_falling(rng):
    return -rng.uniform(0.3, 0.6) * T ** rng.uniform(0.8, 1.2)


def drops_then_rises(rng):
    turn, depth = rng.uniform(0.35, 0.6), rng.uniform(0.3, 0.6)
    return np.where(turn > T, -depth * np.sin(T / turn * np.pi / 2), depth * ((T - turn) / (1 - turn) - 1))


def diverging(rng):
    return rng.uniform(0.8, 1.5) * np.clip(2 * T - 1, 0, None) ** 2


def erratic(rng):
    return rng.uniform(0.4, 0.7) * np.sign(np.sin(2 * np.pi * T * rng.uniform(3, 6) + rng.uniform(0, 6)))


def spiky(rng):
    return settled(rng) + (rng.random(STEPS) < 0.02) * rng.uniform(2.5, 4)


TRENDS = {
    "flat": lambda rng: 0 * T,
    "settled": settled,
    "still falling": still_falling,
    "drops then rises": drops_then_rises,
    "diverging": diverging,
    "erratic": erratic,
    "spiky": spiky,
}


def curve(kind, seed, *, levels=True):
    """Points whose loss falls from 0.9 at no noise to 0.045 at all noise, as eps losses do, whatever is learned."""
    rng = np.random.default_rng(seed)
    place = rng.random(STEPS)
    logs = math.log(0.9) - 3 * place**1.5 + TRENDS[kind](rng) + rng.normal(0, 0.25, STEPS)
    sigmas = (0.02 + 14.6 * place**4).tolist() if levels else [None] * STEPS
    return list(zip(range(1, STEPS + 1), np.exp(logs).tolist(), sigmas, strict=True))


def rates(kind, **options):
    return Counter(diagnose(curve(kind, seed, **options)).kind for seed in range(CURVES))


@pytest.mark.parametrize("kind", TRENDS)
def test_each_kind_of_curve_is_told_nine_times_in_ten_when_levels_are_stored(kind):
    assert rates(kind)[kind] >= 0.9 * CURVES


@pytest.mark.parametrize("kind", ["flat", "settled", "still falling", "drops then rises", "erratic"])
def test_without_levels_nothing_is_claimed_that_cannot_be_seen(kind):
    said = rates(kind, levels=False)
    assert said["too noisy to tell"] >= 0.8 * CURVES and set(said) <= {"too noisy to tell", "diverging"}


def test_without_levels_a_divergence_that_stands_out_is_still_told():
    points = [(step, loss * math.exp(3 * step / STEPS), None) for step, loss, _ in curve("flat", 0, levels=False)]
    assert diagnose(points).kind == "diverging"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_comes_before_all_else(value):
    points = [*curve("diverging", 0), (STEPS + 1, value, 1.0)]
    assert diagnose(points).kind == "broken numbers" and f"1 of {STEPS + 1} losses" in diagnose(points).sentence


@pytest.mark.parametrize("count", [0, 1, 2, 59])
def test_a_few_steps_say_nothing(count):
    assert diagnose(curve("diverging", 0)[:count]).kind == "too noisy to tell"


def test_the_turning_point_and_the_spikes_are_named():
    rng = np.random.default_rng(3)
    logs = np.where(T[::-1] > 0.5, -T, T - 1) + rng.normal(0, 0.1, STEPS)
    points = [(step + 1, float(np.exp(logs[step])), 1.0 + step % 7) for step in range(STEPS)]
    said = diagnose(points)
    assert said.kind == "drops then rises"
    step = int(next(word for word in said.sentence.split() if word.isdigit()))
    assert 600 < step < 900
    high = [
        (step, loss * (50 if step in (400, 900, 901, 902, 903, 904, 905, 906) else 1), s)
        for step, loss, s in curve("settled", 1)
    ]
    assert diagnose(high).sentence.startswith("Single losses are far above all others (8, e.g. at step 400)")


def test_every_sentence_is_one_sentence():
    for sentence in SENTENCES.values():
        assert sentence.endswith(".") and sentence[0] in "{TS" and "\n" not in sentence


def test_the_order_of_points_and_a_loss_of_nothing_change_nothing():
    points = curve("settled", 2)
    assert diagnose([*points[::-1], (7, 0.0, 1.0)]) == diagnose(points)


def test_losses_that_are_all_the_same_are_flat():
    assert diagnose([(step, 0.5, 1.0) for step in range(200)]).kind == "flat"


def test_theil_sen_finds_the_slope_whatever_single_points_do():
    x = np.arange(20.0)
    y = 2 * x + 1
    y[4] += 1000
    slope, low, high = theil_sen(x, y)
    assert slope == pytest.approx(2) and low <= 2 <= high


def test_the_interval_of_theil_sen_holds_the_true_slope_nineteen_times_in_twenty():
    rng, x = np.random.default_rng(0), np.arange(12.0)
    intervals = [theil_sen(x, 0.3 * x + rng.normal(0, 1, 12))[1:] for _ in range(400)]
    held = sum(low <= 0.3 <= high for low, high in intervals) / 400
    assert 0.92 <= held <= 0.985


# The smoothed curve


def test_the_smoothed_curve_follows_what_is_learned_and_not_the_levels():
    """The raw loss ranges over a factor of twenty; what is learned here is a factor of 1.5."""
    points = curve("still falling", 5)
    rng = np.random.default_rng(5)
    rng.random(STEPS)
    wanted = still_falling(rng)
    steps, values = map(np.array, zip(*smoothed(points), strict=True))
    assert 50 <= len(steps) <= 60 and (np.diff(steps) > 0).all()
    error = np.log(values) - np.interp(steps, np.arange(1, STEPS + 1), wanted)
    assert error.std() < 0.1
    raw = np.log([loss for _, loss, _ in points])
    assert raw.std() > 8 * error.std() and abs(error.mean() - np.median(raw - wanted)) < 0.3


def test_the_smoothed_curve_of_a_run_that_has_just_begun_is_what_there_is():
    assert smoothed([]) == [] and smoothed([(1, math.nan, 1.0)]) == []
    assert smoothed([(1, 0.5, 1.0)]) == [(1.0, pytest.approx(0.5))]
    assert len(smoothed(curve("flat", 0)[:45])) == 4


def test_without_levels_the_smoothed_curve_is_the_median_over_time():
    points = [(step, 0.5 if step <= 50 else 0.25, None) for step in range(1, 101)]
    assert [value for _, value in smoothed(points, blocks=2)] == pytest.approx([0.5, 0.25])


def test_a_curve_that_grows_is_the_curve_of_its_points_and_seldom_taken_anew(monkeypatch):
    taken, points, smoother = [], curve("settled", 1), Smoother()
    monkeypatch.setattr(module, "smoothed", lambda points: taken.append(len(points)) or smoothed(points))
    assert smoother.curve() == []
    for step, loss, sigma in points:
        smoother.add(step, [loss, loss / 2], [sigma, sigma])
        shown = smoother.curve()
    assert len(taken) < 450
    assert shown == smoothed([(s, x, level) for s, loss, level in points for x in (loss, loss / 2)][: taken[-1]])


def test_steps_that_a_run_does_again_replace_what_it_did():
    smoother = Smoother()
    for step in range(1, 41):
        smoother.add(step, [0.5], [1.0])
    assert smoother.curve()[-1][1] == pytest.approx(0.5)
    smoother.add(21, [0.25], [1.0])
    steps = [step for step, _ in smoother.curve()]
    assert max(steps) <= 21 and len(steps) == 2
