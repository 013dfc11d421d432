"""A picture of what a LoRA file holds: how much it changes each block, by what, at which rank, and in which network."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from PIL import Image, ImageColor, ImageDraw

from ..training.figures import GRID, INK, PALE, PAPER, RED, WIDTH, ticks
from ..training.lettering import fitted, font
from .inspection import Inspection, Measured
from .inspection_report import findings, headline
from .layer_names import CLIP_G, CLIP_L, MODEL, T5
from .places import ATTENTION, BOTH, CROSS, FEED_FORWARD, NETWORKS, OTHER, PARTS

FAINT = "#64748b"
COLOURS = {ATTENTION: "#1d4ed8", CROSS: "#0e9488", FEED_FORWARD: "#d97706", BOTH: "#7c3aed", OTHER: PALE}
SHARES = {MODEL: INK, CLIP_L: "#0369a1", CLIP_G: "#38a3d1", T5: "#94c9e3"}
RANKS = ("#eef1f5", "#1d4ed8")
"""From no rank in use to all of it."""

MARGIN, LEFT, HEAD = 28, 76, 112
PLOT, LABELS, STRIP, SHARE = 250, 26, 78, 82
WIDEST, GAP, BETWEEN = 56, 3, 18
NARROWER = 0.19
"""How wide the bars of text encoders are beside those of the model."""
LINE = 24

ODD = "holds layers that change nothing or are broken"

Block = tuple[str, str]
"""A network and a block in it."""


def picture(found: Inspection) -> Image.Image:
    """The chart of a file: norm by block and part, rank and how much of it is in use, the share of each network."""
    warnings = findings(found)[:3]
    blocks = _blocks(found.layers)
    drawn = HEAD + PLOT + LABELS + STRIP + SHARE if blocks else HEAD + 70
    image = Image.new("RGB", (WIDTH, drawn + LINE * len(warnings) + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, 32), fitted(found.name, font(20), WIDTH - 2 * MARGIN), INK, font(20), anchor="lm")
    pen.text((MARGIN, 60), fitted(headline(found), font(14), WIDTH - 2 * MARGIN), FAINT, font(14), anchor="lm")
    if blocks:
        bars = _places(list(blocks))
        _draw_bars(pen, blocks, bars)
        _draw_ranks(pen, blocks, bars, HEAD + PLOT + LABELS)
        _draw_shares(pen, found, HEAD + PLOT + LABELS + STRIP)
    else:
        pen.text((MARGIN, HEAD + 30), "No change in it can be measured without the model.", INK, font(16), anchor="lm")
    for number, warning in enumerate(warnings):
        y = drawn + LINE * number + LINE / 2
        pen.ellipse((MARGIN, y - 4, MARGIN + 8, y + 4), RED)
        pen.text((MARGIN + 18, y), _brief(warning, WIDTH - 2 * MARGIN - 18), INK, font(14), anchor="lm")
    return image


def _brief(warning: str, width: int) -> str:
    """A warning in one line, without the names where they do not fit."""
    whole = font(14).getlength(warning) <= width
    return warning if whole else fitted(warning.partition(": ")[0], font(14), width)


def _blocks(layers: Sequence[Measured]) -> dict[Block, list[Measured]]:
    """The layers whose change is known, or broken, by block, in the order in which a picture is made."""
    blocks: dict[Block, list[Measured]] = defaultdict(list)
    shown = [layer for layer in layers if layer.norm is not None or not layer.finite]
    for layer in sorted(shown, key=lambda layer: layer.place.order):
        blocks[layer.place.network, layer.place.block].append(layer)
    return dict(blocks)


def _places(blocks: Sequence[Block]) -> dict[Block, tuple[float, float]]:
    """Left and right of each block's bar; groups stand apart, and layers of text encoders have narrower bars."""
    widths = [1.0 if network == MODEL else NARROWER for network, _ in blocks]
    apart = [BETWEEN if _group(a) != _group(b) else 0 for a, b in zip(blocks, blocks[1:], strict=False)]
    step = min(WIDEST, (WIDTH - LEFT - MARGIN - sum(apart)) / sum(widths))
    left, places = float(LEFT), {}
    for block, width, space in zip(blocks, widths, [*apart, 0], strict=True):
        right = left + step * width
        places[block] = (left + 1, max(left + 1, right - (GAP if step * width > 10 else 1)))
        left = right + space
    return places


def _group(block: Block) -> tuple[str, bool]:
    """What stands together: a network, and the single blocks of FLUX apart from the double ones."""
    network, name = block
    return network, name.startswith("S")


# Norms


def _draw_bars(pen: ImageDraw.ImageDraw, blocks: Mapping[Block, list[Measured]], bars: Mapping[Block, tuple]) -> None:
    """A bar per block as high as the norm of its change, divided by the squares of what its parts change."""
    norms = {block: math.sqrt(sum((layer.norm or 0.0) ** 2 for layer in own)) for block, own in blocks.items()}
    highest = max(norms.values()) or 1.0
    bottom = HEAD + PLOT
    pen.text((MARGIN, HEAD - 2), "Size of the change by block", INK, font(15), anchor="lm")
    _key(pen, [part for part in PARTS if any(layer.place.part == part for own in blocks.values() for layer in own)])
    scale = (PLOT - 30) / (1.04 * highest)
    for value in ticks(0, highest):
        y = bottom - value * scale
        pen.line((LEFT - 6, y, WIDTH - MARGIN, y), GRID)
        pen.text((LEFT - 12, y), f"{value:.6g}", FAINT, font(12), anchor="rm")
    for block, own in blocks.items():
        left, right = bars[block]
        squares = {part: sum((one.norm or 0.0) ** 2 for one in own if one.place.part == part) for part in PARTS}
        whole, y = sum(squares.values()), float(bottom)
        for part, square in squares.items():
            if square:
                top = y - norms[block] * scale * square / whole
                if round(top) < round(y):
                    pen.rectangle((left, round(top), right, round(y) - 1), COLOURS[part])
                y = top
    pen.line((LEFT - 6, bottom, WIDTH - MARGIN, bottom), PALE)
    _label(pen, bars, bottom)


def _key(pen: ImageDraw.ImageDraw, parts: Sequence[str]) -> None:
    right = WIDTH - MARGIN
    for part in reversed(parts):
        right -= pen.textlength(part, font=font(13))
        pen.text((right, HEAD - 2), part, INK, font(13), anchor="lm")
        pen.rounded_rectangle((right - 19, HEAD - 8, right - 7, HEAD + 4), 3, COLOURS[part])
        right -= 38


def _label(pen: ImageDraw.ImageDraw, bars: Mapping[Block, tuple], bottom: int) -> None:
    """The names of the model's blocks, of every second or fourth where they would touch, and of the text encoders."""
    own = {block: place for (network, block), place in bars.items() if network == MODEL}
    needed = max(
        (pen.textlength(block, font=font(11)) / (right - left + GAP) for block, (left, right) in own.items()), default=1
    )
    step = 1 if needed <= 1 else 2 if needed <= 1.8 else 4
    counts: dict[str, int] = defaultdict(int)
    for block, (left, right) in own.items():
        side = block.rstrip("0123456789")
        if counts[side] % step == 0:
            pen.text(((left + right) / 2, bottom + 14), block, INK, font(11), anchor="mm")
        counts[side] += 1
    for network in dict.fromkeys(network for network, _ in bars if network != MODEL):
        sides = [place for (own, _), place in bars.items() if own == network]
        middle = (sides[0][0] + sides[-1][1]) / 2
        pen.text((middle, bottom + 14), NETWORKS[network], INK, font(11), anchor="mm")


# Ranks


def _draw_ranks(
    pen: ImageDraw.ImageDraw, blocks: Mapping[Block, list[Measured]], bars: Mapping[Block, tuple], top: int
) -> None:
    """A cell per block: its rank, filled as far as 90 % of the change needs it; dead and broken layers are marked."""
    pen.text((MARGIN, top + 20), "Rank", INK, font(13), anchor="lm")
    for block, own in blocks.items():
        left, right = bars[block]
        ranks = [layer.rank for layer in own if layer.rank]
        used = [layer.used / layer.rank for layer in own if layer.rank and layer.used]
        share = sum(used) / len(used) if used else None
        box = (left, top + 8, right, top + 32)
        pen.rectangle(box, RANKS[0])
        if share is not None:
            pen.rectangle((left, top + 32 - 24 * share, right, top + 32), _mixed(0.45))
        text = f"{min(ranks)}" if ranks and min(ranks) == max(ranks) else f"{min(ranks)}–{max(ranks)}" if ranks else "–"
        if pen.textlength(text, font=font(11)) <= right - left:
            pen.text(((left + right) / 2, top + 20), text, INK, font(11), anchor="mm")
        if any(map(_is_odd, own)):
            x = (left + right) / 2
            pen.ellipse((x - 3, top + 37, x + 3, top + 43), RED)
    told = "filled: the share of the rank that holds 90 % of the change"
    if any(_is_odd(layer) for own in blocks.values() for layer in own):
        end = WIDTH - MARGIN - pen.textlength(ODD, font=font(12))
        pen.text((end, top + 56), ODD, FAINT, font(12), anchor="lm")
        pen.ellipse((end - 12, top + 53, end - 6, top + 59), RED)
    pen.text((LEFT, top + 56), told, FAINT, font(12), anchor="lm")


def _is_odd(layer: Measured) -> bool:
    return layer.dead or not layer.finite


def _mixed(share: float) -> tuple[int, ...]:
    ends = [ImageColor.getrgb(colour) for colour in RANKS]
    return tuple(round(a + share * (b - a)) for a, b in zip(*ends, strict=True))


# Networks


def _draw_shares(pen: ImageDraw.ImageDraw, found: Inspection, top: int) -> None:
    """One bar over the whole width: what part of the squared change lies in the model and in each text encoder."""
    whole = found.norm() ** 2
    if not whole:
        return
    shares = {network: found.norm(network) ** 2 / whole for network in NETWORKS if found.norm(network)}
    pen.text((MARGIN, top + 18), "Share", INK, font(13), anchor="lm")
    left, end = float(LEFT), WIDTH - MARGIN
    for network, share in shares.items():
        right = left + share * (end - LEFT)
        pen.rectangle((left, top + 8, max(right - 1, left), top + 28), SHARES[network])
        left = right
    left = float(LEFT)
    for network, share in shares.items():
        text = f"{NETWORKS[network]} {100 * share:.1f} %"
        pen.rounded_rectangle((left, top + 38, left + 12, top + 50), 3, SHARES[network])
        pen.text((left + 19, top + 44), text, INK, font(13), anchor="lm")
        left += 19 + pen.textlength(text, font=font(13)) + 28
