"""A folder of LoRA files from any trainer as the checkpoints of one run.

How far a file was trained it says itself: `lora_workbench.step` (ours), `ss_steps` (kohya and those who follow), or
`training_info` (ai-toolkit). Else its name does: `star-000010` and `star-e10` (epochs), `star-step00000100` and
`star_000000500` (steps), `2025-01-31_12-00-00-save-1500-10-0` (OneTrainer: step, epoch, step of the epoch), and the
folder of `checkpoint-500/pytorch_lora_weights` (diffusers). A file without a number beside others with one is the end.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, Checkpoints
from .dataset import natural_key
from .description import OURS, read, trigger_words

SUFFIXES = (".safetensors", ".sft")
"""No others: what else lies beside LoRA files are the states of optimizers."""
WEIGHTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers, PEFT and diffusion-pipe call the file in the folder of a step."""
STEP_FOLDER = re.compile(r"(checkpoint|epoch|step)[-_]?\d+", re.IGNORECASE)
NUMBERS = (
    re.compile(r"-save-(\d+)-\d+-\d+$"),
    re.compile(r"(?<![a-z])steps?[-_ ]?(\d+)"),
    re.compile(r"(\d+)[-_ ]?steps?(?![a-z])"),
    re.compile(r"(?<![a-z])(?:epoch|ep|e)[-_ ]?(\d+)(?![a-z])"),
    re.compile(r"(?:^|[-_ ])(\d+)(?:_ema)?$"),
)
"""How names tell a number, the plainest first."""


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    """Relative to the folder, without ending."""
    entries: Mapping[str, str]

    @property
    def step(self) -> int | None:
        return step_told(self.entries)


def series(folder: Path, root: Path) -> Checkpoints:
    """The LoRA files of a folder inside the loras folder `root`, in order of their steps, then of their names.

    Files that cannot be read are entries too. ValueError when there is none, or the folder lies elsewhere.
    """
    folder = _inside(folder, root)
    files = [_described(path, folder) for path in _lora_files(folder)]
    if not files:
        raise ValueError(f"The folder '{folder}' holds no LoRA file: put .safetensors files into it or name another.")
    entries = [
        Checkpoint(
            step,
            str(file.path),
            str(file.path.relative_to(os.path.abspath(root))),
            average=file.entries.get(f"{OURS}average", ""),
        )
        for file, step in zip(files, _steps(files), strict=True)
    ]
    entries.sort(key=lambda entry: entry.step)
    return Checkpoints(
        folder.name,
        str(folder),
        next((word for file in files for word in trigger_words(file.entries)), ""),
        tuple(entry for entry in entries if not entry.average),
        averages=tuple(entry for entry in entries if entry.average),
    )


def folders_with_loras(root: Path) -> list[str]:
    """The folders at and below `root` that hold LoRA files, relative to it with /, itself as "."; in natural order.

    Folders that cannot be opened are passed over.
    """
    found = []
    for place, folders, files in os.walk(root, followlinks=True):
        if any(map(_is_lora, files)) or any(_weights_in(place, name) for name in folders):
            found.append(Path(place).relative_to(root).as_posix())
        folders[:] = [name for name in folders if not name.startswith(".") and not STEP_FOLDER.fullmatch(name)]
    return sorted(found, key=natural_key)


def state_of(folder: Path) -> list[tuple[str, int]]:
    """The LoRA files of a folder and their times of change, so that edits are noticed; [] for one that is not there.

    Pictures and runs beside them do not count, nor what `description.amend` says of a file.
    """
    try:
        return [(str(path), path.stat().st_mtime_ns) for path in _lora_files(folder)]
    except OSError:
        return []


def step_told(entries: Mapping[str, str]) -> int | None:
    """The step a file says it is of, None when it says none."""
    for told in (entries.get(f"{OURS}step"), entries.get("ss_steps"), _training_info(entries)):
        if told is not None and re.fullmatch(r"\d{1,9}", str(told).strip()):
            return int(told)
    return None


def number_in(name: str) -> int | None:
    """The number of steps or epochs in a name, None when there is none."""
    for pattern in NUMBERS:
        if found := pattern.search(name.lower()):
            return int(found[1])
    return None


def _training_info(entries: Mapping[str, str]) -> object:
    try:
        info = json.loads(entries.get("training_info", "{}"))
    except ValueError:
        return None
    return info.get("step") if isinstance(info, dict) else None


def _inside(folder: Path, root: Path) -> Path:
    # Links inside the loras folder may lead anywhere, since the user made them; a name with .. in it may not.
    folder, root = Path(os.path.abspath(folder)), Path(os.path.abspath(root))
    if not folder.is_relative_to(root):
        raise ValueError(f"The folder '{folder}' is not inside the loras folder: choose one of those in the list.")
    if not folder.is_dir():
        raise ValueError(f"The folder '{folder}' is not there: choose another one from the list.")
    return folder


def _lora_files(folder: Path) -> list[Path]:
    """The LoRA files of a folder, and those in its folders of single steps, in natural order of their names."""
    found = []
    for name in sorted(os.listdir(folder), key=lambda name: (natural_key(name), name)):
        if _is_lora(name) and os.path.isfile(folder / name):
            found.append(folder / name)
        found += _weights_in(folder, name)
    return found


def _is_lora(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _weights_in(folder: str | Path, name: str) -> list[Path]:
    """The LoRA in a folder's sub-folder of a single step, if that is what it is."""
    if not STEP_FOLDER.fullmatch(name):
        return []
    return [path for weights in WEIGHTS if os.path.isfile(path := Path(folder, name, weights))]


def _described(path: Path, folder: Path) -> _File:
    try:
        entries = read(path)
    except ValueError:  # it is named as broken when it is measured
        entries = {}
    within = path.relative_to(folder)
    # In the folder of a step every file is called the same, so that folder is its name.
    return _File(path, within.parts[0] if len(within.parts) > 1 else within.stem, entries)


def _steps(files: Sequence[_File]) -> list[int]:
    """The step of each file; numbers in names count in whatever the files that say both count in."""
    names = [file.name for file in files]
    numbers = [None if _is_end(name, names) else number_in(name) for name in names]
    ratios = [file.step / number for file, number in zip(files, numbers, strict=True) if number and file.step]
    each = statistics.median(ratios) if ratios else 1
    steps = [
        round(number * each) if file.step is None and number is not None else file.step
        for file, number in zip(files, numbers, strict=True)
    ]
    return _filled(steps)


def _is_end(name: str, names: Sequence[str]) -> bool:
    """Whether others are called like it with more behind, as the last file of kohya's and ai-toolkit's runs is."""
    return any(other.startswith((f"{name}-", f"{name}_")) for other in names)


def _filled(steps: Sequence[int | None]) -> list[int]:
    """Files that tell no step follow the others, as far apart as the nearest of those."""
    known = sorted({step for step in steps if step is not None})
    apart = min((after - before for before, after in zip(known, known[1:], strict=False)), default=1)
    following = known[-1] if known else 0
    filled = []
    for step in steps:
        if step is None:
            step = following = following + apart
        filled.append(step)
    return filled
