"""Which checkpoint is chosen, and what is said about it, from made-up losses on kept-out pictures."""

import math

import pytest

from lora_workbench.training.picking import (
    AT_STEP,
    BALANCED,
    FLEXIBLE,
    LAST,
    LIKENESS,
    SUGGESTED,
    choose,
    percent_better,
    scored,
)
from lora_workbench.training.run import Checkpoint, Checkpoints
from lora_workbench.training.scores import differences

BASE_LEVELS = (0.1, 0.4, 2.0)
BUMPS = (0.0, 0.002, -0.002, 0.001, -0.001)


def run(*means: float, pictures: int = 5, bumps=BUMPS) -> Checkpoints:
    """Checkpoints at steps 100, 200, ... whose held-out losses are e^mean of the base's, a little apart by picture."""
    base = [[(1 + number) * level for level in BASE_LEVELS] for number in range(pictures)]

    def validation(mean: float, turn: int) -> list[list[float]]:
        shares = [math.exp(mean + bumps[(number + turn) % len(bumps)]) for number in range(pictures)]
        return [[share * level for level in levels] for share, levels in zip(shares, base, strict=True)]

    entries = tuple(
        Checkpoint(100 * (number + 1), f"/loras/x_{number}", f"x_{number}", 1.0, validation(mean, number))
        for number, mean in enumerate(means)
    )
    return Checkpoints("x", "/loras/x", "zork", entries, base)


def unmeasured(*steps: int) -> Checkpoints:
    return Checkpoints("x", "/loras/x", "", tuple(Checkpoint(step, f"/{step}", f"{step}") for step in steps))


def suggested(checkpoints: Checkpoints, preference: str = BALANCED):
    choice = choose(checkpoints, SUGGESTED, 0, preference)
    return choice.checkpoint.step, choice.reason


def test_the_score_is_the_mean_logarithm_of_the_ratio_to_the_base():
    checkpoints = run(-0.1, bumps=(0.0,))
    assert differences(checkpoints.entries[0].validation, checkpoints.base_validation) == pytest.approx([-0.1] * 5)
    assert percent_better(checkpoints.entries[0], checkpoints.base_validation) == pytest.approx(9.516, abs=1e-3)
    worse = run(0.1, bumps=(0.0,))
    assert percent_better(worse.entries[0], worse.base_validation) == pytest.approx(-10.517, abs=1e-3)


def test_the_checkpoint_that_is_best_on_kept_out_pictures_is_suggested():
    step, reason = suggested(run(-0.05, -0.14, -0.2, -0.12, -0.02))
    assert step == 300
    assert reason == (
        "Step 300 is recommended. On 5 pictures kept out of training it is 18 % better than the base model. "
        "After step 300 the kept-out pictures got worse, so later files have learned too much of their pictures."
    )


def test_one_kept_out_picture_is_called_one_picture():
    _, reason = suggested(run(-0.1, -0.3, pictures=1))
    assert "On 1 picture kept out of training" in reason


def test_a_preference_chooses_among_the_checkpoints_that_are_equal_within_measuring_error():
    checkpoints = run(-0.02, -0.197, -0.2, -0.199, -0.05)
    assert [suggested(checkpoints, preference)[0] for preference in (FLEXIBLE, BALANCED, LIKENESS)] == [200, 300, 400]
    told = "Files 200 to 400 are equal within measuring error; the earliest is the most flexible."
    assert told in suggested(checkpoints)[1]


def test_the_safe_range_is_without_gaps():
    checkpoints = run(-0.199, -0.1, -0.2, -0.1, -0.199, bumps=(0.0,))
    assert [suggested(checkpoints, preference)[0] for preference in (FLEXIBLE, BALANCED, LIKENESS)] == [300, 300, 300]


def test_with_noisier_pictures_more_checkpoints_count_as_equal():
    means = (-0.15, -0.17, -0.2, -0.17, -0.15)
    calm, noisy = run(*means), run(*means, bumps=(0.0, 0.08, -0.08, 0.05, -0.05))
    assert suggested(calm, FLEXIBLE)[0] == 300
    assert suggested(noisy, FLEXIBLE)[0] < 300


def test_with_one_kept_out_picture_a_fixed_measuring_error_is_assumed():
    checkpoints = run(-0.1, -0.185, -0.2, -0.15, pictures=1, bumps=(0.0,))
    assert [suggested(checkpoints, preference)[0] for preference in (FLEXIBLE, LIKENESS)] == [200, 300]


def test_a_best_checkpoint_at_the_end_may_not_be_the_end():
    assert "Train about 50 % longer." in suggested(run(-0.05, -0.1, -0.15, -0.2))[1]
    assert "longer" not in suggested(run(-0.05, -0.2, -0.1))[1]
    assert "longer" not in suggested(run(-0.1, -0.2))[1]


@pytest.mark.parametrize(
    ("means", "pictures", "bumps"),
    [
        ((0.05, 0.02, 0.1), 5, BUMPS),
        ((-0.004, -0.011, -0.002), 5, (0.0,)),
        ((-0.004, -0.019, -0.002), 3, (0.0,)),
        ((-0.01, -0.049, -0.02), 1, (0.0,)),
        ((-0.01, -0.06, -0.02), 5, (0.1, -0.1, 0.08, -0.08, 0.0)),
    ],
    ids=["worse than the base", "under 1.2 %", "under 2 % of few", "under 5 % of one", "under 2.5 standard errors"],
)
def test_an_improvement_too_small_to_measure_is_not_sold_as_one(means, pictures, bumps):
    _, reason = suggested(run(*means, pictures=pictures, bumps=bumps))
    assert reason.startswith("No file is measurably better than the base model on ")
    assert "kept out of training" in reason and "only a guess" in reason
    assert "check the captions" in reason and "% better" not in reason


@pytest.mark.parametrize(("mean", "pictures"), [(-0.013, 5), (-0.021, 3), (-0.051, 1)])
def test_an_improvement_just_large_enough_to_measure_is_one(mean, pictures):
    assert "is recommended" in suggested(run(-0.001, mean, pictures=pictures, bumps=(0.0,)))[1]


def test_with_no_pictures_kept_out_the_last_one_is_given_and_called_a_guess():
    assert suggested(unmeasured(100, 200)) == (
        200,
        "No pictures were kept out of training, so step 200, the last, is only a guess.",
    )


def test_checkpoints_without_a_measurement_are_passed_over():
    checkpoints = run(-0.1, -0.2)
    more = (*checkpoints.entries, Checkpoint(300, "/300", "300"))
    assert suggested(Checkpoints("x", "/", "", more, checkpoints.base_validation))[0] == 200


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
def test_a_loss_that_is_no_proper_number_is_not_compared(broken):
    checkpoints = run(-0.1, -0.2, -0.05)
    entries = list(checkpoints.entries)
    entries[1].validation[0][0] = broken
    assert [entry.step for entry in scored(checkpoints)] == [100, 300]
    assert suggested(checkpoints)[0] == 100
    checkpoints.base_validation[0][0] = broken
    assert scored(checkpoints) == [] and "only a guess" in suggested(checkpoints)[1]


def test_the_last_one_is_given_when_it_is_asked_for():
    choice = choose(run(-0.2, -0.1), LAST, 0, BALANCED)
    assert (choice.checkpoint.step, choice.reason) == (200, "Step 200 is the last checkpoint.")


def test_the_one_at_a_step_is_given_when_it_is_asked_for():
    assert choose(run(-0.2, -0.1), AT_STEP, 100, BALANCED).checkpoint.step == 100


def test_a_step_without_a_checkpoint_is_answered_with_those_there_are():
    with pytest.raises(ValueError) as error:
        choose(run(-0.2, -0.1), AT_STEP, 150, BALANCED)
    assert str(error.value) == "The run 'x' has no checkpoint at step 150: choose one of 100, 200."


def test_a_run_without_files_is_said_to_have_none():
    with pytest.raises(ValueError, match=r"^The run 'x' has no checkpoint left in '/loras/x': train again\.$"):
        choose(unmeasured(), SUGGESTED, 0, BALANCED)
