"""What each way to save memory costs in time: every plan over one model, measured in turn in one process."""

from __future__ import annotations

import statistics
from dataclasses import replace

from bench_cases import Case, OurStep, loaded_model, median_ratio, peak, seconds

MIB = 2**20


def memory_lines(case: Case, rounds: int) -> list[dict[str, object]]:
    """A line a plan; `over_plain` is its time over that of the plan that gives nothing up, in the same round."""
    step, chosen = OurStep(loaded_model(case), replace(case, checkpointing=False)), plans(case)
    times: dict[object, list[float]] = {plan: [] for plan in chosen}
    for _ in range(rounds):
        for plan in chosen:
            step.settle(plan)
            step()  # warms up: what a change of plan costs is not a step's
            times[plan].append(seconds(step, case.device))
    return [line(case, plan, step, times[plan], times[chosen[0]]) for plan in chosen]


def plans(case: Case) -> list:
    """Recomputing first, then streaming with every block recomputed, then the batch in parts."""
    from lora_workbench.training.memory import EVERY_BLOCK, RECOMPUTE, RESIDENT, MemoryPlan

    chosen = [MemoryPlan(recompute=recompute) for recompute in RECOMPUTE]
    chosen += [MemoryPlan(recompute=EVERY_BLOCK, resident=share) for share in RESIDENT[1:]]
    return chosen + ([MemoryPlan(parts=case.batch)] if case.batch > 1 else [])


def line(case: Case, plan, step: OurStep, taken: list[float], plain: list[float]) -> dict[str, object]:
    """What was measured of one plan; the peak is what lives beside the weights and adapters."""
    step.settle(plan)
    step()
    return {
        "case": f"{case.size}-{case.family}",
        "family": case.family,
        "batch": case.batch,
        "pixels": case.pixels,
        "dtype": case.dtype,
        "device": case.device,
        "parts": plan.parts,
        "recompute": plan.recompute,
        "resident": plan.resident,
        "seconds": round(statistics.median(taken), 4),
        "over_plain": median_ratio(taken, plain),
        "peak_mb": round(peak(step, case.device) / MIB, 1),
        "weights_mb": round(step.loaded_bytes() / MIB, 1),
    }
