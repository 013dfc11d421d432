"""How a training fits: the memory it needs, the choices there are, and the first of them that fits.

Arithmetic alone; what is free and what a step really takes is measured by the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

NO_BLOCK, EVERY_SECOND_BLOCK, EVERY_BLOCK = "no", "every second block", "every block"
RECOMPUTE = (NO_BLOCK, EVERY_SECOND_BLOCK, EVERY_BLOCK)
KEPT = {NO_BLOCK: 1.0, EVERY_SECOND_BLOCK: 0.54, EVERY_BLOCK: 1 / 12}
"""Share of the activations that live at the worst moment (docs/benchmarks.md)."""
RESIDENT = (1.0, 0.75, 0.5, 0.25, 0.0)
MARGIN = 1.08
"""What is left free beside a prediction: allocators do not fill memory without gaps."""
STATE_BYTES = {"adamw": 8, "adamw 8-bit": 2, "adafactor": 1, "prodigy": 16, "lion": 4, "schedule-free": 8}
"""Bytes that an optimizer keeps for each trained value."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is given up in time for memory; none of it changes what is learned, but adapter dropout's draws in parts."""

    parts: int = 1
    """In how many parts a batch goes through the network."""
    recompute: str = NO_BLOCK
    """Which blocks keep their inputs alone and are computed again in backward."""
    resident: float = 1.0
    """Share of the weights that stays on the device; the others come from main memory each time they are read."""

    def __str__(self) -> str:
        return ", ".join(
            [
                "the batch at once" if self.parts == 1 else f"the batch in {self.parts} parts",
                "all activations kept" if self.recompute == NO_BLOCK else f"{self.recompute} recomputed in backward",
                "all weights on the device"
                if self.resident == 1
                else f"{100 - 100 * self.resident:.0f} % of the weights streamed from main memory",
            ]
        )


@dataclass(frozen=True)
class Needs:
    """What a training puts on the device, in bytes."""

    weights: int
    """The model as it is stored: half of it when it is stored in 8 bits."""
    activations: int
    """All that the largest batch keeps for backward when nothing is recomputed."""
    adapters: int
    """Trained values, their gradients, the optimizer's state and the averaged copy."""
    largest_layer: int = 0
    """The largest single weight in the precision it is computed with."""
    beside: int = 0
    """Other models that are trained along and stay whole, such as text encoders."""

    def peak(self, plan: MemoryPlan) -> int:
        """Bytes at the worst moment of a step."""
        return self._beside_activations(plan) + int(self.activations * _kept(plan))

    def beside_weights(self, plan: MemoryPlan) -> int:
        """Of these, what must be free when the models have been loaded."""
        return self.peak(plan) - int(self.weights * plan.resident) - self.beside

    def corrected(self, plan: MemoryPlan, measured_peak: int) -> Needs:
        """The same with the activations that explain what a step under `plan` was measured to take."""
        activations = max(0, measured_peak - self._beside_activations(plan)) / _kept(plan)
        return replace(self, activations=int(activations))

    def _beside_activations(self, plan: MemoryPlan) -> int:
        # Weights that stream pass through two buffers, those that are cast through one.
        return int(self.weights * plan.resident) + 2 * self.largest_layer + self.adapters + self.beside


def _kept(plan: MemoryPlan) -> float:
    return KEPT[plan.recompute] / plan.parts


@dataclass(frozen=True)
class Choices:
    """The plans that are open for a batch, from the fastest to the smallest."""

    batch: int = 1
    recompute: tuple[str, ...] = RECOMPUTE
    resident: tuple[float, ...] = RESIDENT
    """Where there is no other memory to stream from, 1.0 alone."""

    @property
    def first(self) -> MemoryPlan:
        """The fastest."""
        return MemoryPlan(1, self.recompute[0], self.resident[0])

    def __iter__(self) -> Iterator[MemoryPlan]:
        plan, step = self.first, True
        while step:
            yield plan
            if step := self.stepped_down(plan):
                plan, _ = step

    def stepped_down(self, plan: MemoryPlan) -> tuple[MemoryPlan, str] | None:
        """The next plan that takes less memory, and what moved in words; None when nothing is left to move.

        What costs the least time moves first: a batch in parts takes as many products as one at once, recomputing a
        third more, and streaming hides behind them only while they are long.
        """
        if plan.parts < self.batch:
            parts = min(self.batch, 2 * plan.parts)
            return replace(plan, parts=parts), f"the batch now goes through the model in {parts} parts"
        if (recompute := _after(self.recompute, plan.recompute)) is not None:
            return replace(plan, recompute=recompute), f"{recompute} is now recomputed in backward"
        if (resident := _after(self.resident, plan.resident)) is not None:
            return (
                replace(plan, resident=resident),
                f"{100 - 100 * resident:.0f} % of the weights now stream from main memory",
            )
        return None

    def fitting(self, needs: Needs, free: int) -> MemoryPlan:
        """The fastest plan that fits into `free` bytes with a margin; the smallest when none does."""
        for plan in self:
            if fits(needs.peak(plan), free):
                break
        return plan


def fits(peak: int, free: int) -> bool:
    """Whether a predicted peak leaves the margin that predictions need."""
    return peak * MARGIN <= free


def _after(choices: tuple, current: object) -> object | None:
    """The choice that follows; None after the last."""
    place = choices.index(current) + 1
    return choices[place] if place < len(choices) else None


def trained_bytes(values: int, optimizer: str, averaged: bool) -> int:
    """Bytes of so many trained float32 values with their gradients, optimizer state and averaged copy."""
    return values * (4 + 4 + STATE_BYTES[optimizer] + (4 if averaged else 0))
