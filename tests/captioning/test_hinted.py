"""Tags as hints."""

import pytest
from PIL import Image

from lora_workbench.captioning.captioner import Answer, CaptioningStopped
from lora_workbench.captioning.hinted import Hinted


class Answering:
    """Gives the answers it was made with, and remembers what it was asked."""

    follows_instructions = True

    def __init__(self, *answers, batch_size=1, writes_tags=False):
        self.answers, self.batch_size, self.writes_tags = list(answers), batch_size, writes_tags
        self.asked, self.closed = [], False

    def caption(self, images, instruction):
        self.asked.append(instruction)
        return [self.answers.pop(0) for _ in images]

    def close(self):
        self.closed = True


def test_the_model_is_told_what_the_tagger_sees_in_each_picture():
    tagger = Answering(Answer("fox, snow"), Answer(), Answer(error="too dark"), batch_size=4, writes_tags=True)
    model = Answering(Answer("A fox."), Answer("A hill."), Answer("Night."))
    both = Hinted(model, tagger)
    images = [Image.new("RGB", (4, 4))] * 3
    assert [answer.text for answer in both.caption(images, "Describe it.")] == ["A fox.", "A hill.", "Night."]
    assert "fox, snow" in model.asked[0] and model.asked[0].startswith("Describe it. ")
    assert model.asked[1:] == ["Describe it.", "Describe it."]
    assert both.batch_size == 4 and both.writes_tags is False
    both.close()
    assert model.closed and tagger.closed


def test_a_model_that_cannot_be_told_anything_stops_instead_of_leaving_the_hints_out():
    tagger, model = Answering(Answer("fox, snow"), writes_tags=True), Answering(Answer("A fox."))
    model.follows_instructions = False
    with pytest.raises(CaptioningStopped, match="set hints to 'none'"):
        Hinted(model, tagger).caption([Image.new("RGB", (4, 4))], "Describe it.")
