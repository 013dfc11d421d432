"""What is wrong with one caption, and what is not."""

import pytest

from lora_workbench.training.doctor.captions import lint, looks_like_a_sentence, looks_like_tags, tags_of

SENTENCE = "A photo of zork woman in a red coat on a wet street at night."
TAGS = "zork, 1girl, solo, red_coat, wet street, night"


def kinds(caption, trigger="zork", style=""):
    return [kind for kind, _ in lint(caption, trigger, style)]


@pytest.mark.parametrize(
    "caption",
    [
        SENTENCE,
        TAGS,
        "zork",
        "",
        "zork reads a letter that says I love you.",
        "In the picture frame on the wall is zork.",
        "zork holds a sign (closed), 50% off",
        "zork, its certainly odd hat",
        "The image of zork in a mirror",
    ],
)
def test_a_good_caption_is_left_alone(caption):
    assert kinds(caption, "zork" if caption else "") == []


@pytest.mark.parametrize(
    ("caption", "kind"),
    [
        ("zork. I'm sorry, I can't help with that.", "refusal"),
        ("As an AI language model, I see zork.", "refusal"),
        ("I am unable to describe zork", "refusal"),
        ("I\u2019m really sorry zork", "refusal"),
        ("This image shows zork at the sea.", "boiler-plate"),
        ("In this photo, zork smiles.", "boiler-plate"),
        ("The photograph depicts zork.", "boiler-plate"),
        ("Here is a caption for training: zork runs.", "boiler-plate"),
        ("Sure! zork runs.", "boiler-plate"),
        ("Caption: zork runs.", "boiler-plate"),
        ("zork runs<loc_1><loc_20>", "mark-up"),
        ("zork runs</s>", "mark-up"),
        ("zork runs<|im_end|>", "mark-up"),
        ("**zork** runs", "mark-up"),
        ("a woman runs", "trigger missing"),
        ("zorks run", "trigger missing"),
        ("zork beside Zork", "trigger twice"),
    ],
)
def test_what_is_wrong_is_named(caption, kind):
    assert kinds(caption) == [kind]


def test_tags_and_sentences_are_told_apart():
    assert looks_like_tags(TAGS) and not looks_like_a_sentence(TAGS)
    assert looks_like_a_sentence(SENTENCE) and not looks_like_tags(SENTENCE)
    commas = "A man in a coat, with a dog, is walking, while the sun sets, behind the hills"
    assert looks_like_a_sentence(commas) and not looks_like_tags(commas)
    for undecided in ("zork", "zork, night", "zork runs fast"):
        assert not looks_like_tags(undecided) and not looks_like_a_sentence(undecided)


def test_only_the_other_style_is_named():
    assert kinds(TAGS, style="sentences") == ["tags, not a sentence"]
    assert kinds(SENTENCE, style="tags") == ["a sentence, not tags"]
    assert kinds(TAGS, style="tags") == kinds(SENTENCE, style="sentences") == []


def test_every_message_is_a_sentence():
    for caption in ("I'm sorry zork zork</s>", "This image shows zork", "x"):
        assert all(said.endswith(".") for _, said in lint(caption, "zork"))


def test_tags_are_compared_without_their_spelling():
    assert tags_of("Red_Hair,  blue  eyes,\n, RED hair") == ["red hair", "blue eyes", "red hair"]
