"""Pictures of what was measured: gain over the base by step, and picture by picture; and what the latter says.

Everything is shown as percent of the loss: 10 is 10 % lower than the untrained model's, -10 is 10 % higher.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageColor, ImageDraw

from .figures import BOTTOM, GRID, HEIGHT, INK, LEFT, PALE, PAPER, RED, RIGHT, TOP, WIDTH, ticks
from .lettering import fitted, font, wrap
from .picking import Decision
from .scores import Score, Scored, comparable, differences, percent_of

SAFE, GREEN, BLUE, FAINT, EMPTY = "#dcf3e4", "#15803d", "#1d4ed8", "#64748b", "#eef1f5"
HELD_OUT, TRAINING = "pictures kept out of training", "training pictures"

FEWEST = 3
"""Below so many pictures of a kind none can be told from the others."""
IMPROVED, UNCHANGED, HURT = -0.02, -0.003, 0.01
"""D that the others must reach, that a picture must not, and above which it is hurt."""
MEMORISED, DEVIATIONS = 0.10, 3.0
"""How far below the others' D a memorised picture's lies, at least and in standard deviations of theirs."""
LATE = 3
"""The last file of so many counts as late."""
MOST_NAMED = 3

CELL_HEIGHT, CELL_WIDTHS, NUMBERED, NAMES, GAP, MARGIN = 26, (18, 64), 30, 210, 2, 24
SMALLEST_SCALE = 5.0
"""Percent: paler than this would make noise look like news."""

Place = Callable[[float, float], tuple[float, float]]


def curve(scored: Sequence[Scored], base: Score, decision: Decision) -> Image.Image:
    """The gain on held-out and on training pictures by step, the safe range shaded and the suggested file marked.

    Averages are single points. Files that cannot be used are crossed out on the axis.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    trained = sorted((one for one in scored if not one.checkpoint.average), key=lambda one: one.checkpoint.step)
    held_out, training = (_curve(trained, base, part) for part in ("held_out", "training"))
    averages = _points([one for one in scored if one.checkpoint.average], base, "held_out" if held_out else "training")
    _title(pen, bool(held_out), bool(training), bool(averages), len(decision.safe) > 1)
    if not held_out and not training:
        pen.text((LEFT, HEIGHT // 2), "No file could be compared with the untrained model.", INK, font(16))
        return image
    steps = max(1, *(one.checkpoint.step for one in scored))
    low, high = _range([percent for _, percent in (*held_out, *training, *averages)])

    def place(step: float, percent: float) -> tuple[float, float]:
        across = step / steps * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (percent - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    _shade(pen, place, decision, low, high)
    _axes(pen, place, low, high, steps)
    _line(pen, [place(*point) for point in training], INK, 2)
    _line(pen, [place(*point) for point in held_out], RED, 3)
    _dots(pen, [place(*point) for point in training[1:]], INK, 3)
    _dots(pen, [place(*point) for point in held_out[1:]], RED, 4)
    for x, y in (place(*point) for point in averages):
        pen.polygon([(x, y - 6), (x + 6, y), (x, y + 6), (x - 6, y)], PAPER, RED if held_out else INK, 2)
    for checkpoint in decision.broken:
        x, y = place(checkpoint.step, low)
        pen.line((x - 5, y - 5, x + 5, y + 5), FAINT, 2)
        pen.line((x - 5, y + 5, x + 5, y - 5), FAINT, 2)
    _mark(pen, place, decision, low)
    return image


def heat_map(scored: Sequence[Scored], base: Score, names: Sequence[str]) -> Image.Image:
    """Every picture (a row) in every file (a column): blue is better than the base, red is worse. Below, the reading.

    `names` are those of the held-out pictures and then of the training pictures, as in the scores.
    """
    columns = [one for one in _in_order(scored) if any(_measured(one, base, part) for part in ("held_out", "training"))]
    groups = [group for group in _groups(columns, base, names) if group.names]
    if not columns or not groups:
        image = Image.new("RGB", (WIDTH, 160), PAPER)
        ImageDraw.Draw(image).text((MARGIN, 70), "No file could be compared with the untrained model.", INK, font(16))
        return image
    return _drawn(columns, groups, reading(scored, base, names))


def reading(scored: Sequence[Scored], base: Score, names: Sequence[str]) -> list[str]:
    """Sentences about pictures that are hurt, memorised or not learned at all, each told from others of its kind."""
    trained = [one for one in _in_order(scored) if not one.checkpoint.average]
    sentences = []
    for group in _groups(trained, base, names):
        if len(group.names) >= FEWEST and group.rows[0]:
            sentences += _told(group)
    return sentences


@dataclass(frozen=True)
class _Group:
    """The pictures of one kind: their names, and D of each (a row) in each file, None where it was not measured."""

    title: str
    names: Sequence[str]
    table: Sequence[Sequence[float | None]]

    @property
    def rows(self) -> list[list[float]]:
        """D of each picture in the files that were measured, in order."""
        return [[value for value in row if value is not None] for row in self.table]


def _groups(columns: Sequence[Scored], base: Score, names: Sequence[str]) -> Iterator[_Group]:
    """The pictures that the base was asked about, the held-out ones first."""
    count = len(base.held_out)
    training = names[count : count + len(base.training)]
    for title, part, own in ((HELD_OUT, "held_out", names[:count]), (TRAINING, "training", training)):
        values = [_measured(one, base, part) for one in columns]
        table = [[None if some is None else some[number] for some in values] for number in range(len(own))]
        yield _Group(title, own, table)


def _measured(one: Scored, base: Score, part: str) -> list[float] | None:
    """D of each picture of a part; None where there is nothing to compare."""
    values, others = getattr(one.score, part), getattr(base, part)
    usable = not one.score.broken and comparable(values, others)
    return differences(values, others) if usable else None


def _in_order(scored: Sequence[Scored]) -> list[Scored]:
    """The files by step, averages after all others."""
    return sorted(scored, key=lambda one: (bool(one.checkpoint.average), one.checkpoint.step))


def _told(group: _Group) -> Iterator[str]:
    rows = group.rows
    late = [statistics.fmean(row[-max(1, len(row) // LATE) :]) for row in rows]
    best = [min(row) for row in rows]
    every = range(len(rows))
    odd = [n for n in every if best[n] > UNCHANGED and _of_others(best, n) < IMPROVED]
    hurt = [n for n in every if n not in odd and late[n] > HURT and _of_others(late, n) < IMPROVED]
    if odd:
        yield (
            f"{_listed(group, odd)} {_do(odd, 'does', 'do')} not improve in any file although the other {group.title} "
            "do: the caption may not say what is to be seen, the picture may be unlike the rest, or the untrained "
            "model may know it already."
        )
    if hurt:
        yield (
            f"{_listed(group, hurt)} {_do(hurt, 'is', 'are')} {_percent(late, hurt, -1)} worse than with the untrained "
            f"model in the later files while the other {group.title} improve: look for what is different there, or "
            "choose an earlier file."
        )
    memorised = [n for n in every if group.title == TRAINING and _is_far_below(late, n)]
    if memorised:
        rest = [n for n in every if n not in memorised]
        yield (
            f"{_listed(group, memorised)} {_do(memorised, 'is', 'are')} learned far more than the other {group.title} "
            f"({_percent(late, memorised)} against {_percent(late, rest)}) and may be memorised: look for copies in "
            "the dataset, lower the repeats, and look whether the caption is right."
        )


def _percent(late: Sequence[float], numbers: Sequence[int], sign: int = 1) -> str:
    return f"{sign * percent_of(statistics.fmean(late[number] for number in numbers)):.0f} %"


def _of_others(values: Sequence[float], number: int) -> float:
    """The median of all values but one."""
    return statistics.median([*values[:number], *values[number + 1 :]])


def _is_far_below(values: Sequence[float], number: int) -> bool:
    """Whether one value lies far below the others, by their median and their spread (1.4826 MAD)."""
    middle = _of_others(values, number)
    spread = 1.4826 * _of_others([abs(value - middle) for value in values], number)
    return values[number] < middle - max(MEMORISED, DEVIATIONS * spread)


def _listed(group: _Group, numbers: Sequence[int]) -> str:
    named = [group.names[number] for number in numbers[:MOST_NAMED]]
    more = len(numbers) - len(named)
    if more:
        return f"{', '.join(named)} and {more} more"
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def _do(numbers: Sequence[int], one: str, more: str) -> str:
    return one if len(numbers) == 1 else more


def _curve(trained: Sequence[Scored], base: Score, part: str) -> list[tuple[int, float]]:
    """(step, percent) from the untrained model on; [] where nothing was measured."""
    points = _points(trained, base, part)
    return [(0, 0.0), *points] if points else []


def _points(some: Sequence[Scored], base: Score, part: str) -> list[tuple[int, float]]:
    measured = [(one.checkpoint.step, _measured(one, base, part)) for one in some]
    return [(step, percent_of(statistics.fmean(values))) for step, values in measured if values]


def _range(percents: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *percents), max(0.0, *percents)
    room = 0.06 * max(high - low, 1.0)
    return low - room, high + room


def _title(pen: ImageDraw.ImageDraw, held_out: bool, training: bool, averages: bool, safe: bool) -> None:
    pen.text((LEFT, 28), "Better than untrained, in %", INK, font(18), anchor="lm")
    entries = [("equally good", SAFE)] * safe + [("averages", PAPER)] * averages
    entries += [(TRAINING, INK)] * training + [("kept out of training", RED)] * held_out
    x = WIDTH - RIGHT
    for text, colour in reversed(entries):
        x -= pen.textlength(text, font=font(13))
        pen.text((x, 28), text, INK, font(13), anchor="lm")
        if colour == SAFE:
            pen.rectangle((x - 24, 21, x - 8, 35), SAFE, GREEN)
        elif colour == PAPER:
            pen.polygon([(x - 14, 22), (x - 8, 28), (x - 14, 34), (x - 20, 28)], PAPER, RED if held_out else INK, 2)
        else:
            pen.line((x - 26, 28, x - 6, 28), colour, 3)
        x -= 42


def _shade(pen: ImageDraw.ImageDraw, place: Place, decision: Decision, low: float, high: float) -> None:
    steps = [checkpoint.step for checkpoint in decision.safe]
    if len(steps) > 1:
        (left, bottom), (right, top) = place(min(steps), low), place(max(steps), high)
        pen.rectangle((left - 6, top, right + 6, bottom), SAFE)


def _axes(pen: ImageDraw.ImageDraw, place: Place, low: float, high: float, steps: int) -> None:
    for percent in ticks(low, high):
        _, y = place(0, percent)
        pen.line((LEFT, y, WIDTH - RIGHT, y), PALE if abs(percent) < 1e-9 else GRID, 2 if abs(percent) < 1e-9 else 1)
        pen.text((LEFT - 10, y), f"{percent:.6g} %", INK, font(13), anchor="rm")
    for step in ticks(0, steps, smallest=1):
        x, y = place(step, low)
        pen.line((x, y, x, y + 5), PALE)
        pen.text((x, y + 10), f"{step:,.0f}", INK, font(13), anchor="ma")
    pen.line((*place(0, low), *place(steps, low)), PALE)
    pen.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14), "step", INK, font(13), anchor="mm")


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) > 1:
        pen.line(points, colour, width, joint="curve")


def _dots(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, radius: int) -> None:
    for x, y in points:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)


def _mark(pen: ImageDraw.ImageDraw, place: Place, decision: Decision, low: float) -> None:
    """A line at the suggested file, and its name beside it."""
    x, bottom = place(decision.checkpoint.step, low)
    for y in range(TOP, int(bottom), 8):
        pen.line((x, y, x, min(y + 4, bottom)), GREEN, 2)
    text = f"suggested: {decision.checkpoint.label}"
    width = pen.textlength(text, font=font(14)) + 12
    left = min(max(x - width / 2, LEFT), WIDTH - RIGHT - width)
    pen.rounded_rectangle((left, TOP - 12, left + width, TOP + 10), 4, GREEN)
    pen.text((left + 6, TOP - 1), text, PAPER, font(14), anchor="lm")


def _drawn(columns: Sequence[Scored], groups: Sequence[_Group], sentences: Sequence[str]) -> Image.Image:
    """The heat map with its headings, its key and the sentences below."""
    cell = max(CELL_WIDTHS[0], min(CELL_WIDTHS[1], (WIDTH - 2 * MARGIN - NAMES) // len(columns)))
    width = max(WIDTH, 2 * MARGIN + NAMES + cell * len(columns))
    lines = [line for text in sentences for line in wrap(text, font(15), width - 2 * MARGIN, 4)]
    cells = sum(CELL_HEIGHT * (1 + len(group.names)) for group in groups)
    image = Image.new("RGB", (width, 96 + cells + (16 + 22 * len(lines) if lines else 0) + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    values = [abs(percent_of(value)) for group in groups for row in group.rows for value in row]
    scale = max(SMALLEST_SCALE, sorted(values)[int(0.98 * (len(values) - 1))])
    pen.text((MARGIN, 28), "Every picture in every file", INK, font(18), anchor="lm")
    _key(pen, width - MARGIN, scale)
    _headings(pen, columns, cell)
    top = 96
    for group in groups:
        pen.text((MARGIN, top + CELL_HEIGHT / 2), group.title.capitalize(), FAINT, font(13), anchor="lm")
        top += CELL_HEIGHT
        for name, row in zip(group.names, group.table, strict=True):
            pen.text((MARGIN, top + CELL_HEIGHT / 2), fitted(name, font(13), NAMES - 12), INK, font(13), anchor="lm")
            for number, value in enumerate(row):
                _cell(pen, MARGIN + NAMES + number * cell, top, cell, value, scale)
            top += CELL_HEIGHT
    for number, line in enumerate(lines):
        pen.text((MARGIN, top + 16 + 22 * number), line, INK, font(15))
    return image


def _cell(pen: ImageDraw.ImageDraw, left: float, top: float, width: int, value: float | None, scale: float) -> None:
    box = (left, top, left + width - GAP, top + CELL_HEIGHT - GAP)
    if value is None:
        pen.rectangle(box, PAPER, GRID)
        return
    percent = percent_of(value)
    colour = _shaded(max(-1.0, min(1.0, percent / scale)))
    pen.rectangle(box, colour)
    if width >= NUMBERED:
        middle = (left + (width - GAP) / 2, top + (CELL_HEIGHT - GAP) / 2)
        pen.text(middle, f"{round(percent)}", INK if _luminance(colour) > 0.22 else PAPER, font(12), anchor="mm")


def _shaded(share: float) -> tuple[int, ...]:
    """From red (-1) over nearly white (0) to blue (1), so that little is seen too."""
    end, none = (ImageColor.getrgb(colour) for colour in (BLUE if share > 0 else RED, EMPTY))
    return tuple(round(a + abs(share) ** 0.7 * (b - a)) for a, b in zip(none, end, strict=True))


def _luminance(colour: tuple[int, ...]) -> float:
    """0 to 1 (WCAG 2, with a plain power for sRGB)."""
    return sum(weight * (level / 255) ** 2.2 for weight, level in zip((0.2126, 0.7152, 0.0722), colour, strict=True))


def _headings(pen: ImageDraw.ImageDraw, columns: Sequence[Scored], cell: int) -> None:
    """The files' steps: of each, or of every second, third and so on where they would touch."""
    texts = [one.checkpoint.average or f"{one.checkpoint.step:,}" for one in columns]
    apart = math.ceil((max(pen.textlength(text, font=font(12)) for text in texts) + 8) / cell)
    for number in range(len(texts) - 1, -1, -apart):
        middle = MARGIN + NAMES + number * cell + (cell - GAP) / 2
        pen.text((middle, 82), texts[number], INK, font(12), anchor="mm")
    pen.text((MARGIN, 82), "step", FAINT, font(12), anchor="lm")


def _key(pen: ImageDraw.ImageDraw, right: float, scale: float) -> None:
    """What the colours mean, from worse to better."""
    better, worse = f"{scale:.0f} % better than untrained", f"{scale:.0f} % worse"
    right -= pen.textlength(better, font=font(13))
    pen.text((right, 28), better, INK, font(13), anchor="lm")
    left = right - 10 - 121
    for number in range(11):
        pen.rectangle((left + 11 * number, 20, left + 11 * number + 10, 36), _shaded((number - 5) / 5))
    pen.text((left - 10, 28), worse, INK, font(13), anchor="rm")
