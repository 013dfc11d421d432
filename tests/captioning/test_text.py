import pytest

from lora_workbench.captioning.text import clean, clean_tags, words_of_name

SAID = [
    ("This image shows a red fox in the snow.", "A red fox in the snow."),
    ("In this picture, a fox sleeps.", "A fox sleeps."),
    ("The photograph depicts two boats.", "Two boats."),
    ("Here is a short caption for your image: a red fox", "a red fox"),
    ('Sure! Here\'s the description: "A fox in the snow."', "A fox in the snow."),
    ("Certainly, here is a caption:\n\nThis image features a fox.", "A fox."),
    ("**Caption:** a fox\n on  a hill", "a fox on a hill"),
    ("<think>A fox? Yes.</think>\n\nA fox on a hill.", "A fox on a hill."),
    ("no closing\nthought</think> A fox.<|im_end|>", "A fox."),
    ("\u201cA fox.\u201d", "A fox."),
    ('A sign that says "OPEN"', 'A sign that says "OPEN"'),
    ('"A" and "B"', '"A" and "B"'),
    ("A fox \u2019tis", "A fox 'tis"),
    ("A woman at a desk. I cannot determine who she is. Warm light.", "A woman at a desk. Warm light."),
    ("the image of a saint on a wall", "the image of a saint on a wall"),
    ("a can of paint, an okay sign", "a can of paint, an okay sign"),
    ("   ", ""),
]


@pytest.mark.parametrize(("said", "caption"), SAID)
def test_only_the_caption_is_left(said, caption):
    assert clean(said) == caption


@pytest.mark.parametrize("said", [said for said, _ in SAID] + ["'\"This image shows: tags: fox\"'"])
def test_cleaning_twice_changes_nothing(said):
    assert clean(clean(said)) == clean(said)
    assert clean_tags(clean_tags(said)) == clean_tags(said)


@pytest.mark.parametrize(
    "said",
    [
        "I'm sorry, but I can't help with that. Please send another picture.",
        "I\u2019m unable to describe people.",
        "As an AI language model, I have no eyes.",
        "I cannot identify this person.",
    ],
)
def test_a_refusal_is_no_caption(said):
    assert clean(said) == ""


def test_tags_come_once_and_without_list_marks():
    said = "Tags:\n- fox\n- Snow\n2. snow\n* night, fox, , (red coat)."
    assert clean_tags(said) == "fox, Snow, night, (red coat)"


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("red_fox-02", "red fox"),
        ("red fox (3)", "red fox"),
        ("Müde Katze", "Müde Katze"),
        ("20240301_121314", "20240301"),
        ("007", ""),
    ],
)
def test_a_file_name_says_its_words_without_the_number_at_its_end(stem, words):
    assert words_of_name(stem) == words
