"""Which checkpoint is chosen, and what is said about it, from made-up losses on kept-out pictures."""

import math
import random
from dataclasses import replace

import pytest

from lora_workbench.training.checkpoint import EMA, Checkpoint, Checkpoints
from lora_workbench.training.picking import (
    AT_STEP,
    BALANCED,
    FLEXIBLE,
    LAST,
    LIKENESS,
    SUGGESTED,
    choose,
    decide,
    measured_of,
    recommended_strength,
    why_broken,
)
from lora_workbench.training.scores import Score, Scored, differences, percent_better

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
    assert percent_better(checkpoints.entries[0].validation, checkpoints.base_validation) == pytest.approx(
        9.516, abs=1e-3
    )
    worse = run(0.1, bumps=(0.0,))
    assert percent_better(worse.entries[0].validation, worse.base_validation) == pytest.approx(-10.517, abs=1e-3)


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
        ((0.03, 0.02, 0.04), 5, BUMPS),
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
    assert [entry.step for entry in measured_of(checkpoints)] == [100, 300]
    assert suggested(checkpoints)[0] == 100
    checkpoints.base_validation[0][0] = broken
    assert measured_of(checkpoints) == [] and "only a guess" in suggested(checkpoints)[1]


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


# The whole decision


def scored_run(*means, averages=(), training=(), pictures=5, bumps=(0.0,), broken=None):
    """Scores at steps 100, 200, ... with these H, averages as (step, name, H), T of the training pictures."""
    base = [[1.0, 2.0]] * pictures

    def losses(mean, turn=0):
        if mean is None:
            return []
        return [[level * math.exp(mean + bumps[(n + turn) % len(bumps)]) for level in base[n]] for n in range(pictures)]

    learned = list(training) or [None] * len(means)
    entries = [
        Scored(Checkpoint(100 * number, f"/{number}", f"{number}"), Score(losses(mean, number), losses(fit)))
        for number, (mean, fit) in enumerate(zip(means, learned, strict=True), start=1)
    ]
    entries += [
        Scored(Checkpoint(step, f"/{name}", f"{step} {name}", average=name), Score(losses(mean)))
        for step, name, mean in averages
    ]
    for number, why in (broken or {}).items():
        entries[number - 1] = replace(entries[number - 1], score=Score(broken=why))
    held_out = base if any(mean is not None for mean in means) else []
    return entries, Score(held_out, base if training else [])


def decided(*means, preference=BALANCED, likeness=None, **given):
    return decide(*scored_run(*means, **given), preference, likeness)


def told(decision):
    return decision.kind, decision.checkpoint.step


def test_a_curve_that_turns_up_is_called_over_trained_with_what_the_training_pictures_did():
    means, training = (-0.05, -0.14, -0.2, -0.12, -0.02), (-0.1, -0.2, -0.3, -0.4, -0.5)
    decision = decided(*means, training=training)
    assert told(decision) == ("over-trained later", 300) and decision.confidence == "high"
    assert decision.reason == (
        "Step 300 is recommended. On 5 pictures kept out of training it is 18 % better than the base model. "
        "After step 300 the training pictures kept improving but the kept-out ones got worse, so later files copy "
        "more than they learn."
    )
    assert "training pictures kept" not in decided(*means, training=training[::-1]).reason


def test_a_curve_that_still_falls_says_that_training_stopped_early():
    decision = decided(-0.05, -0.1, -0.15, -0.2)
    assert told(decision) == ("still improving", 400)
    assert "training stopped early. Train about 50 % longer." in decision.reason


def test_a_curve_that_stays_level_names_the_files_that_are_equal():
    decision = decided(-0.1, -0.199, -0.2, -0.1995, -0.1992, -0.1991)
    assert told(decision) == ("levelled off", 300) and decision.confidence == "medium"
    assert [entry.step for entry in decision.safe] == [200, 300, 400, 500, 600]
    assert "Files 200 to 600 are equal within measuring error; the earliest is the most flexible." in decision.reason


def test_steps_of_thousands_have_commas():
    entries, base = scored_run(-0.1, -0.2, -0.1)
    entries = [replace(e, checkpoint=replace(e.checkpoint, step=10 * e.checkpoint.step)) for e in entries]
    assert decide(entries, base, BALANCED).reason.startswith("Step 2,000 is recommended.")


@pytest.mark.parametrize(
    ("means", "kind"),
    [
        ((-0.1, -0.2, -0.3, -0.36, -0.37, -0.38, -0.39), "still improving"),
        ((-0.1, -0.2, -0.3, -0.384, -0.386, -0.388, -0.39), "levelled off"),
        ((-0.1, -0.3, -0.28, -0.272), "levelled off"),
        ((-0.1, -0.3, -0.28, -0.268), "over-trained later"),
        ((-0.02, -0.05, -0.045, -0.041), "levelled off"),
        ((-0.02, -0.05, -0.045, -0.039), "over-trained later"),
        ((-0.2, -0.3), "levelled off"),
    ],
    ids=[
        "the last three steps gained 5 %",
        "the last three steps gained 1.5 %",
        "rose by less than a tenth of what was learned",
        "rose by more than a tenth",
        "rose by less than 0.01",
        "rose by more than 0.01",
        "two files tell no story",
    ],
)
def test_the_verdict_follows_its_formula(means, kind):
    assert decided(*means).kind == kind


def test_a_rise_within_two_standard_errors_is_no_over_training():
    apart = (0.0, 0.06, -0.06, 0.03, -0.03)
    assert decided(-0.1, -0.3, -0.25).kind == "over-trained later"
    assert decided(-0.1, -0.3, -0.25, bumps=apart).kind != "over-trained later"


@pytest.mark.parametrize(
    ("pictures", "means", "confidence"),
    [
        (4, (-0.1, -0.3, -0.1), "high"),
        (4, (-0.1, -0.3, -0.299), "medium"),
        (3, (-0.1, -0.3, -0.1), "medium"),
        (2, (-0.1, -0.3, -0.1), "medium"),
        (1, (-0.1, -0.3, -0.1), "low"),
    ],
)
def test_the_confidence_grows_with_the_pictures_and_shrinks_with_the_safe_range(pictures, means, confidence):
    assert decided(*means, pictures=pictures).confidence == confidence


KINDS = {
    "nothing learned": lambda t: 0.01 * t,
    "still improving": lambda t: -0.2 * t**0.8,
    "levelled off": lambda t: -0.2 * (1 - math.exp(-7 * t)),
    "over-trained later": lambda t: -0.2 * (1 - math.exp(-9 * t)) + 0.25 * max(0.0, t - 0.4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pictures", "least"), [(8, 0.8), (4, 0.75), (2, 0.6)])
def test_verdicts_on_simulated_curves_are_mostly_right(kind, pictures, least):
    """Twelve checkpoints, pictures that gain differently, noise of 0.01 a picture."""
    draw, right = random.Random(f"{kind} {pictures}"), 0
    for _ in range(60):
        gains = [1 + 0.3 * draw.gauss(0, 1) for _ in range(pictures)]
        entries = [
            Scored(
                Checkpoint(100 * k, "", f"{k}"),
                Score([[math.exp(KINDS[kind](k / 12) * gain + draw.gauss(0, 0.01))] for gain in gains]),
            )
            for k in range(1, 13)
        ]
        right += decide(entries, Score([[1.0]] * pictures), BALANCED).kind == kind
    assert right >= least * 60


def test_an_average_is_picked_when_it_is_best_and_the_verdict_stays_that_of_the_training():
    decision = decided(-0.05, -0.14, -0.2, -0.12, averages=[(300, EMA, -0.25), (400, "last 3", -0.1)])
    assert decision.checkpoint.average == EMA and decision.kind == "over-trained later"
    assert decision.reason.startswith("Step 300, EMA is recommended. On 5 pictures")
    assert [(entry.step, entry.average) for entry in decision.safe] == [(300, EMA)]
    lasting = decided(-0.05, -0.14, -0.2, averages=[(300, "last 3", -0.25)])
    assert lasting.reason.startswith("The average of the last 3 is recommended.") and lasting.kind == "still improving"


def test_an_average_as_good_as_the_best_is_in_the_safe_range_but_does_not_bridge_a_gap():
    decision = decided(-0.199, -0.1, -0.2, averages=[(200, EMA, -0.199)])
    assert [(entry.step, entry.average) for entry in decision.safe] == [(200, EMA), (300, "")]
    assert "Files" not in decision.reason


def test_likeness_takes_the_most_alike_of_the_equal_ones_and_never_one_that_copies():
    means = (-0.02, -0.197, -0.2, -0.199, -0.05)
    likeness = {"1": 0.95, "2": 0.8, "3": 0.7, "5": 0.99}
    assert decided(*means, preference=LIKENESS, likeness=likeness).checkpoint.step == 200, "4 is left out as a copy"
    assert decided(*means, preference=LIKENESS, likeness={"5": 0.9}).checkpoint.step == 400
    assert decided(*means, preference=BALANCED, likeness=likeness).checkpoint.step == 300


def test_broken_files_are_left_out_and_listed():
    decision = decided(-0.1, -0.2, 0.51, None, math.nan, broken={4: "it cannot be read"})
    assert decision.checkpoint.step == 200 and [entry.step for entry in decision.broken] == [300, 400, 500]
    entries, base = scored_run(-0.1, -0.2, 0.51, None, math.nan, 0.49, broken={4: "it cannot be read"})
    assert [why_broken(entry.score, base) for entry in entries] == [
        "",
        "",
        "it makes the loss 67 % higher",
        "it cannot be read",
        "its loss is not a number",
        "",
    ]


def test_when_no_file_can_be_used_one_is_named():
    everyone = {1: "it cannot be read", 2: "it changes no weight"}
    with pytest.raises(ValueError, match=r"^None of the 2 LoRA files can be used \('1': it cannot be read\): train"):
        decided(-0.1, -0.2, broken=everyone)
    with pytest.raises(ValueError, match=r"^The LoRA file cannot be used \('1': it cannot be read\)"):
        decided(-0.1, broken={1: "it cannot be read"})
    with pytest.raises(ValueError, match="^There is no LoRA file to choose from"):
        decide([], Score(), BALANCED)


def test_when_every_file_does_harm_the_model_and_the_words_are_questioned():
    decision = decided(0.9, 0.6, 0.8)
    assert told(decision) == ("nothing learned", 200) and decision.confidence == "low"
    assert "step 200 is only the least bad: is this the model they were trained on" in decision.reason
    assert [entry.step for entry in decision.broken] == [100, 300]


@pytest.mark.parametrize(
    ("preference", "step", "share"), [(FLEXIBLE, 200, 50), (BALANCED, 300, 75), (LIKENESS, 400, 90)]
)
def test_without_kept_out_pictures_the_first_file_with_a_share_of_the_training_gain_is_a_guess(preference, step, share):
    decision = decided(*[None] * 5, training=(-0.1, -0.21, -0.31, -0.37, -0.4), preference=preference)
    assert told(decision) == ("guess", step) and decision.confidence == "low"
    assert decision.reason == (
        f"No pictures were kept out, so step {step} is a rough guess from the training pictures: the first file with "
        f"{share} % of what the best one gains on them."
    )


def test_without_any_figures_the_last_is_a_guess():
    decision = decided(None, None, averages=[(200, EMA, None)])
    assert told(decision) == ("guess", 200) and not decision.checkpoint.average and decision.confidence == "low"


def test_what_was_not_even_learned_on_training_pictures_is_said():
    decision = decided(None, None, training=(-0.001, -0.004))
    assert decision.kind == "nothing learned" and "even on 5 pictures that were trained on" in decision.reason


@pytest.mark.parametrize(
    ("means", "strength"),
    [
        ({0.25: -0.1, 0.5: -0.2, 0.75: -0.3, 1.0: -0.25, 1.25: -0.1}, 0.75),
        ({0.25: -0.1, 0.5: -0.12, 0.75: -0.15, 1.0: -0.2, 1.25: -0.3}, 1.25),
        ({0.75: -0.2, 1.0: -0.2, 1.25: -0.2}, 1.0),
        ({0.25: 0.01, 0.5: 0.1, 1.0: 0.5}, 1.0),
    ],
    ids=["lower", "higher", "all the same", "never better than the base"],
)
def test_the_recommended_strength_is_the_one_with_the_lowest_loss(means, strength):
    base = [[1.0, 2.0]]
    measured = {at: [[level * math.exp(mean) for level in base[0]]] for at, mean in means.items()}
    assert recommended_strength(measured, base) == (strength, "")


def test_a_low_best_strength_hints_at_over_training():
    measured = {0.25: [[0.9]], 0.5: [[0.8]], 1.0: [[1.2]]}
    best, hint = recommended_strength(measured, [[1.0]])
    assert best == 0.5
    assert hint.startswith("It does best at strength 0.5") and hint.endswith("or pick an earlier checkpoint.")


@pytest.mark.parametrize(
    ("means", "picked", "said"),
    [
        ((-0.2, -0.25, -0.24, 0.8, 0.9), 200, "the kept-out pictures got worse"),
        ((0.001, 0.1, 0.3, 0.4), 100, "is the least bad"),
        ((-0.001, 0.0, 0.2, 0.7), 100, "is the least bad"),
    ],
)
def test_files_that_end_far_worse_than_the_base_are_over_trained_ones(means, picked, said):
    checkpoints = run(*means)
    measured = [Scored(entry, Score(entry.validation)) for entry in checkpoints.entries]
    decision = decide(measured, Score(checkpoints.base_validation), BALANCED)
    assert (decision.checkpoint.step, decision.kind) == (picked, "over-trained later")
    assert said in decision.reason


def test_a_large_gain_on_pictures_that_disagree_is_a_guess_and_not_nothing():
    checkpoints = run(-0.1, -0.3, pictures=2, bumps=(0.3, -0.3))
    measured = [Scored(entry, Score(entry.validation)) for entry in checkpoints.entries]
    decision = decide(measured, Score(checkpoints.base_validation), BALANCED)
    assert (decision.checkpoint.step, decision.kind, decision.confidence) == (200, "guess", "low")
    assert decision.reason.startswith(
        "Step 200 is 26 % better than the base model on 2 pictures kept out of training, but"
    )
