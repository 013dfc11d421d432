"""One picture of a whole dataset: what is trained on, which part of it, at which size, and with which words."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from .buckets import bucket_for, bucket_sizes, crop_box
from .dataset import Dataset, Example, natural_key
from .images import open_image

MOST_PICTURES = 60
CELL, GAP, MARGIN = 264, 18, 24
CAPTION_LINES = 5
BACKGROUND, PANEL, TEXT, FAINT = "#202124", "#2b2d31", "#e8eaed", "#9aa0a6"
FONTS = ("segoeui.ttf", "arial.ttf", "Arial.ttf", "Helvetica.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf")
CROP, HELD_OUT, MISSING = "#ffd54f", "#64b5f6", "#ff8a65"


def draw(dataset: Dataset) -> Image.Image:
    """The contact sheet as an RGB picture: each example with its crop rectangle, file name, bucket and caption below.

    At most ``MOST_PICTURES`` are drawn, in the order of the folder, and the last line says how many there are besides.
    """
    examples = sorted(dataset.examples + dataset.held_out, key=lambda example: natural_key(str(example.path)))
    shown = examples[:MOST_PICTURES]
    cells = list(_cells(dataset, shown))
    columns = min(len(cells), max(3, min(6, math.ceil(math.sqrt(1.3 * len(cells))))))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    more = len(examples) - len(shown)
    return _paste(rows, max(columns, 2), _header(dataset), f"and {more} more" if more else "")


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet, drawn."""

    thumbnail: Image.Image
    badges: list[tuple[str, str]]
    title: str
    details: str
    caption: list[str]
    caption_colour: str

    @property
    def height(self) -> int:
        return self.picture_height + 58 + 18 * len(self.caption)

    @property
    def picture_height(self) -> int:
        """Room for the picture, and for its badges where the picture is lower than they are."""
        return max(self.thumbnail.height, 12 + 26 * len(self.badges))


def _cells(dataset: Dataset, examples: list[Example]) -> Iterator[Cell]:
    sizes = bucket_sizes(dataset.resolution)
    held_out, uncaptioned = {example.path for example in dataset.held_out}, set(dataset.uncaptioned)
    for example in examples:
        bucket = bucket_for(example.width, example.height, sizes)
        badges = [("held out", HELD_OUT)] * (example.path in held_out)
        badges += [("no caption", MISSING)] * (example.path in uncaptioned)
        repeats = f"   {example.repeats} times" if example.repeats > 1 else ""
        yield Cell(
            thumbnail=_thumbnail(example, bucket),
            badges=badges,
            title=_fitted(example.path.name, _font(14), CELL - 16),
            details=f"{example.width} x {example.height} at {bucket[0]} x {bucket[1]}{repeats}",
            caption=wrap(example.caption or "no words at all", _font(14), CELL - 16, CAPTION_LINES),
            caption_colour=MISSING if example.path in uncaptioned else TEXT,
        )


def _thumbnail(example: Example, bucket: tuple[int, int]) -> Image.Image:
    """The picture with the part that is cut away darkened and the part that is trained on outlined."""
    try:
        picture = open_image(example.path)
    except ValueError:
        return _unreadable()
    scale = CELL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    box = tuple(round(edge * scale) for edge in crop_box(*picture.size, bucket))
    picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    dark = Image.blend(picture, Image.new("RGB", size, BACKGROUND), 0.65)
    dark.paste(picture.crop(box), box[:2])
    pen = ImageDraw.Draw(dark)
    pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=CROP, width=2)
    return dark


def _unreadable() -> Image.Image:
    blank = Image.new("RGB", (CELL, CELL // 2), PANEL)
    ImageDraw.Draw(blank).text((CELL // 2, CELL // 4), "cannot be read", MISSING, _font(16), anchor="mm")
    return blank


def _badge(pen: ImageDraw.ImageDraw, corner: tuple[int, int], words: str, colour: str) -> None:
    width = _font(13).getlength(words)
    pen.rounded_rectangle((*corner, corner[0] + width + 14, corner[1] + 21), 5, fill=colour)
    pen.text((corner[0] + 7, corner[1] + 10), words, BACKGROUND, _font(13), anchor="lm")


def _header(dataset: Dataset) -> list[str]:
    train, kept = len(dataset.examples), len(dataset.held_out)
    facts = [f"{train} to train on" + (f", {kept} held out" if kept else ""), f"resolution {dataset.resolution}"]
    facts.append(f"trigger word “{dataset.trigger_word}”" if dataset.trigger_word else "no trigger word")
    return [dataset.folder.name or str(dataset.folder), "   ·   ".join(facts)]


def _paste(rows: list[list[Cell]], columns: int, header: list[str], footer: str) -> Image.Image:
    heights = [max(cell.height for cell in row) for row in rows]
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    top = MARGIN + 68
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * len(rows) + (36 if footer else 6)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), _fitted(header[0], _font(24), width - 2 * MARGIN), TEXT, _font(24))
    pen.text((MARGIN, MARGIN + 34), _fitted(header[1], _font(15), width - 2 * MARGIN), FAINT, _font(15))
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            _paste_cell(sheet, cell, MARGIN + column * (CELL + GAP), top, height)
        top += height + GAP
    pen.text((MARGIN, top), footer, FAINT, _font(16))
    return sheet


def _paste_cell(sheet: Image.Image, cell: Cell, left: int, top: int, height: int) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rounded_rectangle((left, top, left + CELL - 1, top + height - 1), 6, fill=PANEL)
    sheet.paste(cell.thumbnail, (left + (CELL - cell.thumbnail.width) // 2, top))
    for number, (words, colour) in enumerate(cell.badges):
        _badge(pen, (left + 8, top + 8 + 26 * number), words, colour)
    line = top + cell.picture_height + 8
    pen.text((left + 8, line), cell.title, FAINT, _font(14))
    pen.text((left + 8, line + 19), cell.details, CROP, _font(13))
    for number, words in enumerate(cell.caption):
        pen.text((left + 8, line + 42 + 18 * number), words, cell.caption_colour, _font(14))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most ``lines`` lines of at most ``width`` pixels; what does not fit is cut and ends in "…"."""
    wrapped, words = [""], text.split()
    while words:
        word = words.pop(0)
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        elif len(wrapped) == lines:
            wrapped[-1] = _fitted(longer, font, width)
            break
        elif wrapped[-1]:
            wrapped.append("")
            words.insert(0, word)
        else:  # a word wider than a line is broken where it stops fitting
            fits = max(1, len(_fitted(word, font, width)) - 1)
            wrapped[-1:] = [word[:fits], ""]
            words.insert(0, word[fits:])
    return wrapped


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut to end in "…" where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font of the system, for captions in any European script; else Pillow's own, which knows little beyond ASCII."""
    for name in FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)
