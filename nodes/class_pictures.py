"""Pictures of a class, made by the base model and kept on disk so that none is made twice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..captioning.caption_file import read_caption, write_caption
from ..training.dataset import REGULARIZATION, Dataset
from ..training.folder import scan
from ..training.whole_file import write_atomically
from .host import folders
from .host.identity import identity_of
from .host.progress import Progress, throw_if_cancelled
from .host.sampling import SamplerSettings, encode_prompt, sample_picture
from .pictures import png_bytes, to_picture

SEEDS = 2**64


@dataclass(frozen=True)
class ClassPictures:
    """What a model draws of a prompt: picture k with the seed of the settings plus k, whatever the others are."""

    model: object
    clip: object
    vae: object
    prompt: str
    negative_prompt: str
    settings: SamplerSettings

    def __post_init__(self):
        if not self.prompt:
            raise ValueError("prompt is empty: write what the class is, such as 'a photo of a woman'.")

    @cached_property
    def folder(self) -> Path:
        """Where they are kept: a folder for the model, the prompts and the settings, of any count."""
        who = (
            identity_of(self.model),
            identity_of(self.clip.patcher),
            self.clip.layer_idx,
            identity_of(self.vae.patcher),
        )
        key = hashlib.sha256(repr((who, self.prompt, self.negative_prompt, self.settings)).encode()).hexdigest()[:16]
        return folders.regularization_folder() / key

    def paths(self, count: int) -> list[Path]:
        """The files of the first pictures."""
        return [self.folder / f"{number:05d}.png" for number in range(count)]

    def make(self, count: int, progress: Progress) -> int:
        """Make those of the first pictures that are not there, each with its caption, and say how many that were.

        A picture that is there is complete. Cancel keeps those that are.
        """
        paths = self.paths(count)
        missing = [number for number, path in enumerate(paths) if not path.is_file()]
        if missing:
            progress.phase("Encoding the prompt")
            texts = [encode_prompt(self.clip, text) for text in (self.prompt, self.negative_prompt)]
        for done, number in enumerate(missing, start=1):
            throw_if_cancelled()
            progress.phase(f"Regularization picture {done} of {len(missing)}")
            settings = replace(self.settings, seed=(self.settings.seed + number) % SEEDS)
            picture = to_picture(sample_picture(self.model, self.vae, *texts, settings))
            self.folder.mkdir(parents=True, exist_ok=True)
            if not read_caption(paths[number]):
                write_caption(paths[number], self.prompt)
            write_atomically(paths[number], png_bytes(picture))
            progress.update(done, len(missing))
            progress.show(picture)
        return len(missing)

    def dataset(self, count: int, weight: float) -> Dataset:
        """The first pictures, to be trained on as what the class is without the trigger word."""
        size = round((self.settings.width * self.settings.height) ** 0.5)
        whole = scan(self.folder, role=REGULARIZATION, weight=weight, resolution=size)
        wanted = set(self.paths(count))
        return replace(whole, examples=tuple(example for example in whole.examples if example.path in wanted))
