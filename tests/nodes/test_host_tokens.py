"""Captions are counted in the tokens of the text encoder that reads them."""

import hosttoys
import pytest
from comfy.text_encoders.flux import FluxTokenizer
from comfy.text_encoders.qwen_image import QwenImageTokenizer

from lora_workbench.nodes.host.tokens import TokenCounter, counter

pytestmark = pytest.mark.comfy


def test_without_a_clip_it_is_clip_l():
    count = counter()
    assert count.limit == 75
    assert (count(""), count("a cat"), count("a cat, a dog")) == (0, 2, 5)


def test_more_than_one_piece_is_counted_whole():
    assert counter()("cat " * 200) == 200


def test_brackets_are_letters():
    assert counter()("a (cat:1.5)") > counter()("a cat")


def test_of_two_encoders_the_one_that_reads_sentences_counts():
    flux = FluxTokenizer()
    count = TokenCounter(flux.tokenize_with_weights)
    assert count.limit == 512
    assert count("") == 0
    assert count("a cat on a mat") == len(flux.t5xxl.tokenizer("a cat on a mat")["input_ids"]) - 1


def test_an_instruction_around_the_text_does_not_count():
    count = TokenCounter(QwenImageTokenizer().tokenize_with_weights)
    assert count.limit == 512
    assert (count(""), count("cat"), count("cat cat")) == (0, 1, 2)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_the_wired_clip_is_asked(kind):
    count = counter(hosttoys.clip(kind))
    assert count("") == 0 < count("a red circle") < count("a red circle on a blue background")
    assert count.limit >= 75
