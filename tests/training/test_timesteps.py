"""The distributions of noise levels, each against its own density, written from the papers and not from the code."""

import math

import pytest
import torch

from lora_workbench.training.config import TIMESTEPS, ObjectiveConfig
from lora_workbench.training.noise import generator
from lora_workbench.training.timesteps import (
    even_shares,
    resolution_shift,
    training_sigmas,
    validation_sigmas,
    with_odds,
)

COUNT = 100_000
SQUARE = (1024, 1024)
TABLE = torch.arange(1000.0)


def places(size=SQUARE, count=COUNT, seed=0, number=0, **settings):
    """Levels of a flow model, which are places on the schedule themselves."""
    return training_sigmas(ObjectiveConfig(**settings), None, count, size, seed, number).double()


def normal_share(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def logit(p):
    return (p / (1 - p)).log()


def odds(p):
    return p / (1 - p)


SHARES_BELOW = {
    "uniform": lambda p: p,
    "logit-normal": lambda p: normal_share((logit(p) + 0.5) / 0.8),
    "shift": lambda p: normal_share((odds(p) / 2.5).log()),
    "resolution shift": lambda p: normal_share(odds(p).log() - 1.15),
    "content": lambda p: 1 - (1 - p) ** (1 / 3),
    "style": lambda p: p ** (1 / 3),
}
SETTINGS = {"timestep_mean": -0.5, "timestep_std": 0.8, "timestep_shift": 2.5}


def assert_distributed(drawn, share_below):
    """Kolmogorov-Smirnov: no share is off by more than 1.95 / sqrt(n), which one in a thousand would be."""
    ordered = drawn.sort().values
    shares = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    assert (shares - share_below(ordered)).abs().max() < 1.95 / math.sqrt(len(drawn))


def test_every_distribution_but_the_automatic_one_is_checked_here():
    assert {"automatic", *SHARES_BELOW} == set(TIMESTEPS)


@pytest.mark.parametrize("stratify", [0, 100])
@pytest.mark.parametrize("name", SHARES_BELOW)
def test_levels_are_distributed_as_published(name, stratify):
    drawn = places(timesteps=name, stratify=stratify, **SETTINGS)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert_distributed(drawn, SHARES_BELOW[name])


@pytest.mark.parametrize("name", SHARES_BELOW)
def test_a_range_keeps_the_density_and_cuts_off_the_rest(name):
    low, high = 0.3, 0.7
    drawn = places(timesteps=name, timestep_low=low, timestep_high=high, **SETTINGS)
    assert drawn.min() >= low - 1e-6 and drawn.max() <= high + 1e-6
    below = SHARES_BELOW[name]
    start, end = below(torch.tensor([low, high], dtype=torch.float64))
    assert_distributed(drawn, lambda p: (below(p) - start) / (end - start))


@pytest.mark.parametrize("name", SHARES_BELOW)
def test_a_table_is_read_at_the_same_places(name):
    config = ObjectiveConfig(timesteps=name, **SETTINGS)
    levels = training_sigmas(config, TABLE, 5000, SQUARE, 1, 2)
    expected = (places(count=5000, seed=1, number=2, timesteps=name, **SETTINGS) * 1000).floor().clamp(max=999)
    # Places are rounded to float32 on their way, which can push one across the edge of an entry.
    assert ((levels.double() - expected).abs() <= 1).all() and (levels == expected).double().mean() > 0.999


def test_content_is_learned_at_high_noise_and_style_at_low_noise():
    """Most of a cubic bias lies within a tenth of its end: the cube root of 0.1 is 0.46."""
    assert (places(timesteps="content") > 0.9).double().mean() == pytest.approx(0.1 ** (1 / 3), abs=0.01)
    assert (places(timesteps="style") < 0.1).double().mean() == pytest.approx(0.1 ** (1 / 3), abs=0.01)


def test_sigmoid_sampling_is_logit_normal_with_its_defaults():
    logits = logit(places(timesteps="logit-normal"))
    assert logits.mean().abs() < 0.01 and (logits.std() - 1).abs() < 0.01


def test_automatic_is_uniform_over_a_table_and_moved_with_the_size_for_flow():
    config = ObjectiveConfig()
    counts = training_sigmas(config, TABLE, 200_000, SQUARE, 0, 0).long().bincount(minlength=1000)
    assert counts.min() > 120 and counts.max() < 290  # 200 each, within six standard deviations
    for size, mu in ((SQUARE, 1.15), ((512, 512), 0.63)):
        logits = logit(training_sigmas(config, None, COUNT, size, 0, 0).double())
        assert (logits.mean() - mu).abs() < 0.01 and (logits.std() - 1).abs() < 0.01


@pytest.mark.parametrize("low_high", [(0.0, 0.2), (0.2, 0.8), (0.29, 0.57), (0.9, 1.0)])
def test_a_range_of_a_table_is_its_entries_from_the_first_to_before_the_last(low_high):
    low, high = low_high
    config = ObjectiveConfig(timestep_low=low, timestep_high=high)
    drawn = training_sigmas(config, TABLE, 20_000, SQUARE, 0, 0)
    assert drawn.min() == round(1000 * low) and drawn.max() == round(1000 * high) - 1


def test_a_range_that_the_distribution_hardly_reaches_still_gives_levels_inside_it():
    drawn = places(timesteps="logit-normal", timestep_mean=-10, timestep_std=0.01, timestep_low=0.9)
    assert drawn.isfinite().all() and drawn.min() >= 0.9 - 1e-6


@pytest.mark.parametrize(("side", "shift"), [(1024, 3.158), (512, 1.878), (768, 2.332)])
def test_the_shift_grows_with_the_picture_as_published(side, shift):
    """Black Forest Labs: mu is 0.5 at 256 tokens and 1.15 at 4096."""
    assert resolution_shift((side, side)) == pytest.approx(shift, abs=1e-3)


def test_the_shift_depends_on_the_area_and_not_on_the_shape():
    assert resolution_shift((2048, 512)) == resolution_shift((1024, 1024)) == resolution_shift((512, 2048))


def test_moving_a_place_keeps_the_ends_and_the_order():
    moved = with_odds(torch.linspace(0, 1, 101, dtype=torch.float64), 3.158)
    assert moved[0] == 0 and moved[-1] == pytest.approx(1) and (moved.diff() > 0).all()
    assert odds(moved[50]).item() == pytest.approx(3.158)


def test_validation_levels_are_four_increasing_entries_whatever_the_seed():
    table = torch.linspace(0.03, 14.6, 1000)
    levels = validation_sigmas(table, SQUARE)
    assert len(levels) == 4 and (levels.diff() > 0).all() and set(levels.tolist()) <= set(table.tolist())
    flow = validation_sigmas(None, SQUARE)
    assert len(flow) == 4 and (flow.diff() > 0).all() and flow[0] > 0 and flow[-1] < 1


# Stratified draws


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_window_has_one_level_in_each_slice_of_the_distribution(batch):
    window = 20
    for start in (0, 3):
        numbers = range(start * window // batch, (start + 1) * window // batch)
        shares = torch.cat([even_shares(batch, 7, number, window) for number in numbers])
        assert (shares * window).floor().sort().values.tolist() == list(range(window))


def test_each_window_has_an_order_of_its_own():
    def order(seed, window):
        return tuple(even_shares(10, seed, window, 10).argsort().tolist())

    orders = {order(0, window) for window in range(20)}
    assert len(orders) == 20 and order(1, 0) != order(0, 0)
    assert order(0, 3) == order(0, 3)


def test_stratified_levels_make_a_window_of_losses_quieter_around_the_same_mean():
    """With a loss that falls from 1 to 0 with the level, as it does for models that predict noise."""

    def window_means(stratify):
        levels = torch.stack([places(count=1, number=n, timesteps="uniform", stratify=stratify) for n in range(4000)])
        return ((1 - levels) ** 4).reshape(-1, 20).mean(1)

    plain, stratified = window_means(0), window_means(20)
    assert stratified.var() < plain.var() / 50
    assert stratified.mean() == pytest.approx(0.2, abs=0.002) and plain.mean() == pytest.approx(0.2, abs=0.02)


# Randomness


def test_levels_are_a_function_of_seed_and_number():
    first = places(count=8, seed=5, number=6, stratify=4)
    assert torch.equal(places(count=8, seed=5, number=6, stratify=4), first) and len(set(first.tolist())) == 8
    for other in ({"seed": 4, "number": 6}, {"seed": 5, "number": 7}):
        assert not torch.equal(places(count=8, stratify=4, **other), first)


def test_other_code_that_draws_random_numbers_changes_no_level_and_is_not_changed():
    """Trap 21."""
    torch.manual_seed(1)
    first = places(count=4, stratify=2)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(places(count=4, stratify=2), first) and torch.equal(torch.get_rng_state(), before)
    assert generator(0, "sigma", 0).initial_seed() != generator(0, "noise", 0).initial_seed()


def test_whatever_the_shift_and_the_size_of_the_picture_levels_are_numbers():
    """1 with its odds times 1 / 3 is 1.0000000000000002, of which there is no logarithm of odds."""
    for shift in (1 / 3, *range(1, 101), ObjectiveConfig.timestep_shift):
        drawn = places(count=4, timesteps="shift", timestep_shift=shift)
        assert ((drawn > 0) & (drawn < 1)).all(), shift
    for width in range(256, 2049, 64):
        for height in range(256, width + 1, 64):
            assert places((width, height), 4).isfinite().all(), (width, height)
