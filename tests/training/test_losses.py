"""Every term of the loss against its published formula, computed from SDXL's betas and not from noise levels."""

from dataclasses import replace

import pytest
import torch

from lora_workbench.training.config import ObjectiveConfig
from lora_workbench.training.losses import check, element_errors, huber_threshold, level_weights, mean_errors

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHA_BAR = torch.cumprod(1 - BETAS, 0)
TABLE = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()
STEPS = torch.tensor([0, 1, 250, 500, 998, 999])
SNR = ALPHA_BAR[STEPS] / (1 - ALPHA_BAR[STEPS])
DIFFERENCES = torch.tensor([-30.0, -1.0, -0.1, 0.0, 1e-3, 0.5, 7.0], dtype=torch.float64)


def errors(threshold=None, **settings):
    """The errors of DIFFERENCES for each of two pictures."""
    predicted = DIFFERENCES.expand(2, -1)[:, None, None]
    return element_errors(ObjectiveConfig(**settings), predicted, torch.zeros_like(predicted), threshold)[:, 0, 0]


def same(ours, expected):
    torch.testing.assert_close(ours.double(), expected.double().expand_as(ours), rtol=2e-6, atol=1e-9)


# The error of an element


def test_l2_is_the_square_of_the_difference_without_any_weight_for_its_noise_level():
    """Traps 2 and 3: sd-scripts' `sigma_scaled` answers and a loss on the denoised picture weigh by sigma squared."""
    same(errors(), DIFFERENCES**2)
    for prediction in ("eps", "v", "flow"):
        assert level_weights(ObjectiveConfig(), prediction, TABLE[STEPS] / 20).tolist() == [1.0] * 6


def test_errors_are_computed_in_single_precision_whatever_the_model_answers_in():
    answer = torch.full((1, 1, 1, 4), 3.0).bfloat16()
    assert element_errors(ObjectiveConfig(), answer, torch.zeros(1, 1, 1, 4), None).dtype == torch.float32


def test_huber_is_a_square_near_zero_and_a_line_far_from_it():
    c = torch.tensor([0.1, 2.0], dtype=torch.float64)
    same(errors(c, loss="huber"), 2 * c[:, None] * ((DIFFERENCES**2 + c[:, None] ** 2).sqrt() - c[:, None]))
    near, far = errors(torch.full((2,), 100.0), loss="huber")[0], errors(torch.full((2,), 1e-3), loss="huber")[0]
    torch.testing.assert_close(near[1:].double(), DIFFERENCES[1:] ** 2, rtol=0.01, atol=0)
    torch.testing.assert_close(far[[0, 6]].double(), 2e-3 * DIFFERENCES[[0, 6]].abs(), rtol=0.01, atol=0)


def test_smooth_l1_is_huber_without_the_factor_c():
    c = torch.tensor([0.1, 2.0])
    same(errors(c, loss="smooth l1") * c[:, None], errors(c, loss="huber").double())


# The threshold of huber


@pytest.mark.parametrize("loss", ["huber", "smooth l1"])
@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        # (1 - c) / (1 + sigma)^2 + c with sigma = sqrt((1 - abar) / abar)
        ("snr", 0.8 / (1 + ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()) ** 2 + 0.2),
        # exp(-alpha t) with alpha = -ln(c) / 1000
        ("exponential", torch.exp(torch.log(torch.tensor(0.2, dtype=torch.float64)) / 1000 * torch.arange(1000))),
        ("constant", torch.full((1000,), 0.2, dtype=torch.float64)),
    ],
)
def test_the_threshold_follows_its_schedule(loss, schedule, published):
    config = ObjectiveConfig(loss=loss, huber_c=0.2, huber_schedule=schedule)
    same(huber_threshold(config, TABLE.float()[STEPS], TABLE.float()), published[STEPS])
    assert huber_threshold(replace(config, loss="l2"), TABLE[STEPS], TABLE) is None


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # noise to picture is sigma / (1 - sigma): (1 - c) / (1 + 1/3)^2 + c at a quarter, and c where all is noise
        ("snr", [0.9 / (1 + 1 / 3) ** 2 + 0.1, 0.9 / 4 + 0.1, 0.1]),
        ("exponential", [0.1**0.25, 0.1**0.5, 0.1]),
        ("constant", [0.1, 0.1, 0.1]),
    ],
)
def test_the_threshold_of_flow_models_takes_noise_to_picture_from_the_level(schedule, expected):
    config = ObjectiveConfig(loss="huber", huber_schedule=schedule)
    same(huber_threshold(config, torch.tensor([0.25, 0.5, 1.0]), None), torch.tensor(expected))


# What a noise level counts


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_has_its_two_published_forms(gamma):
    """Trap 13: the v form is min(SNR, gamma) / (SNR + 1), not that of eps nor that plus one."""
    config, sigma = ObjectiveConfig(min_snr_gamma=gamma), TABLE[STEPS].float()
    least = torch.minimum(SNR, torch.tensor(gamma, dtype=torch.float64))
    same(level_weights(config, "eps", sigma), least / SNR)
    same(level_weights(config, "v", sigma), least / (SNR + 1))


def test_the_debiased_weight_has_its_two_forms_and_a_limit():
    config, sigma = ObjectiveConfig(debiased=True), TABLE[STEPS].float()
    bounded = SNR.clamp(max=1000)
    assert SNR[0] > 1000 > SNR[2], "the limit is reached here"
    same(level_weights(config, "eps", sigma), bounded**-0.5)
    same(level_weights(config, "v", sigma), 1 / (bounded + 1))


def test_both_weights_together_multiply():
    sigma, both = TABLE[STEPS].float(), ObjectiveConfig(min_snr_gamma=5, debiased=True)
    apart = [
        level_weights(config, "v", sigma) for config in (replace(both, debiased=False), replace(both, min_snr_gamma=0))
    ]
    same(level_weights(both, "v", sigma), apart[0].double() * apart[1].double())


def test_weights_follow_the_models_own_levels_with_zero_terminal_snr():
    """Trap 13: sd-scripts takes SNR from the schedule before it is rescaled.

    Lin et al. 2023, algorithm 1: sqrt(abar) moved and stretched so that its end is 0 (here nearly).
    """
    root = ALPHA_BAR.sqrt()
    rescaled = ((root - root[-1]) * root[0] / (root[0] - root[-1])).clamp(min=1e-4) ** 2
    sigma = ((1 - rescaled) / rescaled).sqrt()[STEPS]
    snr = rescaled[STEPS] / (1 - rescaled[STEPS])
    ours = level_weights(ObjectiveConfig(min_snr_gamma=5), "v", sigma.float())
    same(ours, snr.clamp(max=5) / (snr + 1))
    assert abs(ours[3] / (SNR.clamp(max=5) / (SNR + 1))[3] - 1) > 0.1, "the schedule before would give another number"


@pytest.mark.parametrize(("name", "value"), [("min_snr_gamma", 5.0), ("debiased", True)])
def test_weights_by_snr_are_refused_for_flow_by_name(name, value):
    config = ObjectiveConfig(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name} .*flow model.*turn {name} off.*\.$"):
        check(config, "flow")
    check(config, "eps")
    check(config, "v")
    check(ObjectiveConfig(), "flow")


# Masks


def test_a_masked_mean_is_the_mean_over_what_the_mask_leaves():
    """Trap 22: without dividing by the area a small mask would lower the learning rate."""
    errors = torch.ones(2, 3, 4, 4)
    errors[:, :, 2:] = 25.0
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2], mask[1, :, :3] = 1.0, 0.5
    torch.testing.assert_close(mean_errors(errors, mask), torch.tensor([1.0, (8 * 1 + 4 * 25) / 12]))
    whole = torch.ones(2, 1, 4, 4)
    for floor in (0.0, 0.3, 1.0):
        assert torch.equal(mean_errors(errors, whole, floor), mean_errors(errors))


def test_what_a_mask_leaves_out_counts_the_floor():
    errors = torch.ones(1, 3, 4, 4)
    errors[:, :, 1:] = 25.0
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, :1], mask[:, :, 1:2] = 1.0, 0.2
    expected = (4 * 1 + 4 * 0.2 * 25 + 8 * 0.1 * 25) / (4 + 4 * 0.2 + 8 * 0.1)
    assert mean_errors(errors, mask, 0.1).item() == pytest.approx(expected)
    assert mean_errors(errors, mask, 0.0).item() == pytest.approx((4 * 1 + 4 * 0.2 * 25) / (4 + 4 * 0.2))
    assert mean_errors(errors, mask, 1.0).item() == pytest.approx(errors.mean().item())


def test_a_mask_that_leaves_nothing_teaches_as_little_as_what_lies_outside_of_others():
    errors = torch.full((1, 3, 4, 4), 2.0, requires_grad=True)
    loss = mean_errors(errors, torch.zeros(1, 1, 4, 4), 0.0)
    loss.sum().backward()
    assert loss.item() == 0 and not errors.grad.any()
    assert mean_errors(errors, torch.zeros(1, 1, 4, 4), 0.1).item() == pytest.approx(0.2)
