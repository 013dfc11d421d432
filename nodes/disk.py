"""Whether the disks take what a training writes, asked before any work is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.cache import encodings
from ..training.embeddings import embedding_names
from ..training.lora import trained_values
from ..training.memory import STATE_BYTES
from .host import folders

if TYPE_CHECKING:
    from .job import Job

_MIB = 1024**2
LARGEST_LATENTS, LARGEST_TEXT = 2 * _MIB, 4 * _MIB
"""What a cached picture of 1024 x 1024 and its mask take at most, and a cached caption (256 tokens of T5 in fp32)."""
FP32 = "fp32"
LONGEST_FILE_NAME, LONGEST_WINDOWS_PATH = 255, 259
"""Bytes, and characters unless the user has allowed longer ones."""


def check_disk(job: Job) -> None:
    """OSError naming the folder that cannot be written, the name that is too long, or the space that is missing.

    ValueError naming the LoRA whose words a new run would write its own over.
    """
    for folder, longest in _longest(job).items():
        _check_writable(folder)
        for file in longest:
            _check_length(folder, file)
    _check_words(job)
    files, work = needed(job)
    for folder, bytes_needed in {job.run.loras: files, job.run.folder.parent: work}.items():
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            raise OSError(
                f"The disk of '{folder}' has {free // _MIB:,} MB free, but this training writes about "
                f"{bytes_needed // _MIB:,} MB: free some space, or raise save_every."
            )


def needed(job: Job) -> tuple[int, int]:
    """Bytes that the LoRA files and those that states and caches take, at most, beside what is there already."""
    plan, settings = job.plan, job.request.settings
    values = trained_values(job.parts, plan.lora)
    file = values * (4 if settings.save_precision == FP32 else 2)
    averaged = 1 if plan.train.ema else 0
    left = plan.train.steps - job.run.step
    count = -(-left // plan.save_every) * (1 + averaged) + (plan.average_last > 1)
    pictures, texts = encodings(
        job.dataset, job.encoder, folders.cache_folder(), classes=plan.train.objective.preservation > 0
    )
    # Two states are kept, each with the weights, what the optimizer remembers, and the average.
    state = values * (4 + STATE_BYTES[plan.train.optimizer] + 4 * averaged)
    return count * file, 2 * state + pictures * LARGEST_LATENTS + texts * LARGEST_TEXT


def _longest(job: Job) -> dict[Path, list[str]]:
    """Each folder that is written to, with the longest names in it, sub-folders included."""
    run, text = job.run, job.text
    lora = f"{run.name}/{run.name}_{job.plan.train.steps:06d}{'_ema' if job.plan.train.ema else ''}.safetensors"
    found = {run.loras: [lora], run.folder.parent: [f"{run.name}/previews/000000_0123456789abcdef.png"]}
    if text is not None and text.tokens is not None:
        names = embedding_names(text.tokens.triggers, lora).values()
        found[folders.embeddings_folder()] = [f"{name}.safetensors" for name in names]
    return found


def _check_words(job: Job) -> None:
    run, text = job.run, job.text
    if text is None or text.tokens is None or run.step:
        return
    place = _words_folder(run.name)
    for folder in run.loras.glob("*/") if (folders.embeddings_folder() / place).is_dir() else ():
        other = folder.name
        if other.casefold() != run.name.casefold() and _words_folder(other).casefold() == place.casefold():
            raise ValueError(
                f"The new words of '{run.name}' would be written over those of '{other}', as prompts call both "
                f"'{place}': choose another name."
            )
    taken = folders.embeddings_folder() / place
    if not run.fact("wrote_words") and taken.is_dir() and any(taken.iterdir()):
        raise ValueError(
            f"'{taken}' holds embeddings that are not of this training, and its new words would be written among "
            "them: choose another name, or move them."
        )
    run.remember(wrote_words=True)


def _words_folder(run_name: str) -> str:
    (place,) = embedding_names([""], f"{run_name}/a.safetensors").values()
    return place.rpartition("/")[0]


def _check_length(folder: Path, file: str) -> None:
    name = file.rpartition("/")[2]
    if not _takes(folder, name):
        raise OSError(
            f"The file name '{name}' has {len(name.encode())} bytes, too many for the disk of '{folder}': "
            "shorten the name or the trigger word."
        )
    over = len(str(folder / file)) - LONGEST_WINDOWS_PATH
    # In the folder itself, since a folder of a run's name says that there is a run.
    if over > 0 and not _takes(folder, file.replace("/", "_").encode()[:LONGEST_FILE_NAME].decode(errors="ignore")):
        raise OSError(
            f"The path of '{file}' in '{folder}' is {over} characters too long for this system: "
            "shorten the name, or allow long paths in Windows."
        )


def _takes(folder: Path, name: str) -> bool:
    """Whether a file in the folder can have a name of these characters; none is left."""
    tried = folder / f".{name[1:]}"
    try:
        tried.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    tried.unlink()
    return True


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise OSError(f"The folder '{folder}' cannot be written ({error.strerror}): allow writing to it.") from error
