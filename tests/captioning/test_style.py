"""What is asked, by the style of the base model and the purpose of the LoRA."""

import pytest

from lora_workbench.captioning.style import PURPOSES, SENTENCES, STYLES, TAGS, instruction, style_of


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_question_is_a_plain_text_without_gaps(style, purpose):
    asked = instruction(style, purpose, "zork star")
    assert "{" not in asked and "  " not in asked
    assert "''" not in instruction(style, purpose)
    assert ("comma-separated" in asked) == (style == TAGS)


@pytest.mark.parametrize(
    ("purpose", "unsaid"),
    [
        ("person", "Call the person 'zork star' and say nothing about face"),
        ("object", "say nothing about its own shape, colour, material or brand"),
        ("style", "no medium, technique, colours, artist or art style"),
        ("concept", "do not explain it"),
        ("place", "say nothing about what is always there"),
    ],
)
def test_what_the_trigger_word_stands_for_is_left_unsaid(purpose, unsaid):
    assert unsaid in instruction(SENTENCES, purpose, "zork star")


def test_without_a_class_word_the_purpose_gives_one():
    assert "Call the person 'person'" in instruction(TAGS, "person")


@pytest.mark.parametrize(
    ("encoders", "style"),
    [
        ({"clip_l"}, TAGS),
        ({"clip_l", "clip_g"}, TAGS),
        ({"clip_h"}, TAGS),
        ({"clip_l", "t5xxl"}, SENTENCES),
        ({"clip_l", "clip_g", "t5xxl"}, SENTENCES),
        ({"qwen25_7b"}, SENTENCES),
        (set(), SENTENCES),
    ],
)
def test_a_model_that_reads_with_clip_alone_gets_tags_and_every_other_sentences(encoders, style):
    assert style_of(encoders) == style
