"""Pictures of a run: the untrained base and every checkpoint, as KSampler with Load LoRA makes them."""

from __future__ import annotations

import glob
import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from ..training.checkpoint import Checkpoint
from ..training.description import add_cover
from ..training.figures import labelled_grid, made_smaller
from ..training.loop import Snapshot
from ..training.run import WriteLora
from ..training.whole_file import patiently, write_atomically
from .host import loras
from .host.progress import Progress, throw_if_cancelled
from .host.sampling import SamplerSettings, encode_prompt, sample_picture
from .lora_writer import lora_name
from .pictures import png_bytes, to_picture

if TYPE_CHECKING:
    from .job import Job

MOST_COLUMNS, MOST_PIXELS = 12, 100_000_000


class Previews:
    """The preview pictures of a run, kept on disk under what decides them, so that none is made twice."""

    def __init__(self, job: Job) -> None:
        self._job, self._request, self._run = job, job.request, job.run
        self._prompts = prompts_of(job.request)
        self._settings = SamplerSettings.square(job.denoiser.family, job.dataset.resolution, job.request.seed)
        self._conditioning: list[list] | None = None
        self.seconds = 0.0
        """How long the last row took to make; 0 while none was."""

    def encode_prompts(self, progress: Progress) -> None:
        """Encode the prompts now, so that the text encoders need not come back while the model trains."""
        if self._conditioning is None:
            progress.phase("Encoding the preview prompts")
            self._conditioning = self._encoded(self._request.clip, self._prompts)

    def _encoded(self, clip, prompts: Sequence[str]) -> list[list]:
        """The conditioning of each prompt, and at the end that of none."""
        return [encode_prompt(clip, prompt) for prompt in (*prompts, "")]

    def show_baseline(self, progress: Progress) -> None:
        """Make the pictures of the untrained base, the column everything else is compared with."""
        self._row(None, progress)

    def show(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Make the pictures of a checkpoint, which the node's panel shows."""
        self._row(checkpoint, progress)

    def show_unsaved(self, snapshot: Snapshot, write_lora: WriteLora, progress: Progress) -> None:
        """Make the pictures of a step that has no checkpoint, from files that are gone afterwards."""
        path, text = self._run.folder / "preview.safetensors", self._job.text
        name = lora_name(self._job, path)
        try:
            write_lora(path, snapshot)
            self.show(Checkpoint(snapshot.step, str(path), name), progress)
        finally:
            path.unlink(missing_ok=True)
            if text is not None and text.tokens is not None:
                text.tokens.remove(name)

    def forget(self, after: int) -> None:
        """Delete the pictures of steps past `after`, and the covers made of them: those steps will be others."""
        covers = (self._run.loras / self._run.name).glob(f"{glob.escape(self._run.name)}_*.preview.png")
        for path in [*(self._run.folder / "previews").glob("*.png"), *covers]:
            step = re.match(r"\d{6,}", path.name.removeprefix(f"{self._run.name}_"))
            if step and int(step[0]) > after:
                with suppress(PermissionError):  # open in a program on Windows: no reason to end a training
                    patiently(path.unlink)

    def strip(self, checkpoints: Sequence[Checkpoint], progress: Progress) -> Image.Image:
        """All previews in one picture: a row a prompt, a column a checkpoint, the untrained base first.

        Those of very many prompts are made smaller, since an IMAGE of them could fill memory; their files are not.
        """
        shown = spread(checkpoints, MOST_COLUMNS - 1)
        columns = [self._row(None, progress)] + [self._row(checkpoint, progress) for checkpoint in shown]
        headings = ["untrained"] + [f"step {checkpoint.step}" for checkpoint in shown]
        count = len(columns) * len(self._prompts)
        rows = [[made_smaller(column[n], count, MOST_PIXELS) for column in columns] for n in range(len(self._prompts))]
        return labelled_grid(rows, headings, self._prompts)

    def rows(self, checkpoints: Sequence[Checkpoint]) -> list[tuple[str, list[tuple[int, Path]]]]:
        """For each prompt the pictures that there are, with their steps, the untrained base's first."""
        places = [(0, None), *((checkpoint.step, checkpoint) for checkpoint in checkpoints)]
        rows = [(prompt, [(step, self._path(entry, prompt)) for step, entry in places]) for prompt in self._prompts]
        return [(prompt, [(step, path) for step, path in row if path.is_file()]) for prompt, row in rows]

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether the pictures of a checkpoint are there."""
        return all(self._path(checkpoint, prompt).is_file() for prompt in self._prompts)

    def _row(self, checkpoint: Checkpoint | None, progress: Progress) -> list[Image.Image]:
        step = checkpoint.step if checkpoint else 0
        paths = [self._path(checkpoint, prompt) for prompt in self._prompts]
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            started = time.perf_counter()
            self.encode_prompts(progress)
            progress.phase(f"Making the previews of step {step}")
            with self._model(checkpoint) as (model, conditioning):
                for number in missing:
                    throw_if_cancelled()
                    picture = self._sample(model, conditioning[number], conditioning[-1])
                    write_atomically(paths[number], png_bytes(picture, self._request.graph.png_info()))
                    progress.live.preview(step, self._prompts[number], paths[number])
            self.seconds = time.perf_counter() - started
        for prompt, path in zip(self._prompts, paths, strict=True):
            progress.live.preview(step, prompt, path)
        pictures = [Image.open(path).convert("RGB") for path in paths]
        if checkpoint is not None and Path(checkpoint.path).parent == self._run.loras / self._run.name:
            give_cover(Path(checkpoint.path), paths[0])
        return pictures

    @contextmanager
    def _model(self, checkpoint: Checkpoint | None) -> Iterator[tuple[object, list[list]]]:
        """The MODEL with the checkpoint on, and what its text encoders say of the prompts.

        Afterwards the weights that it shares with the base are the base's own again.
        """
        if checkpoint is None:
            yield self._request.model, self._conditioning
            return
        lora = loras.read_lora(Path(checkpoint.path))
        try:
            model, clip = loras.apply(self._request.model, self._request.clip, lora, 1.0, 1.0)
            prompts = loras.text_with(lora, checkpoint.lora_name, self._prompts)
            yield model, self._conditioning if prompts is None else self._encoded(clip, prompts)
        finally:
            self._job.denoiser.load()

    def _sample(self, model, positive: list, negative: list) -> Image.Image:
        pixels: Tensor = sample_picture(model, self._request.vae, positive, negative, self._settings)
        return to_picture(pixels)

    def _path(self, checkpoint: Checkpoint | None, prompt: str) -> Path:
        key = hashlib.sha256(f"{prompt}\n{self._settings}\n{self._job.denoiser.identity}".encode()).hexdigest()[:16]
        return self._run.folder / "previews" / f"{checkpoint.step if checkpoint else 0:06d}_{key}.png"


def give_cover(lora: Path, preview: Path) -> None:
    """Put a preview beside and into a LoRA file as its cover, where ComfyUI's model list looks; once a file."""
    beside = lora.with_suffix(".preview.png")
    if not beside.is_file():
        write_atomically(beside, preview.read_bytes())
    # A file that another program holds open cannot be replaced everywhere; then the cover beside it is enough.
    with suppress(PermissionError), Image.open(preview) as picture:
        add_cover(lora, picture)


def prompts_of(request) -> list[str]:
    """One prompt a line; without any, the first caption, which shows what the pictures teach."""
    prompts = [line.strip() for line in request.preview_prompts.splitlines() if line.strip()]
    return prompts or [request.dataset.concepts[0].caption or request.dataset.trigger_word or "a picture"]


def spread(checkpoints: Sequence[Checkpoint], most: int) -> list[Checkpoint]:
    """At most `most` of them, evenly spread, the last always among them."""
    if len(checkpoints) <= most:
        return list(checkpoints)
    places = [round(number * (len(checkpoints) - 1) / (most - 1)) for number in range(most)]
    return [checkpoints[place] for place in places]
