from collections import Counter
from pathlib import Path

import pytest

from lora_workbench.training.dataset import Example
from lora_workbench.training.wording import Wording, text_of, texts_of

TAGS = "zork, red, coat, street, night"


def example(caption=TAGS, *variants, trigger_word="zork"):
    return Example(Path("1.png"), caption, 64, 64, variants=variants, trigger_word=trigger_word)


def drawn(example, wording, count=2000, seed=0):
    return [text_of(example, wording, seed, number, 0) for number in range(count)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_first", -1), ("tag_dropout", 1.1), ("caption_dropout", -0.1), ("caption_dropout", float("nan"))]
    + [("most_texts", 0)],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be between"):
        Wording(**{name: value})


@pytest.mark.parametrize("caption", [TAGS, "A photo of zork,\nstanding  there .", ""])
def test_as_it_stands_a_caption_is_trained_verbatim(caption):
    assert texts_of(example(caption), Wording()) == (caption,)
    assert set(drawn(example(caption), Wording(), 50)) == {caption}


def test_several_captions_of_a_picture_come_equally_often():
    several = example("one", "two", "three")
    assert texts_of(several, Wording()) == ("one", "two", "three")
    counts = Counter(drawn(several, Wording(), 6000))
    assert all(1850 < counts[text] < 2150 for text in ("one", "two", "three"))
    assert texts_of(several, Wording(most_texts=2)) == ("one", "two")
    assert set(drawn(several, Wording(most_texts=2), 100)) == {"one", "two"}


def test_shuffling_keeps_all_tags_and_the_first_ones_in_front():
    texts = texts_of(example(), Wording(shuffle_tags=True, keep_first=2))
    assert set(texts) == {f"zork, red, {rest}" for rest in _orders("coat", "street", "night")}
    assert all(text.startswith("zork, ") for text in texts_of(example(), Wording(shuffle_tags=True)))
    assert any(not text.startswith("zork, ") for text in texts_of(example(), Wording(shuffle_tags=True, keep_first=0)))


def _orders(*tags):
    return [", ".join((a, b, c)) for a in tags for b in tags for c in tags if len({a, b, c}) == 3]


def test_every_tag_but_the_kept_ones_is_left_out_as_often_as_asked():
    texts = [texts_of(example(f"zork, {n}, b, c"), Wording(tag_dropout=0.3, most_texts=100)) for n in range(30)]
    assert all(text.startswith("zork") for few in texts for text in few)
    draws = [text for n in range(30) for text in drawn(example(f"zork, {n}, b, c"), Wording(tag_dropout=0.3), 300)]
    assert sum(text.endswith(", c") for text in draws) / len(draws) == pytest.approx(0.7, abs=0.05)


def test_the_tag_with_the_trigger_word_is_never_left_out():
    wording = Wording(tag_dropout=1, keep_first=1)
    assert texts_of(example("1girl, red, Zork woman, night"), wording) == ("1girl, Zork woman",)
    assert texts_of(example("1girl, red, night", trigger_word=""), wording) == ("1girl",)


def test_the_texts_of_a_picture_are_bounded_and_are_all_that_is_ever_asked_for():
    many = example(", ".join(map(str, range(30))), "other, tags, here")
    wording = Wording(shuffle_tags=True, tag_dropout=0.2, caption_dropout=0.1)
    texts = texts_of(many, wording)
    assert len(texts) == len(set(texts)) <= 33 and "" in texts
    assert len({tuple(sorted(text.split(", "))) for text in texts}) > 10
    assert set(drawn(many, wording)) == set(texts)


def test_observed_caption_dropout_over_10_000_draws_is_within_1_percent_of_the_setting():
    for rate in (0.05, 0.1, 0.5):
        wording = Wording(shuffle_tags=True, caption_dropout=rate)
        draws = [text_of(example(), wording, 3, number, place) for number in range(2500) for place in range(4)]
        assert draws.count("") / len(draws) == pytest.approx(rate, abs=0.01)
    assert "" not in texts_of(example(), Wording()) and texts_of(example(), Wording(caption_dropout=1))[-1] == ""


def test_a_text_depends_on_seed_number_and_place_only():
    wording = Wording(shuffle_tags=True)
    assert drawn(example(), wording, 50) == drawn(example(), wording, 50)
    places = [text_of(example(), wording, 0, 0, place) for place in range(50)]
    assert len({tuple(drawn(example(), wording, 50)), tuple(drawn(example(), wording, 50, seed=1)), tuple(places)}) == 3


def test_the_texts_are_the_same_on_every_machine():
    assert texts_of(example("a, b, c, d"), Wording(shuffle_tags=True, most_texts=3)) == (
        "a, b, d, c",
        "a, d, b, c",
        "a, c, b, d",
    )


def test_another_rate_changes_only_the_texts_it_has_to():
    before = texts_of(example(), Wording(shuffle_tags=True, tag_dropout=0.10))
    after = texts_of(example(), Wording(shuffle_tags=True, tag_dropout=0.12))
    assert len(set(after) - set(before)) < len(after) / 3
