import math

import pytest
import torch

from lora_workbench.training.schedule import CONSTANT, COSINE, LINEAR, RESTARTS, SCHEDULES, learning_rate


def rates(steps, **settings):
    return [learning_rate(step, peak=1.0, steps=steps, **settings) for step in range(steps)]


def test_a_constant_rate_is_the_peak_at_every_step():
    assert rates(5, schedule=CONSTANT) == [1.0] * 5


@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_as_long_as_the_run_never_falls(schedule):
    rising = rates(10, schedule=schedule, warmup=10)
    assert rising == sorted(rising) and rising[-1] == 1.0


@pytest.mark.parametrize("schedule", [COSINE, LINEAR, RESTARTS])
def test_past_its_end_the_rate_stays_at_zero(schedule):
    assert learning_rate(500, peak=1.0, steps=100, schedule=schedule, restarts=3) == 0.0


@pytest.mark.parametrize(("warmup", "rising"), [(0.1, 20), (0.999, 200), (1, 1), (20, 20), (0.0, 0)])
def test_a_warm_up_below_one_is_a_share_of_all_steps(warmup, rising):
    rates_ = rates(200, warmup=warmup)
    assert [rate < 1 for rate in rates_].count(True) == max(0, rising - 1)
    assert rates_ == rates(200, warmup=rising)


OTHERS = {
    CONSTANT: ("constant_with_warmup", {}),
    LINEAR: ("linear", {}),
    COSINE: ("cosine", {}),
    RESTARTS: ("cosine_with_restarts", {"num_cycles": 3}),
}


@pytest.mark.parametrize("library", ["diffusers.optimization", "transformers"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 10])
def test_every_rate_is_that_of_the_library_everybody_uses(library, schedule, warmup):
    """Only warm-up differs: theirs begins at 0, so each of its rates comes a step earlier here."""
    get_scheduler = pytest.importorskip(library).get_scheduler
    name, more = OTHERS[schedule]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    if library == "diffusers.optimization":
        made = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=100, **more)
    else:
        made = get_scheduler(name, optimizer, warmup, 100, scheduler_specific_kwargs=more)
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    settings = {"peak": 0.5, "steps": 100, "warmup": warmup, "schedule": schedule, "restarts": 3}
    ours = [learning_rate(step, **settings) for step in range(100)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert ours[: max(0, warmup - 1)] == pytest.approx(theirs[1:warmup])
