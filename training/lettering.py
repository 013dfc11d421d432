"""Text drawn into pictures: fonts, and words that fit into a width."""

from bisect import bisect_right
from contextlib import suppress
from functools import cache

from PIL import ImageFont

FONTS = ("segoeui.ttf", "arial.ttf", "Arial.ttf", "Helvetica.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf")


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """A font of the system, for captions in any European script; else Pillow's own, which knows little beyond ASCII."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most ``lines`` lines of at most ``width`` pixels; what does not fit is cut and ends in "…"."""
    wrapped, words = [""], text.split()
    while words:
        word = words.pop(0)
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        elif len(wrapped) == lines:
            wrapped[-1] = fitted(longer, font, width)
            break
        elif wrapped[-1]:
            wrapped.append("")
            words.insert(0, word)
        else:  # a word wider than a line is broken where it stops fitting
            fits = max(1, len(fitted(word, font, width)) - 1)
            wrapped[-1:] = [word[:fits], ""]
            words.insert(0, word[fits:])
    return wrapped


def fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut to end in "…" where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    # Halved, not shortened letter by letter: a caption can be as long as a file.
    fits = bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count] + "…"))
    return text[:fits].rstrip() + "…"
