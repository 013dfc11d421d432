"""Promise 8: the objective is right. The formulas here are written from the papers, in their own symbols."""

import pytest
import torch

from lora_workbench.training import noise

LATENTS = torch.randn(1000, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISE = torch.randn(1000, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def alpha_bar():
    """The cumulative products of SDXL's training schedule: 1,000 betas, linear in their square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


@pytest.fixture(scope="module")
def ddpm_sigma(alpha_bar):
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def each(values):
    return values.view(-1, 1, 1, 1)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_noisy_latents_are_ddpms_once_scaled_to_unit_variance(prediction, alpha_bar, ddpm_sigma):
    """Ho et al. 2020, eq. 4: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps."""
    ddpm = each(alpha_bar.sqrt()) * LATENTS + each((1 - alpha_bar).sqrt()) * NOISE
    ours = noise.mix(prediction, LATENTS, NOISE, ddpm_sigma) / each((ddpm_sigma**2 + 1).sqrt())
    torch.testing.assert_close(ours, ddpm, rtol=0, atol=1e-9)


def test_the_target_of_eps_is_the_noise(ddpm_sigma):
    """Ho et al. 2020, eq. 14."""
    assert torch.equal(noise.target("eps", LATENTS, NOISE, ddpm_sigma), NOISE)


def test_the_target_of_v_is_the_published_velocity(alpha_bar, ddpm_sigma):
    """Salimans & Ho 2022, appendix D: v = alpha eps - sigma x0 with alpha = sqrt(abar), sigma = sqrt(1 - abar)."""
    published = each(alpha_bar.sqrt()) * NOISE - each((1 - alpha_bar).sqrt()) * LATENTS
    torch.testing.assert_close(noise.target("v", LATENTS, NOISE, ddpm_sigma), published, rtol=0, atol=1e-9)


def test_flow_goes_straight_from_picture_to_noise_and_the_target_is_its_velocity():
    """Lipman et al. 2022, eq. 22-23 with time running from picture (0) to noise (1)."""
    sigma = torch.linspace(0, 1, 1000, dtype=torch.float64)
    noisy = noise.mix("flow", LATENTS, NOISE, sigma)
    torch.testing.assert_close(noisy, LATENTS + each(sigma) * (NOISE - LATENTS), rtol=0, atol=1e-12)
    velocity = (noise.mix("flow", LATENTS, NOISE, sigma + 1e-3) - noisy) / 1e-3
    torch.testing.assert_close(noise.target("flow", LATENTS, NOISE, sigma), velocity, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_in_single_precision_the_formulas_still_hold_to_a_millionth(prediction, ddpm_sigma):
    sigma = ddpm_sigma / 20 if prediction == "flow" else ddpm_sigma
    for formula in (noise.mix, noise.target):
        exact = formula(prediction, LATENTS, NOISE, sigma)
        single = formula(prediction, LATENTS.float(), NOISE.float(), sigma.float()).double()
        assert (single - exact).abs().max() / exact.abs().max() < 1e-6


def test_a_prediction_type_nobody_knows_is_refused_by_name():
    with pytest.raises(ValueError, match="'x0' cannot be trained"):
        noise.target("x0", LATENTS, NOISE, torch.ones(1000))


# Randomness


def test_noise_is_a_function_of_seed_purpose_and_number():
    latents = torch.zeros(2, 4, 8, 8)

    def draw(*where):
        return noise.noise_like(latents, *where)

    assert torch.equal(draw(1, "noise", 2), draw(1, "noise", 2))
    for other in ((2, "noise", 2), (1, "validation", 2), (1, "noise", 3), (12, "noise", 2), (-1, "noise", 2)):
        assert not torch.equal(draw(1, "noise", 2), draw(*other))


def test_a_very_large_seed_is_as_good_as_any():
    assert noise.noise_like(torch.zeros(1, 4, 2, 2), 2**64 - 1, "noise", 0).isfinite().all()


def test_noise_is_standard_normal():
    drawn = noise.noise_like(torch.zeros(64, 4, 32, 32), 0, "noise", 0)
    assert drawn.mean().abs() < 0.01 and (drawn.std() - 1).abs() < 0.01


def test_the_pictures_of_a_batch_have_noise_of_their_own():
    drawn = noise.noise_like(torch.zeros(2, 4, 8, 8), 0, "noise", 0)
    assert not torch.equal(drawn[0], drawn[1])


def test_other_code_that_draws_random_numbers_changes_nothing_and_is_not_changed():
    """Trap 21: sampling a preview between two steps must not change the training, nor the other way round."""

    def everything_random():
        drawn = noise.noise_like(torch.zeros(2, 4, 8, 8), 5, "noise", 6)
        return (
            drawn,
            noise.with_offset(drawn, 0.1, noise.generator(5, "noise offset", 6)),
            noise.multires(drawn, 3, 0.5, noise.generator(5, "multires noise", 6)),
        )

    torch.manual_seed(1)
    first = everything_random()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = everything_random()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, first, second))


# Noise that is coarser


def test_a_noise_offset_adds_one_number_to_each_channel_of_each_picture():
    """sd-scripts `apply_noise_offset`: noise + strength * randn(b, c, 1, 1)."""
    plain = noise.noise_like(torch.zeros(300, 4, 8, 8), 0, "noise", 0)
    added = noise.with_offset(plain, 0.3, noise.generator(0, "noise offset", 0)) - plain
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), rtol=0, atol=1e-5)
    numbers = added[..., 0, 0]
    assert numbers.std().item() == pytest.approx(0.3, rel=0.1) and numbers.mean().abs() < 0.03


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_multires_noise_is_what_sd_scripts_adds_up(iterations):
    """`pyramid_noise_like`: r between 2 and 4 anew each time, sides int(side / r**i), the end when one is 1."""
    plain = noise.noise_like(torch.zeros(2, 4, 24, 40), 0, "noise", 0)
    ours = noise.multires(plain, iterations, 0.3, noise.generator(0, "multires noise", 5))
    drawn = noise.generator(0, "multires noise", 5)
    upsample, (h, w) = torch.nn.Upsample(size=(24, 40), mode="bilinear"), (24, 40)
    total = plain.clone()
    for i in range(iterations):
        r = torch.rand((), generator=drawn, dtype=torch.float64).item() * 2 + 2
        h, w = max(1, int(h / (r**i))), max(1, int(w / (r**i)))
        total += upsample(torch.randn(2, 4, h, w, generator=drawn)) * 0.3**i
        if w == 1 or h == 1:
            break
    torch.testing.assert_close(ours, total / total.std(), rtol=0, atol=1e-6)
    assert (h == 1) == (iterations > 1)


def test_multires_noise_has_a_standard_deviation_of_one():
    plain = noise.noise_like(torch.zeros(2, 4, 32, 32), 0, "noise", 0)
    drawn = noise.multires(plain, 6, 0.9, noise.generator(0, "multires noise", 0))
    assert drawn.std().item() == pytest.approx(1)
