"""What the grid's pictures look like beside the training pictures, to a CLIP_VISION model where one is connected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..training import signals
from ..training.checkpoint import Checkpoint
from ..training.dataset import Example, says
from ..training.masks import shown
from . import grid
from .grid import Column
from .host import vision
from .host.progress import Progress
from .pictures import to_image

if TYPE_CHECKING:
    from .selection import Request

MORE_SEEDS = 3
"""Further pictures of one prompt, to see how much they differ."""
UNUSED = (
    "The CLIP_VISION was not used, as it compares pictures drawn at strength 1 with those of a dataset: give prompts, "
    "that strength and a dataset."
)


class Looks:
    """The grid's pictures as an image encoder sees them. Without one, without pictures or prompts it says nothing."""

    def __init__(
        self,
        request: Request,
        drawn: grid.Grid,
        training: Sequence[Example],
        triggers: Sequence[str],
        progress: Progress,
    ) -> None:
        self._request, self._grid, self._training, self._progress = request, drawn, tuple(training), progress
        self._on = bool(request.clip_vision is not None and drawn.cells and training)
        self._drawn_rows: dict[Path, Tensor] = {}
        numbers = range(len(drawn.prompts))
        self._called = [n for n in numbers if any(says(drawn.prompts[n], word) for word in triggers)]
        self._uncalled = [n for n in numbers if n not in self._called]

    def likeness(self) -> dict[str, float]:
        """How like the training pictures each file at strength 1 draws its prompts; without files that copy them."""
        if not self._on or not self._called:
            return {}
        columns = [column for column in self._grid.columns if column.checkpoint is not None and column.strength == 1]
        found = {column.checkpoint.lora_name: self._likeness(column) for column in columns}
        return {name: value for name, value in found.items() if value is not None}

    def _likeness(self, column: Column) -> float | None:
        if not self._called or self._copies(column):
            return None
        own, base = (self._rows(each, self._called) for each in (column, Column()))
        return signals.scaled_likeness(own, base, self._taught)

    def notes(self, checkpoint: Checkpoint) -> list[str]:
        """What the pictures of one file show: likeness, copies, variety, bleed and how well prompts are followed."""
        column = Column(checkpoint)
        if self._request.clip_vision is None:
            return []
        if not self._on or column not in self._grid.columns:
            return [UNUSED]
        value = self._likeness(column)
        told = [
            "" if value is None else f"Likeness {100 * value:.0f} % of what the training pictures have to one another.",
            signals.copy_note(self._copies(column), [example.path.name for example in self._training]),
            signals.variety_note(self._variety(checkpoint)),
            signals.bleed_note(self._bleed(column)),
            self._adherence(column),
        ]
        return [note for note in told if note]

    @cached_property
    def _taught(self) -> Tensor:
        """The training pictures, (M, D)."""
        return self._seen(self._training_pictures())

    @cached_property
    def _taught_prints(self) -> list[signals.Fingerprint]:
        return [signals.fingerprint(picture) for picture in self._training_pictures()]

    def _training_pictures(self) -> Iterator[Image.Image]:
        # One at a time: a dataset of photographs does not fit into memory.
        return (shown(example) for example in self._training)

    def _seen(self, pictures: Iterable[Image.Image]) -> Tensor:
        self._progress.phase("Comparing pictures")
        return vision.embeddings(self._request.clip_vision, (to_image(picture)[0] for picture in pictures))

    def _files(self, column: Column, prompts: Sequence[int], drawn: grid.Grid | None = None) -> list[Path]:
        return [c.path for c in (drawn or self._grid).cells if c.column == column and c.prompt in prompts]

    def _rows(self, column: Column, prompts: Sequence[int], drawn: grid.Grid | None = None) -> Tensor:
        """The drawn pictures, (N, D), each looked at once however often it is asked for."""
        files = self._files(column, prompts, drawn)
        for file in files:
            if file not in self._drawn_rows:
                self._drawn_rows[file] = self._seen([Image.open(file).convert("RGB")])[0]
        return torch.stack([self._drawn_rows[file] for file in files])

    def _copies(self, column: Column) -> list[signals.Copy]:
        files = self._files(column, self._called)
        if not files:
            return []
        prints = [signals.fingerprint(Image.open(file)) for file in files]
        return signals.near_copies(self._rows(column, self._called), prints, self._taught, self._taught_prints)

    def _variety(self, checkpoint: Checkpoint) -> float | None:
        """How much pictures of the first prompt with the trigger differ from seed to seed, beside the base's."""
        if not self._called:
            return None
        prompt, columns = self._grid.prompts[self._called[0]], (Column(), Column(checkpoint))
        drawn = [self._drawn(columns, [prompt], seed) for seed in range(MORE_SEEDS + 1)]
        base, own = (torch.cat([self._rows(column, [0], each) for each in drawn]) for column in columns)
        return signals.variety([own], [base])

    def _bleed(self, column: Column) -> float | None:
        """How much the file changes of what is drawn without the trigger word."""
        if not self._uncalled:
            return None
        prompts = [self._grid.prompts[number] for number in self._uncalled]
        other = self._drawn([Column()], prompts, 1)
        return signals.bleed(
            self._rows(column, self._uncalled),
            self._rows(Column(), self._uncalled),
            self._rows(Column(), range(len(prompts)), other),
        )

    def _adherence(self, column: Column) -> str:
        """How well the pictures follow their prompts, where the encoders pass the test on the dataset."""
        request = self._request
        captions = [example.caption for example in self._training]
        rows, reason = vision.text_embeddings(request.clip, request.clip_vision, [*captions, *self._grid.prompts])
        if rows is None:
            return reason
        if not signals.can_judge_adherence(self._taught, rows[: len(captions)]):
            return "The CLIP_VISION does not tell the dataset's captions apart, so prompt adherence is not judged."
        prompts, all_of_them = rows[len(captions) :], range(len(self._grid.prompts))
        own, base = (signals.adherence(self._rows(each, all_of_them), prompts) for each in (column, Column()))
        return f"Prompts are followed to {own:.3f} (CLIP-T), by the untrained model to {base:.3f}."

    def _drawn(self, columns: Sequence[Column], prompts: Sequence[str], further: int) -> grid.Grid:
        request = self._request
        settings = replace(request.settings, seed=(request.seed + further) % 2**64)
        return grid.draw(request.model, request.clip, request.vae, columns, prompts, settings, self._progress)
