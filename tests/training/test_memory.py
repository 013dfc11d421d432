"""The plan that a training fits by: what is predicted, what moves first, and what is said about it."""

from dataclasses import replace

import pytest

from lora_workbench.training.config import OPTIMIZERS
from lora_workbench.training.memory import (
    EVERY_BLOCK,
    EVERY_SECOND_BLOCK,
    MARGIN,
    NO_BLOCK,
    STATE_BYTES,
    Choices,
    MemoryPlan,
    Needs,
    trained_bytes,
)

GIB = 1024**3
SDXL = Needs(weights=int(4.78 * GIB), activations=int(6.2 * GIB), adapters=int(0.62 * GIB))
FLUX = Needs(weights=int(22.2 * GIB), activations=int(32 * GIB), adapters=int(0.6 * GIB))


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_next_plan_takes_less_memory_and_says_what_moved(batch):
    choices = Choices(batch)
    plans = list(choices)
    peaks = [FLUX.peak(plan) for plan in plans]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    for plan, following in zip(plans, plans[1:], strict=False):
        moved, sentence = choices.stepped_down(plan)
        assert moved == following and sentence
        assert sum(a != b for a, b in zip(vars(plan).values(), vars(moved).values(), strict=True)) == 1
    assert choices.stepped_down(plans[-1]) is None
    assert plans[-1] == MemoryPlan(batch, EVERY_BLOCK, 0.0)


def test_a_batch_in_parts_comes_before_recomputing_and_that_before_streaming():
    moves = [(plan.parts, plan.recompute, plan.resident) for plan in Choices(3)]
    assert moves[:6] == [
        (1, NO_BLOCK, 1.0),
        (2, NO_BLOCK, 1.0),
        (3, NO_BLOCK, 1.0),
        (3, EVERY_SECOND_BLOCK, 1.0),
        (3, EVERY_BLOCK, 1.0),
        (3, EVERY_BLOCK, 0.75),
    ]


@pytest.mark.parametrize(
    ("needs", "card", "plan"),
    [
        (SDXL, 24, MemoryPlan()),
        (SDXL, 10, MemoryPlan(recompute=EVERY_SECOND_BLOCK)),
        (SDXL, 8, MemoryPlan(recompute=EVERY_BLOCK)),
        (FLUX, 80, MemoryPlan()),
        (FLUX, 48, MemoryPlan(recompute=EVERY_SECOND_BLOCK)),
        (FLUX, 24, MemoryPlan(recompute=EVERY_BLOCK, resident=0.75)),
        (FLUX, 12, MemoryPlan(recompute=EVERY_BLOCK, resident=0.25)),
        (replace(FLUX, weights=FLUX.weights // 2), 17, MemoryPlan(recompute=EVERY_BLOCK)),
    ],
)
def test_the_first_plan_that_fits_with_a_margin_is_taken(needs, card, plan):
    free = int(card * GIB * 0.96)
    assert Choices().fitting(needs, free) == plan
    assert needs.peak(plan) * MARGIN <= free


def test_when_nothing_fits_the_smallest_plan_is_tried():
    assert Choices(2).fitting(FLUX, GIB) == MemoryPlan(2, EVERY_BLOCK, 0.0)


def test_what_the_user_fixed_does_not_move():
    assert {plan.recompute for plan in Choices(2, recompute=(NO_BLOCK,))} == {NO_BLOCK}
    assert {plan.resident for plan in Choices(2, resident=(1.0,))} == {1.0}
    assert Choices(recompute=(EVERY_BLOCK,)).first == MemoryPlan(recompute=EVERY_BLOCK)


@pytest.mark.parametrize("plan", list(Choices(4)))
def test_a_measured_peak_corrects_the_activations_that_were_assumed(plan):
    measured = int(SDXL.peak(plan) * 1.1)
    assert SDXL.corrected(plan, measured).peak(plan) == pytest.approx(measured, abs=16)
    assert SDXL.corrected(plan, 0).activations == 0


def test_a_model_stored_in_eight_bits_takes_half_of_one_stored_in_sixteen():
    eight = replace(FLUX, weights=FLUX.weights // 2)
    plan = MemoryPlan(recompute=EVERY_BLOCK)
    assert FLUX.peak(plan) - eight.peak(plan) == FLUX.weights // 2


def test_every_optimizer_says_what_it_keeps():
    assert set(STATE_BYTES) == set(OPTIMIZERS)
    assert trained_bytes(10, "adamw", averaged=False) == 160
    assert trained_bytes(10, "adamw", averaged=True) == 200


def test_a_plan_is_one_line_of_plain_words():
    assert str(MemoryPlan()) == "the batch at once, all activations kept, all weights on the device"
    assert str(MemoryPlan(2, EVERY_SECOND_BLOCK, 0.25)) == (
        "the batch in 2 parts, every second block recomputed in backward, 75 % of the weights streamed from main memory"
    )
