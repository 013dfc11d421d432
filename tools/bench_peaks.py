"""The peak memory of a step of full-size networks, counted tensor by tensor, so that a CPU and its memory will do.

FLUX.1 takes more than most machines have. It is measured with one and two blocks of each kind, of full width, and
every further block adds what the second one added.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

from bench_cases import FULL_PIXELS, STORED_AND_COMPUTED, Case, OurStep, peak

MIB = 2**20
FEWEST = {"depth": 1, "depth_single_blocks": 1}


@dataclass(frozen=True)
class Figures:
    """Bytes: what lives beside weights and adapters at the worst moment of a step, the adapters, and the weights."""

    peak: float
    adapters: float
    weights: float

    def plus(self, other: Figures, less: Figures, times: int) -> Figures:
        """These and `times` the difference of two others."""
        mine, more, fewer = (vars(figures).values() for figures in (self, other, less))
        return Figures(*(value + times * (a - b) for value, a, b in zip(mine, more, fewer, strict=True)))


def peak_line(case: Case, recompute: str) -> dict[str, object]:
    """What a step of the whole network takes; the optimizer remembers twice the adapters beside it."""
    found = of_blocks(case, recompute) if case.family == "flux" else measured(case, recompute)
    return {
        "case": f"full-{case.family}",
        "family": case.family,
        "batch": case.batch,
        "pixels": FULL_PIXELS,
        "dtype": case.dtype,
        "device": case.device,
        "recompute": recompute,
        "peak_mb": round(found.peak / MIB, 1),
        "adapters_mb": round(found.adapters / MIB, 1),
        "weights_mb": round(found.weights / MIB, 1),
    }


def of_blocks(case: Case, recompute: str) -> Figures:
    """FLUX.1 whole, from networks of two and three blocks."""
    from toyworld.node_pack.models import FULL_FLUX

    fewest = whole = measured(case, recompute, **FEWEST)
    for kind, number in FEWEST.items():
        more = measured(case, recompute, **{**FEWEST, kind: number + 1})
        whole = whole.plus(more, fewest, FULL_FLUX[kind] - number)
    return whole


def measured(case: Case, recompute: str, **blocks: int) -> Figures:
    """One step of a network with random weights; `blocks` change how many it has."""
    from lora_workbench.training.memory import MemoryPlan
    from toyworld.node_pack import models

    model = models.full_size(case.family, case.device, *STORED_AND_COMPUTED[case.dtype], **blocks)
    step = OurStep(model, case, MemoryPlan(recompute=recompute))
    try:
        return Figures(peak(step, case.device), step.adapter_bytes, step.loaded_bytes())
    finally:
        step.release()
        del step, model
        gc.collect()
