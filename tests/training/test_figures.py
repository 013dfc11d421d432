"""The loss chart and the grid of labelled pictures."""

import math
import time

import numpy
import pytest
from PIL import Image, ImageColor

from lora_workbench.training import curve
from lora_workbench.training.figures import (
    HEIGHT,
    INK,
    PALE,
    RED,
    WIDTH,
    finite,
    labelled_grid,
    loss_chart,
    ticks,
)

LOSSES = [(step, 0.3 + 0.2 * math.cos(step) - step / 1000) for step in range(1, 101)]
HELD_OUT = [(0, 0.3), (50, 0.25), (100, 0.28)]
SMOOTH = curve.smoothed([(*point, None) for point in LOSSES])


def count(picture: Image.Image, colour: str) -> int:
    """Pixels of exactly this colour below the legend."""
    below = numpy.asarray(picture)[50:]
    return int((below == ImageColor.getrgb(colour)).all(-1).sum())


def test_the_chart_shows_single_steps_the_smoothed_line_and_the_held_out_pictures():
    chart = loss_chart(LOSSES, SMOOTH, HELD_OUT, "star: loss by step")
    assert chart.size == (WIDTH, HEIGHT) and chart.mode == "RGB"
    assert count(chart, RED) > 100 and count(chart, INK) > 500 and count(chart, PALE) > 500
    assert count(loss_chart(LOSSES, SMOOTH, [], "star"), RED) == 0


@pytest.mark.parametrize(
    ("losses", "held_out"),
    [
        ([], []),
        ([], HELD_OUT),
        ([(1, 0.3)], []),
        ([(1, 0.3)], [(0, 0.3)]),
        ([(1, 0.0), (2, 0.0)], []),
        ([(1, math.nan), (2, math.inf)], [(0, math.nan)]),
        ([(1, 0.3), (2, math.nan), (3, 0.2)], [(0, 0.3), (2, math.inf)]),
        ([(1, 1e-7), (900_000, 1e6)], []),
        ([(400, 0.2), (401, 0.3)], [(0, 0.3)]),
    ],
    ids=str,
)
def test_whatever_there_is_to_draw_gives_a_chart(losses, held_out):
    smooth = curve.smoothed([(*point, None) for point in losses])
    assert loss_chart(losses, smooth, held_out, "star").size == (WIDTH, HEIGHT)


def test_the_smoothed_curve_is_drawn_over_the_raw_one():
    flat = [(step, 0.3) for step in range(1, 101, 10)]
    given = numpy.asarray(loss_chart(LOSSES, flat, [], "star"))[60:-60, 95:]
    rows = (given == ImageColor.getrgb(INK)).all(-1).any(1)
    assert 1 <= rows.sum() <= 4, "a level line"


def test_a_single_step_is_a_dot():
    dot = numpy.asarray(loss_chart([(1, 0.3)], [(1.0, 0.3)], [], "star"))[:, -40:-20]
    assert (dot == ImageColor.getrgb(INK)).all(-1).sum() > 30


def test_one_wild_step_does_not_flatten_all_the_others():
    calm = [(step, 0.1 + 0.05 * (step % 2)) for step in range(1, 201)]
    wild = [(step, 5.0 if step == 77 else loss) for step, loss in calm]
    pale = (numpy.asarray(loss_chart(wild, [], [], "star"))[60:-60] == ImageColor.getrgb(PALE)).all(-1)
    assert (pale.sum(1) > 50).sum() > 50


def test_a_long_title_ends_before_the_legend():
    title = "a name that goes on and on " * 10
    long, short = (numpy.asarray(loss_chart(LOSSES, SMOOTH, HELD_OUT, text))[:50] for text in (title, ""))
    legend = short != 255
    assert legend.any() and (long[legend] == short[legend]).all()


def test_only_finite_points_are_drawn():
    assert finite([(1, math.nan), (2, 0.5), (3, -math.inf)]) == [(2, 0.5)]


@pytest.mark.parametrize(
    ("low", "high", "smallest", "expected"),
    [
        (0, 1000, 1, [0, 200, 400, 600, 800, 1000]),
        (0, 1, 1, [0, 1]),
        (0, 6, 1, [0, 2, 4, 6]),
        (0.09, 0.41, 0, [0.1, 0.2, 0.3, 0.4]),
        (0.001, 0.0035, 0, [0.001, 0.0015, 0.002, 0.0025, 0.003, 0.0035]),
    ],
)
def test_the_axes_are_numbered_with_round_numbers(low, high, smallest, expected):
    assert ticks(low, high, smallest) == pytest.approx(expected)


# The grid


def pictures(rows: int, columns: int, size=(64, 48)) -> list[list[Image.Image]]:
    def picture(row, column):
        return Image.new("RGB", size, (10 + 20 * column, 10 + 40 * row, 200))

    return [[picture(row, column) for column in range(columns)] for row in range(rows)]


def test_every_picture_of_the_grid_is_shown_whole_and_in_its_place():
    rows = pictures(2, 3)
    grid = numpy.asarray(labelled_grid(rows, ["untrained", "step 1", "step 2"], ["one", "two"]))
    for row, entries in enumerate(rows):
        for column, picture in enumerate(entries):
            ys, xs = numpy.nonzero((grid == picture.getpixel((0, 0))).all(-1))
            assert len(ys) == 64 * 48
            assert xs.min() // 70 == column and ys.min() // 80 == row
            assert (numpy.ptp(xs) + 1, numpy.ptp(ys) + 1) == (64, 48)


@pytest.mark.parametrize("label", ["", "word " * 200, "星形の猫 " * 50, "two\nlines", "x" * 500])
def test_any_prompt_fits_over_its_row(label):
    rows = pictures(1, 2)
    grid = labelled_grid(rows, ["untrained", "step 1"], [label])
    assert grid.size == labelled_grid(rows, ["untrained", "step 1"], ["short"]).size
    assert (numpy.asarray(grid)[:, -2:] == 255).all()


def test_headings_of_small_pictures_do_not_run_into_each_other():
    rows = pictures(1, 3, (24, 24))
    headings = ["untrained", "step 100000", "step 200000"]
    grid = numpy.asarray(labelled_grid(rows, headings, [""]))[:30]
    gaps = (grid == 255).all((0, 2))
    assert gaps[6 + 24 : 6 + 24 + 6].any()


def test_without_a_picture_there_is_no_grid():
    for rows in ([], [[]]):
        with pytest.raises(ValueError, match="give at least one prompt"):
            labelled_grid(rows, [], [""] * len(rows))


def test_a_caption_as_long_as_a_book_is_cut_at_once():
    """The first caption is the prompt of previews when nobody gives another."""
    picture = Image.new("RGB", (64, 64))
    started = time.process_time()
    grid = labelled_grid([[picture]], ["untrained"], ["a long caption " * 1000])
    assert time.process_time() - started < 5  # letter by letter it takes minutes
    assert numpy.array_equal(grid, labelled_grid([[picture]], ["untrained"], ["a long caption " * 10]))
