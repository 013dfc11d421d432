"""Pictures about a run: the loss chart, and a grid of labelled pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .lettering import fitted

INK, PALE, GRID, PAPER, RED = "#1f2933", "#9fb3c8", "#e4e9f0", "#ffffff", "#c2410c"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 480, 90, 30, 56, 56


def loss_chart(
    losses: Sequence[tuple[int, float]],
    smooth: Sequence[tuple[float, float]],
    validation: Sequence[tuple[int, float]],
    title: str,
) -> Image.Image:
    """Training loss by step, raw and smoothed (`curve.smoothed`), and the held-out loss where it was measured."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    losses, smooth, validation = finite(losses), finite(smooth), finite(validation)
    font = ImageFont.load_default(20)
    room = _legend(draw, bool(validation)) if losses else WIDTH - RIGHT
    draw.text((LEFT, 28), _cut(title, font, room - LEFT), fill=INK, font=font, anchor="lm")
    if not losses:
        draw.text((LEFT, HEIGHT // 2), "No step has been trained yet.", fill=INK, font=ImageFont.load_default(16))
        return image
    low, high = _range(losses, (*smooth, *validation))
    steps = max(1, *(step for step, _ in (*losses, *validation)))

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step / steps) * (WIDTH - LEFT - RIGHT)
        up = (min(value, high) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    _axes(draw, place, low, high, steps)
    _line(draw, [place(*point) for point in losses], PALE, 1)
    _line(draw, [place(*point) for point in smooth], INK, 3)
    _line(draw, [place(*point) for point in validation], RED, 2)
    _dots(draw, [place(*point) for point in validation], RED)
    if len(losses) == 1:
        _dots(draw, [place(*losses[0])], INK)
    return image


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(step, value) for step, value in points if math.isfinite(value)]


def ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    wanted = max((high - low) / 5, smallest)
    power = 10.0 ** math.floor(math.log10(wanted))
    distance = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= wanted * 0.999)
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [number * distance for number in range(first, last + 1)]


def made_smaller(picture: Image.Image, count: int, most: int) -> Image.Image:
    """A picture for a grid of `count`, smaller where all of them together would have more than `most` pixels."""
    share = (most / (count * picture.width * picture.height)) ** 0.5
    if share >= 1:
        return picture
    return picture.resize((max(1, int(share * picture.width)), max(1, int(share * picture.height))))


def labelled_grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Pictures in rows, a heading over each column and a line of text over each row.

    ValueError when there is nothing to show.
    """
    if not rows or not rows[0]:
        raise ValueError("There is no picture to put into the grid: give at least one prompt.")
    width, height = rows[0][0].size
    gap, head, line = 6, 30, 26
    grid = Image.new("RGB", (len(columns) * (width + gap) + gap, head + len(rows) * (height + line + gap) + gap), PAPER)
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(14)
    for number, heading in enumerate(columns):
        middle = gap + number * (width + gap) + width / 2
        draw.text((middle, head / 2), _cut(heading, font, width + gap - 2), fill=INK, font=font, anchor="mm")
    for number, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        top = head + number * (height + line + gap)
        text = _cut(label, font, grid.width - 2 * gap)
        draw.text((gap, top + line / 2), text, fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            grid.paste(picture, (gap + column * (width + gap), top + line))
    return grid


def _range(losses: list[tuple[int, float]], shown: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The lowest and highest value of the chart: single steps far above all others are cut off, lines never are."""
    raw, lines = sorted(value for _, value in losses), [value for _, value in shown]
    low, high = min([raw[0], *lines]), max([raw[int(0.98 * (len(raw) - 1))], *lines])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    return fitted(" ".join(text.split()), font, width)


def _line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=width, joint="curve")


def _dots(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str) -> None:
    for x, y in points:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)


def _axes(draw: ImageDraw.ImageDraw, place, low: float, high: float, steps: int) -> None:
    font = ImageFont.load_default(13)
    for value in ticks(low, high):
        _, y = place(0, value)
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        draw.text((LEFT - 10, y), f"{value:.6g}", fill=INK, font=font, anchor="rm")
    for step in ticks(0, steps, smallest=1):
        x, _ = place(step, low)
        draw.line((x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5), fill=PALE)
        draw.text((x, HEIGHT - BOTTOM + 10), f"{step:.0f}", fill=INK, font=font, anchor="ma")
    draw.line((LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM), fill=PALE)
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), "step", fill=INK, font=font, anchor="mm")


def _legend(draw: ImageDraw.ImageDraw, validation: bool) -> float:
    """Draws the legend and says where it begins."""
    font = ImageFont.load_default(13)
    entries = [("loss", PALE), ("smoothed", INK)] + ([("held-out pictures", RED)] if validation else [])
    x = WIDTH - RIGHT
    for text, colour in reversed(entries):
        x -= draw.textlength(text, font=font)
        draw.text((x, 28), text, fill=INK, font=font, anchor="lm")
        draw.line((x - 26, 28, x - 6, 28), fill=colour, width=3)
        x -= 44
    return x
