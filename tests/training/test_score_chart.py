"""The gain by step and by picture as charts, and what is said about single pictures."""

import math
from dataclasses import replace

import numpy
import pytest
from PIL import Image, ImageColor

from lora_workbench.training.checkpoint import Checkpoint
from lora_workbench.training.figures import HEIGHT, INK, RED, WIDTH
from lora_workbench.training.picking import BALANCED, Decision, decide
from lora_workbench.training.score_chart import BLUE, FAINT, GREEN, SAFE, curve, heat_map, reading
from lora_workbench.training.scores import Score, Scored

BASE_LOSSES = [0.1, 0.2, 0.3]


def losses(values: list[float]) -> list[list[float]]:
    """Losses whose D are these."""
    return [[loss * math.exp(value) for loss in BASE_LOSSES] for value in values]


def one(step: int, held_out: list[float], training: list[float], average: str = "") -> Scored:
    return Scored(Checkpoint(step, "", f"{step}{average}", average=average), Score(losses(held_out), losses(training)))


def base(held_out: int, training: int) -> Score:
    return Score(losses([0.0] * held_out), losses([0.0] * training))


def run(pictures: dict[str, list[float]], held_out: int = 0) -> tuple[list[Scored], Score, list[str]]:
    """A run from D of each picture in each file, every hundred steps; the first `held_out` were not trained on."""
    files = [list(column) for column in zip(*pictures.values(), strict=True)]
    scored = [one(100 * n, values[:held_out], values[held_out:]) for n, values in enumerate(files, start=1)]
    return scored, base(held_out, len(pictures) - held_out), list(pictures)


LEARNED = {name: [-0.05, -0.1, -0.15, -0.17] for name in "abc"}


def read(held_out: int = 0, **more: list[float]) -> list[str]:
    return reading(*run({**LEARNED, **more}, held_out))


def count(picture: Image.Image, colour: str) -> int:
    return int((numpy.asarray(picture)[70:] == ImageColor.getrgb(colour)).all(-1).sum())


RISING = [one(100 * n, [-0.04 * n, -0.05 * n], [-0.08 * n] * 2) for n in (1, 2, 3)]


def test_pictures_that_learn_alike_are_no_news():
    assert read(d=[-0.04, -0.08, -0.13, -0.2]) == []
    assert read(held_out=4, d=[-0.04, -0.08, -0.13, -0.2]) == []


def test_a_picture_that_gets_worse_late_while_the_others_improve_is_named_as_hurt():
    (sentence,) = read(late=[-0.05, -0.02, 0.03, 0.06])
    assert sentence.startswith("late is 6 % worse than with the untrained model in the later files while the other tr")
    assert read(early=[0.06, -0.05, -0.1, -0.12]) == []


def test_when_all_pictures_get_worse_none_is_blamed():
    rising = [-0.05, -0.02, 0.03, 0.06]
    assert reading(*run({name: rising for name in "abcd"}, held_out=4)) == []


def test_held_out_pictures_are_not_compared_with_those_that_were_trained_on():
    """An over-trained run: what is kept out gets worse, and what is trained on better."""
    worse = {f"kept {n}": [-0.05, -0.02, 0.03, 0.06] for n in range(3)}
    assert reading(*run({**worse, **LEARNED}, held_out=3)) == []


def test_a_picture_that_no_file_improves_is_named_for_its_caption():
    (sentence,) = read(wrong=[0.0, 0.02, 0.04, 0.05])
    assert sentence.startswith(
        "wrong does not improve in any file although the other training pictures do: the caption"
    )
    (sentence,) = read(held_out=4, wrong=[0.01, 0.0, 0.0, 0.01])
    assert "the other pictures kept out of training do" in sentence


def test_a_picture_learned_far_more_than_the_others_is_named_as_memorised():
    (sentence,) = read(copied=[-0.2, -0.35, -0.5, -0.6])
    assert sentence.startswith("copied is learned far more than the other training pictures (45 % against 16 %) and")
    assert read(held_out=4, easy=[-0.2, -0.35, -0.5, -0.6]) == [], "nothing is memorised that was not seen"


def test_where_the_others_differ_too_a_picture_must_stand_out_more():
    spread = {"a": [-0.05], "b": [-0.15], "c": [-0.3], "d": [-0.4], "e": [-0.55]}
    assert reading(*run(spread)) == []


def test_several_pictures_are_named_in_one_sentence_and_many_are_counted():
    flat = [0.0] * 4
    more = {name: LEARNED["a"] for name in "defgh"}
    (sentence,) = read(one=flat, two=flat, **more)
    assert sentence.startswith("one and two do not improve")
    (sentence,) = read(one=flat, two=flat, three=flat, four=flat, five=flat, **more)
    assert sentence.startswith("one, two, three and 2 more do not improve")


def test_of_one_or_two_pictures_nothing_is_said():
    assert reading(*run({"a": LEARNED["a"], "wrong": [0.0, 0.1, 0.1, 0.1]})) == []


def test_averages_and_broken_files_do_not_enter_the_reading():
    scored, untrained, names = run({**LEARNED, "d": LEARNED["a"]})
    harmed = [0.0, 0.0, 0.0, 0.5]
    broken = Scored(Checkpoint(500, "", "b"), Score(broken="it cannot be read"))
    assert reading([broken, *scored, one(400, [], harmed, "EMA")], untrained, names) == []


def test_the_curve_shows_both_kinds_of_pictures_the_safe_range_and_the_pick():
    pick = RISING[1].checkpoint
    chart = curve(RISING, base(2, 2), Decision(pick, (pick, RISING[2].checkpoint), "levelled off", "medium", ""))
    assert chart.size == (WIDTH, HEIGHT)
    assert count(chart, RED) > 500 and count(chart, INK) > 500
    assert count(chart, SAFE) > 10_000 and count(chart, GREEN) > 100
    lonely = curve(RISING, base(2, 2), Decision(pick, (pick,), "levelled off", "medium", ""))
    assert count(lonely, SAFE) == 0 and count(lonely, GREEN) > 100


def test_a_broken_file_is_crossed_out_and_an_average_is_a_point_of_its_own():
    broken = Checkpoint(300, "", "b")
    files = [*RISING[:2], Scored(broken, Score(broken="it cannot be read"))]
    plain = Decision(files[0].checkpoint, (files[0].checkpoint,), "levelled off", "medium", "")
    crossed = curve(files, base(2, 2), replace(plain, broken=(broken,)))
    assert count(crossed, FAINT) > count(curve(files, base(2, 2), plain), FAINT)
    averaged = curve([*files, one(200, [-0.3] * 2, [-0.3] * 2, "EMA")], base(2, 2), plain)
    assert averaged.tobytes() != curve(files, base(2, 2), plain).tobytes()


def test_a_picture_better_than_the_base_is_blue_and_a_worse_one_red():
    better, worse = run({"a": [-0.2, -0.2]}), run({"a": [0.2, 0.2]})
    assert count(heat_map(*better), BLUE) > 1000 and count(heat_map(*better), RED) == 0
    assert count(heat_map(*worse), RED) > 1000 and count(heat_map(*worse), BLUE) == 0
    same = heat_map(*run({"a": [0.0, 0.0]}))
    assert count(same, RED) == count(same, BLUE) == 0


def test_the_heat_map_holds_every_picture_file_and_sentence():
    few, many = run(LEARNED), run({f"{n}": [-0.1] * 60 for n in range(12)}, held_out=4)
    assert heat_map(*many).height > heat_map(*few).height and heat_map(*many).width > WIDTH
    told = run({**LEARNED, "wrong": [0.0] * 4})
    silent = run({**LEARNED, "d": LEARNED["a"]})
    assert heat_map(*told).height > heat_map(*silent).height


@pytest.mark.parametrize(
    ("files", "pictures"),
    [
        ([], (0, 0)),
        ([one(100, [], [])], (0, 0)),
        ([one(100, [-0.1], [])], (1, 0)),
        ([one(100, [0.3], [0.3])], (1, 1)),
        ([one(100, [], [-0.1]), one(200, [], [])], (0, 1)),
        ([one(100, [math.inf], [-0.1]), one(200, [-0.1], [math.nan])], (1, 1)),
        ([one(100, [-0.1] * 2, []), one(200, [-0.1], [])], (2, 0)),
        ([one(0, [0.0], [0.0])], (1, 1)),
        ([one(1_000_000, [1e-9], [-5.0])], (1, 1)),
        ([Scored(Checkpoint(100, "", "a"), Score(broken="it cannot be read"))], (2, 2)),
    ],
    ids=str,
)
def test_whatever_was_measured_gives_pictures(files, pictures):
    untrained, names = base(*pictures), [f"{n}.png" for n in range(sum(pictures))]
    pick = Checkpoint(100, "", "a")
    decision = Decision(pick, (pick,), "guess", "low", "", ())
    assert curve(files, untrained, decision).size == (WIDTH, HEIGHT)
    assert heat_map(files, untrained, names).width >= WIDTH
    assert reading(files, untrained, names) == []


def test_a_decision_of_the_picker_can_be_drawn():
    assert curve(RISING, base(2, 2), decide(RISING, base(2, 2), BALANCED)).size == (WIDTH, HEIGHT)


def test_names_of_pictures_that_nobody_measured_make_no_rows():
    """The trainer measured the first held-out pictures only; more were connected since."""
    scored, untrained, names = run({"a": [-0.1], "b": [-0.1]}, held_out=2)
    assert heat_map(scored, untrained, [*names, "new.png"]).size == heat_map(scored, untrained, names).size


def test_names_in_other_scripts_and_of_any_length_fit():
    names = ["Zoë " * 60, "写真.png", ""]
    scored, untrained, _ = run({"a": [-0.1], "b": [-0.1], "c": [-0.1]})
    assert heat_map(scored, untrained, names).width == WIDTH
