"""What happens to the LoRA files of a run once one is chosen: it is kept under a short name, others are deleted."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..training.checkpoint import Checkpoint
from ..training.embeddings import bundled_words, embedding_names, embedding_path, unbundled
from ..training.lora_content import content_of
from ..training.run import safe_name
from ..training.whole_file import WRITING
from .host import folders

MOST_VERSIONS = 10_000


def keep(checkpoint: Checkpoint, name: str, picture: Path | None = None) -> Path:
    """Copy a LoRA file to `<loras>/<name>.safetensors`, with its cover and the embeddings of its new words.

    Where that name is another file's, `<name>_v2` and so on is taken, and where it cannot be a file's the LoRA's own.
    What was kept before is not copied again. Without a cover of its own it gets `picture`.
    """
    source, number = Path(checkpoint.path), 1
    target = kept_as(checkpoint, name)
    while target is None:
        place = _version(source, name, number)
        if not _is_taken(place, source) and _copy(source, place):
            target = place
        number += 1
    cover = cover_of(source) if cover_of(source).is_file() else picture
    if cover is not None and not cover_of(target).exists():
        _copy(cover, cover_of(target))
    _copy_words(source, checkpoint.lora_name, target.name)
    return target


def kept_as(checkpoint: Checkpoint, name: str) -> Path | None:
    """The file under that name, or a later version of it, that holds the same tensors; None when there is none."""
    source = Path(checkpoint.path)
    for number in range(1, MOST_VERSIONS):
        place = _version(source, name, number)
        if not _is_taken(place, source):
            return None
        if place.is_file() and content_of(place) == content_of(source):
            return place
    return None


def delete(names: Sequence[str], total: int) -> None:
    """Delete LoRA files of the loras folders, their covers, and the embeddings of their new words.

    ValueError, before any is touched, for a name that leaves these folders and where the files' sizes do not add up to
    `total` bytes; afterwards for a file that the system does not let go.
    """
    paths = [folders.lora_path(name) for name in names]
    found = sum(path.stat().st_size for path in paths)
    if found != total:
        raise ValueError(
            f"These files have {found:,} bytes now and not the {total:,} that were shown, so nothing was deleted: look "
            "at the list again."
        )
    for name, path in zip(names, paths, strict=True):
        words = _words_of(path, name)
        try:
            path.unlink()
        except OSError as error:
            raise ValueError(
                f"'{path.name}' cannot be deleted ({error}): close what uses it, then try again."
            ) from error
        for beside in (cover_of(path), *words):
            with suppress(OSError):
                beside.unlink()


def cover_of(lora: Path) -> Path:
    """Where ComfyUI's model list looks for the picture of a LoRA file."""
    return lora.with_suffix(".preview.png")


def _version(source: Path, name: str, number: int) -> Path:
    if number >= MOST_VERSIONS:
        raise ValueError(f"There are already {MOST_VERSIONS - 1:,} files called '{name}': delete some of them.")
    title = _title(name, source)
    return folders.loras_folder() / f"{title if number == 1 else f'{title}_v{number}'}{source.suffix}"


def _is_taken(place: Path, source: Path) -> bool:
    """Whether a name is that of another file or cover, or its words' names are those of other embeddings."""
    if place.exists() or cover_of(place).exists():
        return True
    folder, (called,) = folders.embeddings_folder(), embedding_names([""], place.name).values()
    if not any(folder.glob(f"{escape(called)}*.safetensors")):
        return False
    return not all(_embeddings(source, place.name).values())


def _title(name: str, source: Path) -> str:
    """The name as a file's, or that of the file itself where it cannot be one."""
    try:
        return safe_name(name)
    except ValueError:
        return safe_name(source.stem)


def _copy(source: Path, target: Path) -> bool:
    """Copy a file, whole or not at all; False when there is one already, which stays as it is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=WRITING, suffix=target.suffix)
    try:
        with os.fdopen(handle, "wb") as copy, source.open("rb") as original:
            shutil.copyfileobj(original, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        os.chmod(temporary, 0o644)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: an empty file of that name is ours alone
            with target.open("xb"):
                pass
            os.replace(temporary, target)
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    return True


def _words_of(lora: Path, name: str) -> list[Path]:
    """The embeddings beside a LoRA file that hold the rows it holds: a file of the user's own is none of them."""
    return [path for path, same in _embeddings(lora, name).items() if same]


def _embeddings(lora: Path, name: str) -> dict[Path, bool]:
    """The embedding files under the names that a LoRA called `name` has for its words -> whether they hold its rows."""
    words = bundled_words(content_of(lora).names)
    names = embedding_names(words, name)
    there = {word: embedding_path(folders.embeddings_folder(), names[word]) for word in words}
    there = {word: path for word, path in there.items() if path.is_file()}
    rows = unbundled(_tensors(lora)) if there else {}
    return {path: word in rows and _equal(_tensors(path), rows[word]) for word, path in there.items()}


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; none of one that cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return {}


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def _copy_words(source: Path, lora_name: str, kept_name: str) -> None:
    """The embeddings beside a LoRA file, under the names that prompts with its copy say."""
    words = bundled_words(content_of(source).names)
    here, there = embedding_names(words, lora_name), embedding_names(words, kept_name)
    for word in words:
        original = embedding_path(folders.embeddings_folder(), here[word])
        if original.is_file():
            _copy(original, embedding_path(folders.embeddings_folder(), there[word]))
