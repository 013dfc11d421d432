"""What captions have in common."""

import planted
import pytest

from lora_workbench.training.doctor.vocabulary import repeated, style_of, tag_counts, tied

GOOD = [planted.sentence(number) for number in range(60)]


def test_varied_captions_have_nothing_in_common():
    assert tied(GOOD, planted.TRIGGER) == [] and repeated(GOOD) == []


def test_a_phrase_in_most_captions_is_named_at_its_longest():
    captions = [f"{caption[:-1]}, on a very red carpet." for caption in GOOD[:54]] + GOOD[54:]
    assert tied(captions, planted.TRIGGER) == [("very red carpet", 0.9)]


@pytest.mark.parametrize(("share", "named"), [(0.8, []), (0.81, [("smile", 0.81)])])
def test_a_tag_is_named_from_more_than_four_fifths_on(share, named):
    captions = [f"zork, thing {n}, other {n}" + (", smile" if n < 100 * share else "") for n in range(100)]
    assert tied(captions, "zork") == named


def test_the_trigger_and_its_class_are_meant_to_be_tied():
    captions = [caption.replace("zork", "zork woman") for caption in GOOD]
    assert tied(captions, "zork") == []
    assert [phrase for phrase, _ in tied(captions, "")] == ["zork woman"]
    stars = [f"{caption[:-1]} with a star." for caption in GOOD]
    assert tied(stars, "zork", "zork star") == [] and tied(stars, "zork") == [("star", 1.0)]


def test_few_captions_say_little():
    assert tied(["zork on a chair"] * 7, "zork") == [] and style_of(["zork, a, b"] * 7) == ""


def test_the_style_is_that_of_most_captions():
    tags = [f"zork, thing {number}, night" for number in range(8)]
    assert style_of(GOOD) == "sentences" and style_of(tags) == "tags"
    assert style_of(tags + GOOD[:8]) == ""


def test_the_same_caption_on_three_pictures_is_repeated():
    assert repeated(["a cat", "A  cat", "a dog", "a cow", "a hen", "a pig", "a fox", "an owl"]) == []
    assert repeated([*GOOD, "a cat", "A  cat", "a cat"]) == [("a cat", 3)]
    assert repeated(["a cat", "a cat", "a dog"]) == [("a cat", 2)]


def test_tags_are_counted_once_a_picture():
    assert tag_counts(["a, b, a", "A, c"]) == {"a": 2, "b": 1, "c": 1}
