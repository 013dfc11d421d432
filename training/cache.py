"""Pictures, masks and texts, encoded once and kept on disk under names that say exactly what was encoded and how.

A picture is encoded for each size it is trained at and each variant of it, a caption for each text it can become, so
that whatever training draws lies ready; `encodings` says how many there are.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augmentation import View, view_of
from .buckets import size_for
from .cache_file import is_intact, read, try_writing, write
from .class_words import class_text, classes_of
from .dataset import TRAIN, Dataset, Example
from .images import open_image
from .masks import open_mask, shown
from .wording import Wording, texts_of

# Part of every key: raise it when pictures come to be decoded, or files to be written, in another way.
FORMAT = 2
UNSETTLED = 5.0
"""Seconds within which a file may change twice and keep its time of change, as coarse as some file systems tell it."""

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many
Item = TypeVar("Item")


class Encoder(Protocol):
    """A VAE and text encoders. All latents are asked for before the first text: one model at a time is needed."""

    latents_key: str  # identity of the VAE and its settings
    text_key: str  # identity of the text encoders and their settings

    def latents(self, pixels: Tensor) -> Tensor:
        """(H, W, 3) from 0 to 1 -> (C, h, w), as the denoiser takes it."""
        ...

    def text(self, caption: str) -> dict[str, Tensor]:
        """What the denoiser is told about a caption, by name."""
        ...


@dataclass(frozen=True)
class Cached:
    """One example at one of its sizes, and the files that hold it encoded; `bucket` is (width, height) in pixels.

    `latents`, `mask` (None: all of the picture counts) and `text` are the plain picture with its first text. Training
    also shows the `variants`, each (latents, mask), and takes that one of `texts` which `wording` draws. `caption` is
    the text that `text` holds. `class_texts` gives texts with the trigger word as they are with class words, and the
    file of that; it is None when they were not asked for.
    """

    example: Example
    bucket: tuple[int, int]
    latents: Path
    text: Path
    mask: Path | None = None
    variants: tuple[tuple[Path, Path | None], ...] = ()
    texts: Mapping[str, Path] = field(default_factory=dict)
    wording: Wording = Wording()
    caption: str = ""
    class_texts: Mapping[str, tuple[str, Path]] | None = None


@dataclass(frozen=True)
class CachedDataset:
    """A Dataset, encoded: the examples at all their sizes, those held out plain and at its `resolution` alone."""

    examples: tuple[Cached, ...]
    held_out: tuple[Cached, ...]


def encode(
    dataset: Dataset,
    encoder: Encoder,
    folder: Path,
    progress: Progress = lambda phase, done, total: None,
    *,
    classes: bool = False,
) -> CachedDataset:
    """The dataset encoded in `folder`, asking `encoder` only for what is not there yet or is damaged.

    With `classes` the captions of concepts are also encoded with class words for the trigger word. Unreadable files
    are found before anything is encoded; stopping in between keeps what was finished. Raises ValueError naming the
    picture that cannot be read or encoded or the class words that are missing, OSError naming the folder that cannot
    be written.
    """
    plan = _Plan(dataset, encoder, Path(folder), classes_of(dataset) if classes else None)
    train = tuple(cached for example in dataset.examples for cached in plan.trained(example))
    kept = tuple(plan.held_out(example) for example in dataset.held_out)
    pictures, masks, texts = (_missing(files, progress) for files in (plan.pictures, plan.masks, plan.texts))
    opened = lru_cache(maxsize=1)(lambda example: shown(example, dataset.background))
    for example in _counted("checking pictures", dict.fromkeys(job[1] for job in pictures + masks), progress):
        if open_image(example.path).size != (example.width, example.height):
            raise ValueError(f"{example.path.name} was changed after the dataset was loaded: queue again.")
        open_mask(example)
    for path, example, view in _counted("encoding pictures", pictures, progress):
        write(path, {"latents": _encoded_picture(example, view.picture(opened(example)), encoder)})
    for path, example, view, latents in _counted("fitting masks", masks, progress):
        write(path, {"mask": _fitted_mask(example, view, latents)})
    for path, example, text in _counted("encoding captions", texts, progress):
        write(path, _encoded_text(example, text, encoder))
    return CachedDataset(train, kept)


def encodings(dataset: Dataset, encoder: Encoder, folder: Path, *, classes: bool = False) -> tuple[int, int]:
    """How many pictures and how many texts of a dataset `encode` has still to write; what is damaged is not counted."""
    plan = _Plan(dataset, encoder, Path(folder), classes_of(dataset) if classes else None)
    for example in dataset.examples:
        plan.trained(example)
    for example in dataset.held_out:
        plan.held_out(example)
    pictures, texts = (sum(not path.is_file() for path in files) for files in (plan.pictures, plan.texts))
    return pictures, texts


def fingerprint(dataset: Dataset, *, classes: bool = False) -> str:
    """The identity of what a dataset teaches: pictures, captions, masks and settings in their order, not places.

    What is as it is by default leaves no trace, so that a new setting does not turn an old run into another one.
    With `classes` the class words are part of it.
    """
    settings = _changed(dataset, "background", "largest_enlargement", "wording", "augmentation")
    if dataset.resolutions not in ((), (dataset.resolution,)):
        settings["resolutions"] = dataset.resolutions
    if classes:
        settings["classes"] = classes_of(dataset)
    own, others = dataset.shares
    if others > own:
        settings["regularization"] = "in turns"  # earlier versions showed all of them in every round

    def facts(example: Example) -> list:
        unusual = _changed(example, "variants", "weight", "role", "fill_masked")
        if example.mask:
            unusual["mask"] = [_file_hash(example.mask), example.mask == example.path]
        if dataset.wording.changes_captions:
            unusual["trigger_word"] = example.trigger_word
        return [_file_hash(example.path), example.caption, example.repeats, *_unless_empty(unusual)]

    examples, held_out = ([facts(example) for example in some] for some in (dataset.examples, dataset.held_out))
    return _key(dataset.resolution, examples, held_out, *_unless_empty(settings))


class _Plan:
    """Which files a dataset is kept in, and what each of them holds: found out without opening a picture."""

    def __init__(self, dataset: Dataset, encoder: Encoder, folder: Path, classes: Mapping[str, str] | None):
        for kind in ("latents", "masks", "text"):
            try_writing(folder / kind)
        self._dataset, self._encoder, self._folder, self._classes = dataset, encoder, folder, classes
        self._hash = cache(_file_hash)
        self.pictures: dict[Path, tuple[Example, View]] = {}
        self.masks: dict[Path, tuple[Example, View, Path]] = {}
        self.texts: dict[Path, tuple[Example, str]] = {}

    def trained(self, example: Example) -> list[Cached]:
        """An example at every size it is trained at, in all its variants and with all its texts."""
        wording, count = self._dataset.wording, self._dataset.augmentation.count
        texts = {text: self._text(example, text) for text in texts_of(example, wording)}
        class_texts, cached = self._class_texts(example, texts), []
        for size in self._dataset.sizes_of(example):
            (latents, mask), *variants = [self._seen(example, size, variant) for variant in range(count)]
            caption, first = next(iter(texts.items()))
            cached.append(
                Cached(example, size, latents, first, mask, tuple(variants), texts, wording, caption, class_texts)
            )
        return cached

    def held_out(self, example: Example) -> Cached:
        """An example as it is, at one size whatever others are trained, so that losses can be compared."""
        dataset = self._dataset
        size = size_for(example.width, example.height, dataset.resolution, dataset.largest_enlargement)
        latents, mask = self._seen(example, size, 0)
        return Cached(example, size, latents, self._text(example, example.caption), mask, caption=example.caption)

    def _seen(self, example: Example, size: tuple[int, int], variant: int) -> tuple[Path, Path | None]:
        """The latents of a variant, and its mask."""
        content, limit = self._hash(example.path), self._dataset.largest_enlargement
        view = view_of(example, size, variant, self._dataset.augmentation, key=content, largest_enlargement=limit)
        unusual = {} if view == View(view.size, view.box) else {"mirrored": view.mirrored, "colour": view.colour}
        unusual |= _changed(self._dataset, "background")
        if example.fill_masked:
            unusual["filled"] = self._hash(example.mask), example.mask == example.path
        facts = (content, view.size, view.box, self._encoder.latents_key, *_unless_empty(unusual))
        latents = self._file("latents", *facts)
        self.pictures[latents] = example, view
        if not example.mask:
            return latents, None
        place = (example.width, example.height, view.size, view.box, view.mirrored, self._encoder.latents_key)
        mask = self._file("masks", self._hash(example.mask), example.mask == example.path, *place)
        self.masks[mask] = example, view, latents
        return latents, mask

    def _class_texts(self, example: Example, texts: Iterable[str]) -> dict[str, tuple[str, Path]] | None:
        """Those texts of a concept that hold a trigger word, each as it is with class words, and the file of that."""
        if self._classes is None:
            return None
        told = {text: class_text(text, self._classes) for text in texts if example.role == TRAIN}
        return {text: (other, self._text(example, other)) for text, other in told.items() if other is not None}

    def _text(self, example: Example, text: str) -> Path:
        path = self._file("text", text, self._encoder.text_key)
        self.texts[path] = example, text
        return path

    def _file(self, kind: str, *facts: object) -> Path:
        return self._folder / kind / f"{_key(FORMAT, *facts)}.safetensors"


def _missing(files: dict[Path, tuple], progress: Progress) -> list[tuple]:
    """(path, what it holds) of the files that are to be made."""
    looked_at = _counted("looking through the cache", files, progress)
    return [(path, *files[path]) for path in looked_at if not is_intact(path)]


def _counted(phase: str, items: Collection[Item], progress: Progress) -> Iterator[Item]:
    for done, item in enumerate(items):
        progress(phase, done, len(items))
        yield item
    if items:
        progress(phase, len(items), len(items))


def _encoded_picture(example: Example, image: Image.Image, encoder: Encoder) -> Tensor:
    pixels = np.asarray(image, dtype=np.float32) / 255
    latents = encoder.latents(torch.from_numpy(pixels)).detach().to("cpu", torch.float32)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"The VAE turned {example.path.name} into values that are not numbers: "
            "run the VAE in fp32 or bf16, or remove the picture."
        )
    return latents


def _fitted_mask(example: Example, view: View, latents: Path) -> Tensor:
    """(1, h, w) from 0 to 1, one value for each place of the latents."""
    height, width = read(latents)["latents"].shape[-2:]
    mask = np.asarray(view.mask(open_mask(example), (width, height)), dtype=np.float32) / 255
    return torch.from_numpy(mask)[None]


def _encoded_text(example: Example, text: str, encoder: Encoder) -> dict[str, Tensor]:
    tensors = {name: value.detach().cpu() for name, value in encoder.text(text).items()}
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ValueError(
            f"The text encoder turned the caption of {example.path.name} into values that are not numbers: "
            "run the text encoder in fp32 or bf16, or change the caption."
        )
    return tensors


def _changed(thing: object, *names: str) -> dict[str, object]:
    """Those fields of a dataclass that are not as they are by default."""
    return {name: getattr(thing, name) for name in names if getattr(thing, name) != getattr(type(thing), name)}


def _unless_empty(facts: dict[str, object]) -> list[dict[str, object]]:
    return [facts] if facts else []


def _key(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, default=asdict).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    """The SHA-256 of a file, read once as long as it does not change: a dataset can have gigabytes."""
    try:
        facts = path.stat()
        if time.time() - max(facts.st_mtime, facts.st_ctime) < UNSETTLED:
            return _read_hash(path)
        return _known_hash(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)
    except OSError as error:
        raise ValueError(f"The picture {path} cannot be read ({error.strerror}): load the dataset again.") from error


@lru_cache(maxsize=100_000)
def _known_hash(path: Path, *_version: int) -> str:
    return _read_hash(path)


def _read_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
