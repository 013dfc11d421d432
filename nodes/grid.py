"""The grid: what the checkpoints draw of the prompts, as Load LoRA and KSampler draw it, and nothing drawn twice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from PIL import Image

from ..training.checkpoint import Checkpoint, Checkpoints
from ..training.figures import labelled_grid, made_smaller
from ..training.lora_content import content_of
from ..training.picking import Decision
from ..training.whole_file import write_atomically
from .host import folders, loras
from .host.identity import identity_of
from .host.progress import Progress, throw_if_cancelled
from .host.sampling import SamplerSettings, encode_prompt, sample_picture
from .host.surroundings import surroundings_of
from .pictures import png_bytes, to_picture

SHORTLIST, EVERYTHING, NOTHING = "shortlist", "everything", "nothing"
SCOPES = (SHORTLIST, EVERYTHING, NOTHING)
MOST_SHORTLISTED = 4
"""Checkpoints in the shortlist, beside the untrained model."""
MOST_PIXELS = 32_000_000
"""In the picture of a whole grid: 30 pictures of 1024 x 1024."""


@dataclass(frozen=True)
class Column:
    """One checkpoint at one strength, of model and CLIP alike; without a checkpoint the untrained model."""

    checkpoint: Checkpoint | None = None
    strength: float = 1.0

    @property
    def label(self) -> str:
        """What stands over the column."""
        if self.checkpoint is None:
            return "untrained"
        return self.checkpoint.heading + ("" if self.strength == 1 else f" at {self.strength:g}")


@dataclass(frozen=True)
class Cell:
    """One picture of the grid: of which column, of which prompt by number, and its file."""

    column: Column
    prompt: int
    path: Path

    @property
    def lora(self) -> str | None:
        """The name of the LoRA; None for the untrained model."""
        return None if self.column.checkpoint is None else self.column.checkpoint.lora_name

    @property
    def strength(self) -> float:
        return self.column.strength


@dataclass(frozen=True)
class Grid:
    """The cells, column by column, every prompt in each."""

    columns: tuple[Column, ...] = ()
    prompts: tuple[str, ...] = ()
    cells: tuple[Cell, ...] = ()

    def picture(self, mark: Checkpoint | None = None) -> Image.Image:
        """All in one picture, the column of `mark` called picked; without cells a small blank one.

        Where there are so many that nobody could look at it they are made smaller; their files stay as they are.
        """
        if not self.cells:
            return Image.new("RGB", (64, 64), "white")
        rows: list[list[Image.Image]] = [[] for _ in self.prompts]
        for cell in self.cells:
            with Image.open(cell.path) as picture:
                rows[cell.prompt].append(made_smaller(picture.convert("RGB"), len(self.cells), MOST_PIXELS))
        return labelled_grid(rows, [_marked(column, mark) for column in self.columns], self.prompts)


def _marked(column: Column, mark: Checkpoint | None) -> str:
    is_picked = mark is not None and column.checkpoint is not None and column.checkpoint.lora_name == mark.lora_name
    return column.label + (" (picked)" if is_picked else "")


def columns(
    checkpoints: Checkpoints, decision: Decision, scope: str, strengths: Sequence[float] = (1.0,)
) -> list[Column]:
    """The untrained model, and beside it what `scope` asks for at each strength but 0; broken files are left out."""
    if scope == NOTHING:
        return []
    broken = {checkpoint.lora_name for checkpoint in decision.broken}
    there = [entry for entry in in_order(checkpoints) if entry.lora_name not in broken]
    shown = there if scope == EVERYTHING else _shortlist(there, decision)
    wanted = [strength for strength in dict.fromkeys(strengths) if strength] or [1.0]
    return [Column(), *(Column(checkpoint, strength) for checkpoint in shown for strength in wanted)]


def in_order(checkpoints: Checkpoints) -> list[Checkpoint]:
    """Checkpoints and averages by step; at one step first the weights as trained."""
    return sorted((*checkpoints.entries, *checkpoints.averages), key=lambda entry: (entry.step, bool(entry.average)))


def _shortlist(there: list[Checkpoint], decision: Decision) -> list[Checkpoint]:
    """The suggested one, one before and one after it, and the last; where one of these is missing, another near it.

    Before and after are the ends of what is equally good, as neighbours within it would look the same.
    """
    picked = decision.checkpoint.lora_name
    # Averages lie so close to the steps they are made of that they would only push these out.
    pool = [entry for entry in there if not entry.average or entry.lora_name == picked]
    names = [entry.lora_name for entry in pool]
    place = names.index(picked) if picked in names else len(names) - 1
    safe = [names.index(entry.lora_name) for entry in decision.safe if entry.lora_name in names] or [place]
    before = min(safe) if min(safe) < place else place - 1
    after = max(safe) if max(safe) > place else place + 1
    nearest = sorted(range(len(pool)), key=lambda number: (abs(number - place), number))
    wanted = [place, before, after, len(pool) - 1, *nearest]
    chosen = list(dict.fromkeys(number for number in wanted if 0 <= number < len(pool)))
    return [pool[number] for number in sorted(chosen[:MOST_SHORTLISTED])]


def draw(
    model,
    clip,
    vae,
    columns: Iterable[Column],
    prompts: Iterable[str],
    settings: SamplerSettings,
    progress: Progress,
    told: Callable[[Cell], None] = lambda cell: None,
) -> Grid:
    """Every prompt drawn by every column, each cell told as soon as its file is there.

    Files are named after all that decides a picture, so only what is not there yet is drawn. ValueError naming a LoRA
    file that cannot be read; ComfyUI's interrupt on cancel, which keeps what is drawn.
    """
    columns, prompts = tuple(columns), tuple(prompts)
    if not columns or not prompts:
        return Grid()
    artist = _Artist(model, clip, vae, settings)
    cells: list[Cell] = []
    for column in columns:
        said = artist.said(column, prompts)
        paths = [artist.path(column, text) for text in said]
        drawing = artist.hand(column)
        for number, (text, path) in enumerate(zip(said, paths, strict=True)):
            throw_if_cancelled()
            if not path.is_file():
                _tell(progress, column, len(cells), len(columns) * len(prompts))
                write_atomically(path, png_bytes(drawing(text)))
            cells.append(Cell(column, number, path))
            told(cells[-1])
            progress.update(len(cells), len(columns) * len(prompts))
    return Grid(columns, prompts, tuple(cells))


def _tell(progress: Progress, column: Column, done: int, total: int) -> None:
    progress.live.phase(f"Drawing {column.label}", done, total)
    progress.line(f"Drawing {column.label}: picture {done + 1} of {total}")


class _Artist:
    """Draws with one model, CLIP, VAE and sampler, and knows where the pictures are kept."""

    def __init__(self, model, clip, vae, settings: SamplerSettings) -> None:
        self._model, self._clip, self._vae, self._settings = model, clip, vae, settings
        self._untrained = cache(partial(encode_prompt, clip))
        weights = [identity_of(patcher) for patcher in (model, clip.patcher, vae.patcher)]
        self._who = weights, surroundings_of(model, clip), settings

    def said(self, column: Column, prompts: Sequence[str]) -> list[str]:
        """The prompts as the column's CLIP is told them: a LoRA may bring embeddings for words of its own."""
        if column.checkpoint is None:
            return list(prompts)
        names = dict.fromkeys(content_of(Path(column.checkpoint.path)).names)
        return loras.text_with(names, column.checkpoint.lora_name, prompts) or list(prompts)

    def path(self, column: Column, text: str) -> Path:
        """Where the picture of a text is kept."""
        lora = None
        if column.checkpoint is not None:
            lora = content_of(Path(column.checkpoint.path)).digest, column.strength
        key = hashlib.sha256(repr((self._who, lora, text)).encode()).hexdigest()[:32]
        return folders.cache_folder() / "cells" / f"{key}.png"

    def hand(self, column: Column) -> Callable[[str], Image.Image]:
        """What draws a text with the column's LoRA on; the file is read when the first picture is asked for."""
        tools = cache(partial(self._tools, column))

        def drawn(text: str) -> Image.Image:
            model, encoded = tools()
            return to_picture(sample_picture(model, self._vae, encoded(text), encoded(""), self._settings))

        return drawn

    def _tools(self, column: Column) -> tuple[object, Callable[[str], list]]:
        """The MODEL with the LoRA on, and what its CLIP makes of a text."""
        if column.checkpoint is None:
            return self._model, self._untrained
        lora = loras.read_lora(Path(column.checkpoint.path))
        model, clip = loras.apply(self._model, self._clip, lora, column.strength, column.strength)
        changes_text = loras.patched_layers(clip) > loras.patched_layers(self._clip)
        return model, cache(partial(encode_prompt, clip)) if changes_text else self._untrained
