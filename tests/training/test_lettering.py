"""Words fit where they are put."""

import pytest
from PIL import ImageFont

from lora_workbench.training.lettering import font, wrap

FONT = ImageFont.load_default(14)


@pytest.mark.parametrize(
    "text", ["", "short", "word " * 60, "w" * 500, "short " + "w" * 90 + " end", "\u6c34" * 80, "a\nb\tc  d"]
)
def test_wrapped_text_fits(text):
    lines = wrap(text, FONT, 200, 4)
    assert 1 <= len(lines) <= 4 and all(FONT.getlength(line) <= 200 for line in lines)
    if FONT.getlength(" ".join(text.split())) > 4 * 200:
        assert lines[-1].endswith("…")
    else:
        assert "".join(lines).replace(" ", "") == "".join(text.split())


@pytest.mark.skipif(font(14).getname()[0] == "Aileron", reason="no font of the system to be found")
def test_letters_beyond_ascii_are_drawn_as_themselves():
    def drawn(letter):
        return bytes(font(14).getmask(letter))

    assert len({drawn(letter) for letter in "üßéЖλ"} | {drawn("\uffff")}) == 6


def test_a_word_as_long_as_a_file_does_not_hold_up_the_sheet():
    asked = []

    class Font:
        def getlength(self, text):
            asked.append(text)
            return len(text)

    assert wrap("a" * 100_000, Font(), 10, 2) == ["a" * 9, "a" * 9 + "…"]
    assert len(asked) < 100
