"""Pictures and captions, encoded once and kept on disk under names that say exactly what was encoded and how."""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .buckets import bucket_for, bucket_sizes, crop_box
from .dataset import Dataset, Example
from .images import fit, open_image

# Part of every key: raise it when pictures come to be decoded, or files to be written, in another way.
FORMAT = 1

Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


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
    """One example and the two files that hold it encoded; `bucket` is (width, height) in pixels."""

    example: Example
    bucket: tuple[int, int]
    latents: Path
    text: Path


@dataclass(frozen=True)
class CachedDataset:
    """A Dataset, encoded."""

    examples: tuple[Cached, ...]
    held_out: tuple[Cached, ...]


def encode(
    dataset: Dataset,
    encoder: Encoder,
    folder: Path,
    progress: Progress = lambda phase, done, total: None,
) -> CachedDataset:
    """The dataset encoded in `folder`, asking `encoder` only for what is not there yet or is damaged.

    Unreadable files are found before anything is encoded; stopping in between keeps what was finished. Raises
    ValueError naming the picture that cannot be read or encoded, OSError naming the folder that cannot be written.
    """
    folder = Path(folder)
    for kind in ("latents", "text"):
        _try_writing(folder / kind)
    sizes = bucket_sizes(dataset.resolution)
    train = tuple(_located(example, sizes, encoder, folder) for example in dataset.examples)
    kept = tuple(_located(example, sizes, encoder, folder) for example in dataset.held_out)
    pictures = list({c.latents: c for c in train + kept if not _is_intact(c.latents)}.values())
    captions = list({c.text: c for c in train + kept if not _is_intact(c.text)}.values())
    for cached in _counted("checking pictures", pictures, progress):
        open_image(cached.example.path)
    for cached in _counted("encoding pictures", pictures, progress):
        _write(cached.latents, {"latents": _encoded_picture(cached, encoder)})
    for cached in _counted("encoding captions", captions, progress):
        _write(cached.text, _encoded_caption(cached, encoder))
    return CachedDataset(train, kept)


def fingerprint(dataset: Dataset) -> str:
    """The identity of what a dataset teaches: pictures, captions, repeats, order, resolution, not places."""

    def facts(examples: tuple[Example, ...]) -> list:
        return [[_file_hash(example.path), example.caption, example.repeats] for example in examples]

    return _key(dataset.resolution, facts(dataset.examples), facts(dataset.held_out))


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a cache file; raises ValueError when it is missing or damaged."""
    try:
        data = path.read_bytes()
        header, payload = _parts(data)
        if int(header["__metadata__"]["crc32"]) != zlib.crc32(payload):
            raise ValueError("its checksum differs")
        # The caller may be inside inference mode, whose tensors could not be trained on later.
        with torch.inference_mode(False):
            return safetensors.torch.load(data)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"The cache file {path} is missing or damaged ({error}): queue again and it is made anew."
        ) from error


def _counted(phase: str, items: Sequence[Cached], progress: Progress) -> Iterator[Cached]:
    for done, item in enumerate(items):
        progress(phase, done, len(items))
        yield item
    if items:
        progress(phase, len(items), len(items))


def _located(example: Example, sizes: tuple[tuple[int, int], ...], encoder: Encoder, folder: Path) -> Cached:
    bucket = bucket_for(example.width, example.height, sizes)
    crop = crop_box(example.width, example.height, bucket)
    latents = _key(FORMAT, _file_hash(example.path), bucket, crop, encoder.latents_key)
    text = _key(FORMAT, example.caption, encoder.text_key)
    return Cached(
        example, bucket, folder / "latents" / f"{latents}.safetensors", folder / "text" / f"{text}.safetensors"
    )


def _encoded_picture(cached: Cached, encoder: Encoder) -> Tensor:
    pixels = np.asarray(fit(open_image(cached.example.path), cached.bucket), dtype=np.float32) / 255
    latents = encoder.latents(torch.from_numpy(pixels)).detach().to("cpu", torch.float32)
    if not torch.isfinite(latents).all():
        raise ValueError(
            f"The VAE turned {cached.example.path.name} into values that are not numbers: "
            "run the VAE in fp32 or bf16, or remove the picture."
        )
    return latents


def _encoded_caption(cached: Cached, encoder: Encoder) -> dict[str, Tensor]:
    tensors = {name: value.detach().cpu() for name, value in encoder.text(cached.example.caption).items()}
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ValueError(
            f"The text encoder turned the caption of {cached.example.path.name} into values that are not numbers: "
            "run the text encoder in fp32 or bf16, or change the caption."
        )
    return tensors


def _key(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"The picture {path} cannot be read ({error.strerror}): load the dataset again.") from error
    return digest.hexdigest()


def _is_intact(path: Path) -> bool:
    try:
        read(path)
    except ValueError:
        return False
    return True


def _parts(data: bytes) -> tuple[dict, memoryview]:
    """Header and payload of a safetensors file: eight bytes of header length, the header as JSON, the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), memoryview(data)[start:]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    # Cloned because safetensors refuses views that share memory.
    owned = {name: value.contiguous().clone() for name, value in tensors.items()}
    _, payload = _parts(safetensors.torch.save(owned))
    _write_bytes(path, safetensors.torch.save(owned, {"crc32": str(zlib.crc32(payload))}))


def _write_bytes(path: Path, data: bytes) -> None:
    """The whole file or none: written under another name, then renamed."""
    with _writing_to(path.parent):
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def _try_writing(folder: Path) -> None:
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The cache folder {folder} cannot be written ({error.strerror}): free space there or allow writing to it."
        ) from error
