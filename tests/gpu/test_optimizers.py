"""Every optimizer on a CUDA device: it goes on bit for bit there, and agrees with the CPU."""

import pytest
import torch
from toys import Denoiser, equal

from lora_workbench.training.config import OPTIMIZERS, TrainConfig
from lora_workbench.training.optimizer import (
    EXTRAS,
    load_state,
    optimizer_for,
    set_learning_rate,
    state_of,
    training_weights,
)

pytestmark = pytest.mark.gpu


def taken(name, device, steps, weights=None, state=None):
    """Adapters and optimizer after some steps with gradients that depend on the number of the step alone."""
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    adapters = Denoiser(rank=64).adapters
    if weights:
        adapters.load(weights)
    adapters.to(torch.device(device))
    optimizer = optimizer_for(adapters, TrainConfig(optimizer=name))
    load_state(optimizer, state or {})
    for number in steps:
        random = torch.Generator().manual_seed(number)
        set_learning_rate(optimizer, 0.01)
        with training_weights(optimizer):
            adapters.values.grad.copy_(torch.randn(adapters.values.shape, generator=random))
            optimizer.step()
    return adapters.state(), state_of(optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_four_steps_and_four_more_are_eight_on_the_device(name):
    weights, state = taken(name, "cuda", range(8))
    resumed = taken(name, "cuda", range(4, 8), *taken(name, "cuda", range(4)))
    assert equal(resumed[0], weights) and equal(resumed[1], state)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw 8-bit"])
def test_the_device_agrees_with_the_cpu(name):
    ours, reference = taken(name, "cuda", range(4))[0], taken(name, "cpu", range(4))[0]
    for key, tensor in reference.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-5)
