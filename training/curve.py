"""What a loss curve says, once the noise levels are taken out of it.

The loss of a step depends on its noise level far more than on what was learned. So each loss is compared with losses
at the same level: of y = ln(loss) the median at that level is taken off, found in tenths of the levels and between them
by a straight line. What is left is cut into at most 24 blocks of time, each with its median and the standard error of
that, 1.2533 x 1.4826 MAD / sqrt(n). The trend is the Theil-Sen slope with its 95 % interval (Sen 1968). A flat curve is
nothing bad: diffusion losses fall little while pictures change much, so only held-out pictures decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BROKEN, ERRATIC, DIVERGING, RISING = "broken numbers", "erratic", "diverging", "drops then rises"
SPIKY, FLAT, FALLING, SETTLED, UNCLEAR = "spiky", "flat", "still falling", "settled", "too noisy to tell"
SENTENCES = {
    BROKEN: "{count} of {total} losses were not finite numbers: lower learning_rate, or look for a broken picture.",
    ERRATIC: "The loss goes up and down all the time: lower learning_rate, or raise batch_size or accumulation.",
    DIVERGING: "The loss rises: lower learning_rate and train again.",
    RISING: (
        "The loss fell until about step {step} and rises since: use a checkpoint from before that, or lower "
        "learning_rate."
    ),
    SPIKY: "Single losses are far above all others ({count}, e.g. at step {step}): try loss huber.",
    FLAT: (
        "The training loss stays where it was, which is usual for diffusion models: judge by held-out pictures and "
        "previews."
    ),
    FALLING: "The loss was still falling at the end: more steps may help.",
    SETTLED: (
        "The training loss fell and then levelled off; pictures may go on changing, so judge by held-out pictures and "
        "previews."
    ),
    UNCLEAR: "The losses are too few or too noisy to tell: judge by held-out pictures and previews.",
}
FEWEST, MOST_BLOCKS, SHOWN_BLOCKS = 60, 24, 60
"""Below so many points nothing is said; blocks of a diagnosis and of a chart."""

Point = tuple[float, float, float | None]
"""Step, loss, and noise level where it is known. A step has a point for each of its pictures."""


@dataclass(frozen=True)
class Diagnosis:
    """What kind of curve it is, and a sentence for its owner."""

    kind: str
    sentence: str


def smoothed(points: Sequence[Point], blocks: int = SHOWN_BLOCKS) -> list[tuple[float, float]]:
    """The loss over time as it would be if all noise levels were the middle one: (step, median) of each block.

    A block holds at least ten points as soon as there are as many. What is not a finite number is left out.
    """
    steps, rest, middle = _without_levels(points)
    cuts = _cuts(len(steps), blocks, at_least=10)
    return [(float(steps[cut].mean()), math.exp(middle + np.median(rest[cut]))) for cut in cuts]


class Smoother:
    """`smoothed` of a run that goes on, taken anew only when there is as much again as one block of it."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._curve: list[tuple[float, float]] = []
        self._known = 0

    def add(self, step: int, losses: Sequence[float], sigmas: Sequence[float]) -> None:
        """Add the pictures of a step; of a run that was rolled back, what it does again replaces what it did."""
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        self._points += [(step, loss, sigma) for loss, sigma in zip(losses, sigmas, strict=True)]
        if len(self._points) <= self._known:
            self._known = 0

    def curve(self) -> list[tuple[float, float]]:
        """The curve up to now, or up to a block ago."""
        if len(self._points) >= self._known * (1 + 1 / SHOWN_BLOCKS):
            self._curve, self._known = smoothed(self._points), len(self._points)
        return self._curve


def diagnose(points: Sequence[Point]) -> Diagnosis:
    """What kind of curve these losses make; without noise levels only what shows through them is claimed."""
    broken = sum(not math.isfinite(loss) for _, loss, _ in points)
    if broken:
        return _said(BROKEN, count=broken, total=len(points))
    steps, rest, _ = _without_levels(points)
    if len(steps) < FEWEST:
        return _said(UNCLEAR)
    blocks = _Blocks(steps, rest)
    known = _levels_known(points)
    if known and blocks.turns() >= max(4, 0.2 * len(blocks.medians)):
        return _said(ERRATIC)
    if blocks.medians[-1] - blocks.medians[0] > max(0.25, 4 * blocks.error):
        return _said(DIVERGING)
    lowest = blocks.lowest()
    if (
        known
        and blocks.rise(lowest) > max(0.10, 4 * blocks.error)
        and blocks.drop(lowest) > max(0.05, 3 * blocks.error)
    ):
        return _said(RISING, step=round(blocks.middles[lowest]))
    spikes = blocks.spikes()
    if len(spikes) >= max(3, 0.005 * len(steps)):
        return _said(SPIKY, count=len(spikes), step=round(spikes[0]))
    if not known:
        return _said(UNCLEAR)
    if blocks.drop(lowest) < max(0.03, 3 * blocks.error):
        return _said(FLAT)
    return _said(FALLING if blocks.falls() else SETTLED)


class _Blocks:
    """A curve cut into blocks of time: when each is (`middles`), where it lies, and how sure that is (`error`)."""

    def __init__(self, steps: np.ndarray, rest: np.ndarray) -> None:
        self._steps = steps
        cuts = _cuts(len(steps), MOST_BLOCKS, at_least=10)
        self.middles = np.array([steps[cut].mean() for cut in cuts])
        self.medians = np.array([np.median(rest[cut]) for cut in cuts])
        self._residuals = np.concatenate([rest[cut] - median for cut, median in zip(cuts, self.medians, strict=True)])
        self._spread = max(1.4826 * float(np.median(np.abs(self._residuals))), 1e-9)
        self.error = 1.2533 * self._spread / math.sqrt(len(steps) / len(cuts))

    def turns(self) -> int:
        """How often the curve turns round between two blocks, each time by more than chance."""
        moves = np.diff(self.medians)
        large = moves[np.abs(moves) > max(0.10, 4 * self.error)]
        return int((np.sign(large[1:]) != np.sign(large[:-1])).sum())

    def lowest(self) -> int:
        """The block around which the curve is lowest."""
        return int(np.argmin(_running_median(self.medians)))

    def drop(self, block: int) -> float:
        """How far the curve has fallen until a block."""
        return float(self.medians[0] - _running_median(self.medians)[block])

    def rise(self, block: int) -> float:
        """How far the curve has risen since a block."""
        smooth = _running_median(self.medians)
        return float(smooth[-1] - smooth[block])

    def spikes(self) -> np.ndarray:
        """The steps that lie more than six standard deviations above their block."""
        return self._steps[self._residuals / self._spread > 6]

    def falls(self) -> bool:
        """Whether the second half falls, by more than chance and enough to matter."""
        half = len(self.medians) // 2
        middles, medians = self.middles[half:], self.medians[half:]
        slope, _, highest = theil_sen(middles, medians)
        return highest < 0 and -slope * (middles[-1] - middles[0]) > max(0.02, 2 * self.error)


def theil_sen(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """The median slope over all pairs of points, and its 95 % interval by Kendall's variance (Sen 1968)."""
    first, second = np.triu_indices(len(x), 1)
    slopes = np.sort((y[second] - y[first]) / (x[second] - x[first]))
    n = len(x)
    half = 1.96 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18) / 2
    low = max(0, round(len(slopes) / 2 - half))
    high = min(len(slopes) - 1, round(len(slopes) / 2 + half))
    return float(np.median(slopes)), float(slopes[low]), float(slopes[high])


def _without_levels(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps in order, ln(loss) less its median at that noise level, and ln(loss) in the middle of all levels."""
    kept = sorted((p for p in points if math.isfinite(p[1]) and p[1] > 0), key=lambda point: point[0])
    steps = np.array([step for step, _, _ in kept], dtype=float)
    logs = np.array([math.log(loss) for _, loss, _ in kept])
    if not kept:
        return steps, logs, 0.0
    middle = float(np.median(logs))
    if not _levels_known(kept):
        return steps, logs - middle, middle
    levels = np.array([sigma for _, _, sigma in kept], dtype=float)
    places = np.argsort(np.argsort(levels, kind="stable"), kind="stable")
    tenths = np.array_split(np.argsort(levels, kind="stable"), max(1, min(10, len(kept) // 10)))
    centres = [places[tenth].mean() for tenth in tenths]
    return steps, logs - np.interp(places, centres, [np.median(logs[tenth]) for tenth in tenths]), middle


def _levels_known(points: Sequence[Point]) -> bool:
    return all(sigma is not None and math.isfinite(sigma) for _, _, sigma in points)


def _cuts(count: int, most: int, at_least: int) -> list[slice]:
    """`count` points in as many equal runs as there can be with at least so many points each, and at most `most`."""
    if count == 0:
        return []
    ends = np.linspace(0, count, max(1, min(most, count // at_least)) + 1).round().astype(int).tolist()
    return [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]


def _running_median(values: np.ndarray) -> np.ndarray:
    """The median of each value and its neighbours; the ends keep two."""
    return np.array([np.median(values[max(0, i - 1) : i + 2]) for i in range(len(values))])


def _said(kind: str, **facts: object) -> Diagnosis:
    return Diagnosis(kind, SENTENCES[kind].format(**facts))
