"""A training that makes the network far worse is told from one that only goes up and down."""

import math

import pytest
import torch
from toys import Batches, Denoiser

from lora_workbench.training.config import ObjectiveConfig, TrainConfig
from lora_workbench.training.loop import add_gradients
from lora_workbench.training.objective import Objective
from lora_workbench.training.spoiling import losses_of, spoilt

BEFORE = [0.1, 0.03, 0.01, 0.003, 0.2, 0.05, 0.02, 0.004]


def times(factor):
    return [factor * loss for loss in BEFORE]


def test_more_than_twice_the_loss_is_said_in_one_sentence():
    told = spoilt(times(12.0), BEFORE)
    assert told == (
        "The loss on the same pictures and noise is 12.0 times what it was before training: learning_rate is too high."
    )


def test_up_to_twice_the_loss_is_nothing_and_less_is_nothing():
    assert spoilt(times(1.9), BEFORE) == spoilt(times(1.0), BEFORE) == spoilt(times(0.1), BEFORE) == ""


def test_one_question_alone_does_not_decide():
    now = times(1.0)
    now[3] *= 20
    assert spoilt(now, BEFORE) == ""


def test_losses_that_are_no_numbers_are_left_to_whoever_looks_for_them():
    assert spoilt(times(math.nan), BEFORE) == spoilt(times(math.inf), BEFORE) == spoilt(times(0.0), BEFORE) == ""


@pytest.mark.parametrize("settings", [{}, {"noise_offset": 1.0}, {"preservation": 1.0}, {"stratify": 10}])
def test_the_same_weights_answer_the_same_questions_with_the_same_losses_one_at_a_time(settings):
    config, pictures = TrainConfig(objective=ObjectiveConfig(**settings)), [Batches()[number] for number in range(2)]
    torch.manual_seed(1)
    losses = losses_of(Denoiser(), pictures, config)
    torch.manual_seed(2)
    assert len(losses) == len(set(losses)) == 8 and losses == losses_of(Denoiser(), pictures, config)


@pytest.mark.parametrize("settings", [{}, {"noise_offset": 1.0}, {"timestep_low": 0.7}, {"loss": "huber"}])
def test_what_is_asked_is_what_training_asks(settings):
    """Another noise than the plain one may be learnt well while the plain one is answered worse."""
    denoiser, config = Denoiser(), TrainConfig(objective=ObjectiveConfig(**settings))
    objective, pictures = Objective(config.objective, config.seed), [Batches()[number] for number in range(2)]
    asked = [
        add_gradients(denoiser, objective, denoiser.adapters, pictures[number // 4], number, share=1.0).losses
        for number in range(8)
    ]
    assert losses_of(denoiser, pictures, config) == pytest.approx(sum(asked, []))
