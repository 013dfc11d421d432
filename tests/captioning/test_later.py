"""A captioner that is opened when it is needed."""

import pytest
from captioners import Sizes, caption_folder
from PIL import Image

from lora_workbench.captioning.captioner import CaptioningStopped, summary
from lora_workbench.captioning.later import Later


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_nothing_is_opened_when_there_is_nothing_to_caption(picture):
    picture.with_suffix(".txt").write_text("mine")
    assert summary(caption_folder([picture], Later(pytest.fail))) == "0 written, 1 kept (yours), 0 failed"


def test_it_is_opened_once_and_closed(picture):
    opened = []
    later = Later(lambda: opened.append(Sizes(batch_size=4)) or opened[-1])
    assert (later.batch_size, later.writes_tags, later.follows_instructions) == (1, False, True)
    list(caption_folder([picture, picture], later, "replace everything"))
    assert len(opened) == 1 and later.batch_size == 4 and opened[0].closed == 1


def test_a_captioner_that_cannot_be_opened_ends_the_run_in_its_own_words(picture):
    def fail():
        raise ValueError("The caption model 'x' is not there.")

    with pytest.raises(CaptioningStopped, match="'x' is not there"):
        list(caption_folder([picture], Later(fail)))
