"""Pictures about a run: the loss chart, and a grid of labelled pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PALE, GRID, PAPER, RED = "#1f2933", "#9fb3c8", "#e4e9f0", "#ffffff", "#c2410c"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 480, 90, 30, 56, 56
SMOOTHING = 0.95


def loss_chart(losses: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]], title: str) -> Image.Image:
    """Training loss by step, raw and smoothed, and the held-out loss where it was measured."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 16), title, fill=INK, font=ImageFont.load_default(20))
    if not losses:
        draw.text((LEFT, HEIGHT // 2), "No step has been trained yet.", fill=INK, font=ImageFont.load_default(16))
        return image
    smooth = smoothed(losses)
    values = [value for _, value in (*losses, *validation)]
    low, high = min(values), max(values)
    steps = max(losses[-1][0], *(step for step, _ in validation), 1) if validation else max(losses[-1][0], 1)

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step / steps) * (WIDTH - LEFT - RIGHT)
        up = (value - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    _axes(draw, place, low, high, steps)
    _line(draw, [place(*point) for point in losses], PALE, 1)
    _line(draw, [place(*point) for point in smooth], INK, 3)
    _line(draw, [place(*point) for point in validation], RED, 2)
    for x, y in (place(*point) for point in validation):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=RED)
    _legend(draw, bool(validation))
    return image


def smoothed(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The exponential moving average, corrected for its start as Adam's moments are (Kingma & Ba 2014, section 3)."""
    average, points = 0.0, []
    for count, (step, loss) in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        points.append((step, average / (1 - SMOOTHING**count)))
    return points


def labelled_grid(rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], labels: Sequence[str]) -> Image.Image:
    """Pictures in rows, a heading over each column and a line of text over each row.

    ValueError when there is nothing to show.
    """
    if not rows or not rows[0]:
        raise ValueError("There is no picture to put into the grid: give at least one prompt.")
    width, height = rows[0][0].size
    gap, head, line = 6, 30, 26
    grid = Image.new(
        "RGB", (len(columns) * (width + gap) + gap, head + len(rows) * (height + line + gap) + gap), PAPER
    )
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(14)
    for number, heading in enumerate(columns):
        draw.text((gap + number * (width + gap) + width / 2, head / 2), heading, fill=INK, font=font, anchor="mm")
    for number, (pictures, label) in enumerate(zip(rows, labels, strict=True)):
        top = head + number * (height + line + gap)
        draw.text((gap, top + line / 2), _cut(draw, label, font, grid.width - 2 * gap), fill=INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            grid.paste(picture, (gap + column * (width + gap), top + line))
    return grid


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont, width: float) -> str:
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text + "…"


def _line(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) > 1:
        draw.line(points, fill=colour, width=width, joint="curve")


def _axes(draw: ImageDraw.ImageDraw, place, low: float, high: float, steps: int) -> None:
    font = ImageFont.load_default(13)
    for part in range(5):
        value, step = low + (high - low) * part / 4, round(steps * part / 4)
        _, y = place(0, value)
        x, _ = place(step, low)
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill=GRID)
        draw.text((LEFT - 10, y), f"{value:.3g}", fill=INK, font=font, anchor="rm")
        draw.text((x, HEIGHT - BOTTOM + 10), str(step), fill=INK, font=font, anchor="ma")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), "step", fill=INK, font=font, anchor="mm")


def _legend(draw: ImageDraw.ImageDraw, validation: bool) -> None:
    font = ImageFont.load_default(13)
    entries = [("loss", PALE), ("smoothed", INK)] + ([("held-out pictures", RED)] if validation else [])
    x = WIDTH - RIGHT
    for text, colour in reversed(entries):
        x -= draw.textlength(text, font=font)
        draw.text((x, 28), text, fill=INK, font=font, anchor="lm")
        draw.line((x - 26, 28, x - 6, 28), fill=colour, width=3)
        x -= 44
