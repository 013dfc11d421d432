"""What is written of what was said: every rule, and that finishing twice changes nothing."""

import random
import time

import pytest

from lora_workbench.captioning.exclusion import Exclusion
from lora_workbench.captioning.finish import Finish
from lora_workbench.captioning.replacement import Replacements
from lora_workbench.captioning.style import SENTENCES, TAGS


def sentences(said, trigger="", class_word="", **rules):
    return Finish(SENTENCES, **rules)(said, trigger, class_word)


def tags(said, trigger="", class_word="", **rules):
    return Finish(TAGS, **rules)(said, trigger, class_word)


@pytest.mark.parametrize(
    ("said", "class_word", "caption"),
    [
        ("A woman in a red coat.", "woman", "ohwx woman in a red coat."),
        ("A man and a woman, the woman sits.", "woman", "A man and ohwx woman, the woman sits."),
        ("A young woman sits.", "woman", "A young ohwx woman sits."),
        ("In this picture, the woman's coat is red.", "woman", "ohwx woman's coat is red."),
        ("Two women sit.", "woman", "ohwx woman, Two women sit."),
        ("A house on a hill.", "", "ohwx, A house on a hill."),
        ("A photo of OHWX in snow.", "woman", "A photo of ohwx in snow."),
        ("ohwx woman and a woman.", "woman", "ohwx woman and a woman."),
        ("ohwxy is another word.", "", "ohwx, ohwxy is another word."),
    ],
)
def test_the_trigger_word_takes_the_place_of_the_article_or_comes_first_and_never_twice(said, class_word, caption):
    assert sentences(said, "ohwx", class_word) == caption


@pytest.mark.parametrize(
    ("said", "class_word", "caption"),
    [
        ("red coat, woman, street", "woman", "ohwx woman, red coat, street"),
        ("red coat, street", "", "ohwx, red coat, street"),
        ("red coat, Ohwx woman, street", "woman", "ohwx woman, red coat, street"),
        ("red coat, ohwx", "woman", "ohwx woman, red coat"),
    ],
)
def test_the_trigger_word_is_the_first_tag_with_its_class(said, class_word, caption):
    assert tags(said, "ohwx", class_word) == caption


def test_a_trigger_word_keeps_its_case_and_its_signs():
    assert sentences("A cat.", "<S0> McCat") == "<S0> McCat, A cat."
    assert tags("zork star, night", "zork_star") == "zork_star, zork star, night"
    assert tags("night", "ohwx, watercolour") == "ohwx, watercolour, night"


def test_a_trigger_word_that_is_in_the_prefix_is_not_put_in_again():
    assert sentences("A cat.", "ohwx", prefix="a photo in ohwx style,") == "a photo in ohwx style, A cat."
    assert tags("cat", "ohwx", prefix="ohwx style") == "ohwx style, cat"


def test_prefix_and_suffix_are_put_around_it_once():
    assert sentences("a photo of a cat", prefix="A photo of", suffix=", at night") == "A photo of a cat, at night"
    assert tags("solo, cat, score_9", "ohwx", prefix="score_9, best", suffix="solo") == "ohwx, score_9, best, cat, solo"


def test_sentences_with_excluded_words_are_dropped():
    said = "A cat. A large Watermark is seen. Film grain! The catalogue is red."
    rules = {"exclude": Exclusion.parse("watermark*, film grain, cat log")}
    assert sentences(said, **rules) == "A cat. The catalogue is red."
    assert sentences("A watermark.", **rules) == ""


def test_excluded_tags_are_dropped_by_word_by_wildcard_and_by_expression():
    exclude = Exclusion.parse("Solo, *background\n/\\d+girls?/\nrating:[s]")
    assert tags("1girl, solo, 2girls, night, white_background, rating:[s], girls", exclude=exclude) == "night, girls"
    assert tags("solo", exclude=exclude) == ""


def test_words_are_replaced_and_tags_as_a_whole():
    rules = {"replace": Replacements.parse("grey => gray\ncat => black cat\nsuddenly=>")}
    assert sentences("A grey cat suddenly sleeps by a black cat.", **rules) == "A gray black cat sleeps by a black cat."
    assert tags("cat, grey sky, Grey, suddenly", **rules) == "black cat, grey sky, gray"
    assert tags("cat", replace=Replacements.parse("cat => animal, four legs")) == "animal, four legs"


@pytest.mark.parametrize("typed", ["cat", "=> dog", "a => b\nc"])
def test_a_line_that_replaces_nothing_is_named(typed):
    with pytest.raises(ValueError, match="not of the form 'old => new'"):
        Replacements.parse(typed)


def test_lines_that_undo_each_other_are_named():
    with pytest.raises(ValueError, match="'a => the b' writes 'b', which another line replaces"):
        Replacements.parse("a => the b\nb => a")


@pytest.mark.parametrize(
    ("most_words", "caption"),
    [(0, "A cat sits. It is red. Snow falls."), (6, "A cat sits. It is red."), (5, "A cat sits."), (1, "A cat sits.")],
)
def test_a_long_caption_is_cut_to_whole_sentences(most_words, caption):
    assert sentences("A cat sits. It is red. Snow falls.", most_words=most_words) == caption


def test_a_long_list_is_cut_to_whole_tags_and_keeps_what_was_asked_for():
    rules = {"most_words": 4, "prefix": "best", "suffix": "at night", "keep_first": "solo"}
    assert tags("red coat, long hair, solo, street", "ohwx", **rules) == "ohwx, best, solo, at night"
    assert tags("red coat, long hair", "ohwx", most_words=3) == "ohwx, red coat"


def test_what_is_said_twice_is_written_once():
    assert sentences("A cat. It sleeps. a cat. It sleeps.") == "A cat. It sleeps."
    assert tags("cat, Cat, long_hair, long hair") == "cat, long hair"


def test_underscores_become_spaces_except_in_faces_and_brackets_stay():
    said = "long_hair, ^_^, (o)_(o), <|>_<|>, ;_;, saber_(fate), :d, ..."
    assert tags(said) == "long hair, ^_^, (o)_(o), <|>_<|>, ;_;, saber (fate), :d, ..."


def test_tags_that_are_to_be_first_are_first_where_there_are_any():
    assert tags("night, solo, 1girl", "ohwx", keep_first="1girl, 2girls, solo") == "ohwx, 1girl, solo, night"


def test_lead_ins_and_refusals_are_cleaned_before_the_trigger_word_is_put_in():
    assert sentences("Sure! Here is a caption: This image shows a woman.", "ohwx", "woman") == "ohwx woman."
    assert sentences("I'm sorry, I can't help with that.", "ohwx") == ""


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="Choose one of: sentences, tags"):
        Finish("verse")


@pytest.mark.parametrize(
    "expression",
    ["(a+)+", "(a|aa)*b", "((ab)*c)+", "(.*,)*x", "a*b*c*", "(a{1,50}){1,50}", "a?a?a?aaa", r"(a)\1", "(?:a)"]
    + ["(", "[", "a" * 201, "(?=a)", "*a"],
)
def test_an_expression_that_could_take_forever_or_is_none_is_refused(expression):
    with pytest.raises(ValueError, match="exclude: /.*/ cannot be used"):
        Exclusion.parse(f"/{expression}/")


@pytest.mark.parametrize("expression", [r"\d+girls?", "(red|blue) hat", r"film.*grain", "[+*]{2}", r"\(.+\)", "b|c"])
def test_an_ordinary_expression_is_allowed(expression):
    assert not Exclusion.parse(f"/{expression}/").has_sentence("A night.")


@pytest.mark.parametrize("expression", ["a*a*b", "a?a?a*a*b", "[ac]+[ac]+b", "(a{1,99})[ac]{1,99}b"])
def test_no_allowed_expression_takes_forever(expression):
    started = time.process_time()
    assert not Exclusion.parse(f"/{expression}/").has_sentence("a" * 5000)
    assert time.process_time() - started < 20


WORDS = ["a woman", "the cat", "ohwx", "OHWX woman", "zork_star", "red", "watermark", "solo", "1girl", "^_^", "grey"]
MARKS = ["", ",", ". ", "! ", ":", "\n", "\n- ", " ", "**", "</think>", "<loc_12>", '"', "'", ", ,", " - ", "\\,"]
LEADS = [
    "",
    "This image shows ",
    "Sure! ",
    "Tags: ",
    "Here is a caption: ",
    "I'm sorry, I cannot. ",
    "“",
    "a photo of ",
]
TRIGGERS = ["", "ohwx", "Ohwx woman", "zork_star", "<s0><s1>", "a, b", "this image"]
RULES = [
    {},
    {"prefix": "a photo of", "suffix": ", at night"},
    {"prefix": "score_9, Tags:", "suffix": "ohwx"},
    {"replace": Replacements.parse("grey => dark grey\nthe cat => a woman\nred =>")},
    {"exclude": Exclusion.parse("water*, red\n/^a .*/"), "keep_first": "solo, 1girl"},
    {"most_words": 3, "prefix": "one two", "suffix": "three four five"},
    {"most_words": 1, "exclude": Exclusion.parse("*woman*"), "replace": Replacements.parse("solo => one, two")},
]


@pytest.mark.parametrize("style", [SENTENCES, TAGS])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_finishing_a_finished_caption_changes_nothing(style, rules):
    draw, finish = random.Random(7), Finish(style, **rules)
    for _ in range(400):
        said = draw.choice(LEADS) + "".join(
            draw.choice(WORDS) + draw.choice(MARKS) + draw.choice(["", " "]) for _ in range(draw.randrange(8))
        )
        trigger, class_word = draw.choice(TRIGGERS), draw.choice(["", "woman", "cat"])
        once = finish(said, trigger, class_word)
        assert finish(once, trigger, class_word) == once, (said, trigger, class_word)
