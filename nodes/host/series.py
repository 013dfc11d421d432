"""Curves that stay short however long a training is."""

from __future__ import annotations

import math

Point = tuple[int, float]


class Series:
    """Points (step, value) in order. At `most` of them, an even number, each two neighbours become their mean."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.points: list[Point] = []
        self._width = 1
        self._group: list[float] = []

    def add(self, step: int, value: float) -> bool:
        """Add a point; True when earlier points are others now. What is no finite number is left out."""
        if not math.isfinite(value):
            return False
        changed = self.back_to(step - 1)
        self._group.append(value)
        if len(self._group) == self._width:
            self.points.append((step, sum(self._group) / self._width))
            self._group = []
        if len(self.points) == self.most:
            self._thin()
            changed = True
        return changed

    def back_to(self, step: int) -> bool:
        """Forget what came after a step, as the training does that part again; True when there was something."""
        kept = len(self.points)
        while kept and self.points[kept - 1][0] > step:
            kept -= 1
        if kept == len(self.points):
            return False
        del self.points[kept:]
        self._group = []
        return True

    def _thin(self) -> None:
        pairs = zip(self.points[::2], self.points[1::2], strict=True)
        self.points = [(step, (one + other) / 2) for (_, one), (step, other) in pairs]
        self._width *= 2
