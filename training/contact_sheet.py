"""One picture of a whole dataset: what is trained on, which part of it, at which sizes, with which words."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from .buckets import crop_box, size_for
from .dataset import REGULARIZATION, Dataset, Example, natural_key
from .doctor import Diagnosis
from .images import open_image
from .lettering import fitted, font, wrap
from .masks import filled, open_mask

MOST_PICTURES = 60
CELL, GAP, MARGIN, PAD = 264, 18, 24, 8
INSIDE = CELL - 2 * PAD
CAPTION_LINES, REMARK_LINES = 5, 8
BADGE, LINE = 26, 18
BACKGROUND, PANEL, TEXT, FAINT = "#202124", "#2b2d31", "#e8eaed", "#9aa0a6"
CROP, HELD_OUT, ODD, HANDLED, MASKED = "#ffd54f", "#64b5f6", "#ff8a65", "#9fb8ad", "#8e44ad"
# What was found and taken care of, or only to be looked at.
HARMLESS = ("EXIF-rotated", "alpha", "similar", "soft")
TOLD_OTHERWISE = ("no caption", "near-duplicate")


def draw(dataset: Dataset, diagnosis: Diagnosis | None = None) -> Image.Image:
    """The contact sheet as an RGB picture: each example with its crop, mask, badges, buckets, tokens and caption.

    At most ``MOST_PICTURES`` are drawn, odd ones before others, in the order of the folder; the last line says how
    many there are besides. What is odd about the dataset as a whole stands above.
    """
    diagnosis = diagnosis or Diagnosis()
    examples = sorted(dataset.examples + dataset.held_out, key=lambda example: natural_key(str(example.path)))
    odd = {finding.path for finding in diagnosis.findings}
    chosen = {example.path for example in sorted(examples, key=lambda e: e.path not in odd)[:MOST_PICTURES]}
    shown = [example for example in examples if example.path in chosen]
    cells = list(_cells(dataset, shown, diagnosis))
    columns = min(len(cells), max(3, min(6, math.ceil(math.sqrt(1.3 * len(cells))))))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    more = len(examples) - len(shown)
    return _paste(rows, max(columns, 2), _Header.of(dataset, diagnosis), f"and {more} more" if more else "")


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet, drawn, and what is written below it."""

    thumbnail: Image.Image
    badges: list[list[tuple[str, str]]]  # rows of (words, colour)
    title: str
    details: list[tuple[str, str]]  # lines of (words, colour)
    caption: list[str]
    caption_colour: str

    @property
    def height(self) -> int:
        return (
            self.thumbnail.height + BADGE * len(self.badges) + LINE * (1 + len(self.details) + len(self.caption)) + 20
        )


@dataclass(frozen=True)
class _Header:
    title: str
    facts: str
    remarks: list[str]

    @classmethod
    def of(cls, dataset: Dataset, diagnosis: Diagnosis) -> "_Header":
        pictures = dataset.examples + dataset.held_out
        remembered = sum(example.role == REGULARIZATION for example in pictures)
        facts = [f"{len(dataset.examples) - remembered} to train on"]
        facts += [f"{remembered} for regularization"] * bool(remembered)
        facts += [f"{len(dataset.held_out)} held out"] * bool(dataset.held_out)
        facts.append(f"resolution {', '.join(map(str, dataset.all_resolutions))}")
        facts.append(f"trigger word “{dataset.trigger_word}”" if dataset.trigger_word else "no trigger word")
        becomes = "painted over" if any(example.fill_masked for example in pictures) else "not learned"
        facts += [f"violet is masked, {becomes}"] * any(example.mask for example in pictures)
        remarks = [f"{finding.kind}: {finding.message}" for finding in diagnosis.of(None)]
        return cls(dataset.folder.name or str(dataset.folder), "   ·   ".join(facts), remarks)


def _cells(dataset: Dataset, examples: Sequence[Example], diagnosis: Diagnosis) -> Iterator[Cell]:
    held_out, uncaptioned = {example.path for example in dataset.held_out}, set(dataset.uncaptioned)
    badges = _badges(dataset, diagnosis)
    for example in examples:
        sizes = dataset.sizes_of(example)
        if example.path in held_out:
            sizes = (size_for(example.width, example.height, dataset.resolution, dataset.largest_enlargement),)
        missing = example.path in uncaptioned
        yield Cell(
            thumbnail=_thumbnail(example, sizes, dataset.background),
            badges=_in_rows(badges.get(example.path, [])),
            title=fitted(example.path.name, font(14), INSIDE),
            details=list(_details(example, sizes, diagnosis)),
            caption=wrap(_captions(example), font(14), INSIDE, CAPTION_LINES),
            caption_colour=ODD if missing else TEXT,
        )


def _captions(example: Example) -> str:
    return "   |   ".join((example.caption, *example.variants)) or "no words at all"


def _badges(dataset: Dataset, diagnosis: Diagnosis) -> dict[Path, list[tuple[str, str]]]:
    """(words, colour) by picture; near-duplicates of each other share a number."""
    badges: dict[Path, list[tuple[str, str]]] = defaultdict(list)
    for example in dataset.held_out:
        badges[example.path].append(("held out", HELD_OUT))
    for example in dataset.examples:
        badges[example.path] += [("regularization", HELD_OUT)] * (example.role == REGULARIZATION)
    for path in dataset.uncaptioned:
        badges[path].append(("no caption", ODD))
    for number, cluster in enumerate(diagnosis.clusters, 1):
        for path in cluster:
            badges[path].append((f"duplicate {number}", ODD))
    for finding in diagnosis.findings:
        if finding.path is not None and finding.kind not in TOLD_OTHERWISE:
            badges[finding.path].append((finding.kind, HANDLED if finding.kind in HARMLESS else ODD))
    return badges


def _in_rows(badges: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The badges in rows that fit into a cell."""
    rows: list[list[tuple[str, str]]] = []
    room = 0.0
    for badge in badges:
        width = _badge_width(badge[0]) + 6
        if not rows or width > room:
            rows.append([])
            room = INSIDE + 6
        rows[-1].append(badge)
        room -= width
    return rows


def _details(example: Example, sizes: Sequence[tuple[int, int]], diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    trained = ", ".join(f"{width} x {height}" for width, height in sizes)
    yield from ((line, CROP) for line in wrap(f"{example.width} x {example.height} at {trained}", font(13), INSIDE, 2))
    facts = [f"{example.repeats} times"] * (example.repeats > 1) + ["masked"] * bool(example.mask)
    facts += [f"{1 + len(example.variants)} captions"] * bool(example.variants)
    count = diagnosis.tokens.get(example.path)
    facts += [] if count is None else [f"{count} of {diagnosis.limit} tokens"]
    if facts:
        yield "   ".join(facts), ODD if (count or 0) > diagnosis.limit else FAINT


def _thumbnail(example: Example, sizes: Sequence[tuple[int, int]], background: str) -> Image.Image:
    """The picture with what is cut away darkened, the part or parts that are trained on outlined, the mask tinted."""
    try:
        picture, mask = open_image(example.path, background), open_mask(example)
    except ValueError:
        return _unreadable()
    scale = CELL / max(picture.size)
    boxes = [tuple(round(edge * scale) for edge in crop_box(*picture.size, size)) for size in sizes]
    picture = picture.resize(_scaled(picture.size, scale), Image.Resampling.LANCZOS, reducing_gap=2.0)
    if mask:
        mask = mask.resize(picture.size, Image.Resampling.BOX)
        # Small as it is here: painting over every pixel of sixty photographs would take a while.
        picture = filled(picture, mask) if example.fill_masked else picture
        tinted = Image.blend(picture, Image.new("RGB", picture.size, MASKED), 0.7)
        picture = Image.composite(picture, tinted, mask)
    dark = Image.blend(picture, Image.new("RGB", picture.size, BACKGROUND), 0.65)
    for box in boxes:
        dark.paste(picture.crop(box), box[:2])
    pen = ImageDraw.Draw(dark)
    for left, top, right, bottom in set(boxes):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=CROP, width=2)
    return dark


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _unreadable() -> Image.Image:
    blank = Image.new("RGB", (CELL, CELL // 2), PANEL)
    ImageDraw.Draw(blank).text((CELL // 2, CELL // 4), "cannot be read", ODD, font(16), anchor="mm")
    return blank


def _paste(rows: list[list[Cell]], columns: int, header: _Header, footer: str) -> Image.Image:
    heights = [max(cell.height for cell in row) for row in rows]
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    remarks = [line for remark in header.remarks for line in wrap(remark, font(15), width - 2 * MARGIN, 2)]
    remarks = remarks[:REMARK_LINES]
    top = MARGIN + 68 + (22 * len(remarks) + 14 if remarks else 0)
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * len(rows) + (36 if footer else 6)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), fitted(header.title, font(24), width - 2 * MARGIN), TEXT, font(24))
    pen.text((MARGIN, MARGIN + 34), fitted(header.facts, font(15), width - 2 * MARGIN), FAINT, font(15))
    for number, remark in enumerate(remarks):
        pen.text((MARGIN, MARGIN + 62 + 22 * number), remark, ODD, font(15))
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            _paste_cell(sheet, cell, MARGIN + column * (CELL + GAP), top, height)
        top += height + GAP
    pen.text((MARGIN, top), footer, FAINT, font(16))
    return sheet


def _paste_cell(sheet: Image.Image, cell: Cell, left: int, top: int, height: int) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.rounded_rectangle((left, top, left + CELL - 1, top + height - 1), 6, fill=PANEL)
    sheet.paste(cell.thumbnail, (left + (CELL - cell.thumbnail.width) // 2, top))
    line = top + cell.thumbnail.height + PAD
    for row in cell.badges:
        _paste_badges(pen, row, left + PAD, line)
        line += BADGE
    words = [(cell.title, FAINT, 14), *((text, colour, 13) for text, colour in cell.details)]
    words += [(text, cell.caption_colour, 14) for text in cell.caption]
    for number, (text, colour, size) in enumerate(words):
        apart = 4 if number > len(cell.details) else 0  # between the facts and the caption
        pen.text((left + PAD, line + LINE * number + apart), text, colour, font(size))


def _paste_badges(pen: ImageDraw.ImageDraw, badges: Sequence[tuple[str, str]], left: float, top: int) -> None:
    for words, colour in badges:
        width = _badge_width(words)
        pen.rounded_rectangle((left, top, left + width, top + BADGE - 5), 5, fill=colour)
        pen.text((left + 7, top + (BADGE - 5) / 2), words, BACKGROUND, font(13), anchor="lm")
        left += width + 6


def _badge_width(words: str) -> float:
    return font(13).getlength(words) + 14
