"""Find and replace in captions."""

import pytest

from lora_workbench.captioning.find_replace import replace_in


@pytest.mark.parametrize(
    ("caption", "find", "replacement", "result"),
    [
        ("a cat in a category, Cat", "cat", "dog", "a dog in a category, dog"),
        ("red hat, red shoes", "red hat", "blue hat", "blue hat, red shoes"),
        ("1girl, solo", "1girl", "woman", "woman, solo"),
        ("grün, Grünling", "GRÜN", "blau", "blau, Grünling"),
        (r"a \(b\) [c] .*", ".*", r"\1", r"a \(b\) [c] \1"),
        ("a (cat)", "(cat)", "[dog]", "a [dog]"),
        ("nothing here", "cat", "dog", "nothing here"),
    ],
)
def test_words_are_replaced_literally_and_whole(caption, find, replacement, result):
    assert replace_in(caption, find, replacement) == result


def test_parts_of_words_and_case_on_request():
    assert replace_in("category", "cat", "dog", whole_words=False) == "dogegory"
    assert replace_in("Cat cat", "cat", "dog", match_case=True) == "Cat dog"


@pytest.mark.parametrize(
    ("caption", "find", "result"),
    [
        ("solo, red hat, smile", "red hat", "solo, smile"),
        ("red hat, smile", "red hat", "smile"),
        ("smile, red hat", "red hat", "smile"),
        ("a man with a red hat.", "with a red hat", "a man."),
        ("a big red hat", "big", "a red hat"),
        ("one, two\ntwo\nthree", "two", "one\nthree"),
        ("watermark", "watermark", ""),
    ],
)
def test_what_is_removed_leaves_no_commas_or_blanks_behind(caption, find, result):
    assert replace_in(caption, find, "") == result


def test_a_caption_without_it_stays_as_it_is_to_the_last_blank():
    assert replace_in("odd ,  spacing,, kept ", "cat", "") == "odd ,  spacing,, kept "


def test_an_empty_search_is_refused():
    with pytest.raises(ValueError, match="nothing to find"):
        replace_in("a", "", "b")
