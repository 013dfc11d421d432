"""Caption models that can be fetched from huggingface.co: only when the user asks, licence and size said before."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.csv", "*.jinja", "LICENSE*")
"""What is fetched: no program code, and no weights in a format that could hold any."""
SPARE = 2**30
"""Bytes left free on the disk at least."""


@dataclass(frozen=True)
class Download:
    """A model on huggingface.co, with what its page says of licence and size (bytes, at most)."""

    repository: str
    licence: str
    size: int

    @property
    def name(self) -> str:
        """The folder it gets."""
        return self.repository.rpartition("/")[2]

    @property
    def label(self) -> str:
        """All that the user has to know before it is fetched."""
        return f"{self.repository} ({self.licence}, up to {self.size / 1e9:.1f} GB)"


DOWNLOADS = (
    Download("SmilingWolf/wd-vit-tagger-v3", "apache-2.0", 500_000_000),
    Download("SmilingWolf/wd-eva02-large-tagger-v3", "apache-2.0", 1_400_000_000),
    Download("florence-community/Florence-2-base", "mit", 1_100_000_000),
    Download("Qwen/Qwen3-VL-2B-Instruct", "apache-2.0", 5_000_000_000),
)


def fetch(
    download: Download, folder: Path, checkpoint: Callable[[], None] = lambda: None, *, endpoint: str | None = None
) -> Path:
    """The model's own folder in ``folder``, complete; whatever is there already is not fetched again.

    ``checkpoint`` is called before each file and may raise to cancel. Raises ValueError, in one sentence and before
    anything is fetched, when the page now says another licence or more bytes, or the disk is too full; and OSError
    when huggingface.co cannot be reached.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError(
            f"Fetching {download.repository} needs the package huggingface_hub: install it with 'pip install "
            f"huggingface_hub', or put the model's files into {folder / download.name}."
        ) from error
    hub = HfApi(endpoint=endpoint, token=False)
    with _named(download, folder):
        page = hub.model_info(download.repository, files_metadata=True)
    wanted = {file.rfilename: file.size or 0 for file in page.siblings if _is_wanted(file.rfilename)}
    _check(download, page, sum(wanted.values()), folder)
    for name in wanted:
        checkpoint()
        with _named(download, folder):
            hub.hf_hub_download(download.repository, name, revision=page.sha, local_dir=folder / download.name)
    return folder / download.name


@contextmanager
def _named(download: Download, folder: Path) -> Iterator[None]:
    """Turns whatever goes wrong on the network into one sentence; what it is called differs between versions."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"{download.repository} could not be fetched ({reason}): try again, or put its files into "
            f"{folder / download.name}."
        ) from error


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in FILES)


def _check(download: Download, page, size: int, folder: Path) -> None:
    """ValueError when this is not what the user agreed to, or does not fit."""
    licence = str((page.card_data or {}).get("license")).lower()
    if licence != download.licence:
        raise ValueError(
            f"The licence of {download.repository} is '{licence}' now, not '{download.licence}': read its page and put "
            f"its files into {folder / download.name} yourself."
        )
    if size > download.size:
        raise ValueError(
            f"{download.repository} has grown to {size / 1e9:.1f} GB, more than the {download.size / 1e9:.1f} GB that "
            f"were said: put its files into {folder / download.name} yourself."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size + SPARE:
        raise ValueError(
            f"{download.repository} needs {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on the disk of "
            f"{folder}: make room there."
        )
