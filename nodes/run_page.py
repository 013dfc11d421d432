"""The HTML report of a job, put together from what the job knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..training import contact_sheet, dataset_report, run_report
from ..training.description import OURS, read, settings_of
from .host.proof import Proof

if TYPE_CHECKING:
    from .job import Job
    from .previews import Previews


def write_report(job: Job, previews: Previews, proof: Proof) -> Path:
    """Write `report.html` into the run's folder, where it differs from what is there; returns its path.

    It is about the whole run: a queueing that asks for fewer steps than there are leaves it as it is.
    """
    checkpoints = job.run.result(job.plan.train.steps, job.dataset.trigger_word)
    there = job.run.folder / run_report.FILE
    if there.is_file() and checkpoints.entries[-1].step < job.run.step:
        return there
    told = read(Path(checkpoints.entries[-1].path))
    strength = told.get(f"{OURS}strength")
    findings = run_report.Findings(
        checkpoints,
        family=job.denoiser.family.title,
        plan=str(job.plan),
        settings=settings_of(told),
        proof=f"{checkpoints.entries[-1].lora_name}: {proof}.",
        previews=previews.rows(checkpoints.entries),
        sheet=contact_sheet.draw(job.dataset),
        dataset=dataset_report.describe(job.dataset),
        workflow=job.request.graph.needed(),
        strength=float(strength) if strength else None,
    )
    return run_report.write(job.run, findings)
