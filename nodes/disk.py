"""Whether the disks have room for a training, asked before any work is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.cache import encodings
from ..training.lora import trained_values
from ..training.memory import STATE_BYTES

if TYPE_CHECKING:
    from .job import Job

_MIB = 1024**2
LARGEST_LATENTS, LARGEST_TEXT = 2 * _MIB, 4 * _MIB
"""What a cached picture of 1024 x 1024 and its mask take at most, and a cached caption (256 tokens of T5 in fp32)."""
FP32 = "fp32"


def check_disk(job: Job) -> None:
    """OSError naming the folder that cannot be written, or the space that is missing."""
    files, work = needed(job)
    for folder, bytes_needed in {job.run.loras: files, job.run.folder.parent: work}.items():
        _check_writable(folder)
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            raise OSError(
                f"The disk of '{folder}' has {free // _MIB:,} MB free, but this training writes about "
                f"{bytes_needed // _MIB:,} MB: free some space, or raise save_every."
            )


def needed(job: Job) -> tuple[int, int]:
    """Bytes that the LoRA files take, and those that states and caches take, at most."""
    plan, settings = job.plan, job.request.settings
    values = trained_values(job.parts, plan.lora)
    file = values * (4 if settings.save_precision == FP32 else 2)
    averaged = 1 if plan.train.ema else 0
    count = -(-plan.train.steps // plan.save_every) * (1 + averaged) + (plan.average_last > 1)
    pictures, texts = encodings(job.dataset, classes=plan.train.objective.preservation > 0)
    # Two states are kept, each with the weights, what the optimizer remembers, and the average.
    state = values * (4 + STATE_BYTES[plan.train.optimizer] + 4 * averaged)
    return count * file, 2 * state + pictures * LARGEST_LATENTS + texts * LARGEST_TEXT


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"The folder '{folder}' cannot be written ({error.strerror}): allow writing to it.") from error
