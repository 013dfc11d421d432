"""The Captioner protocol, and the loop that gives every image without a caption one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from .sidecar import read_caption, write_caption

MODES = ("only missing",)
WRITTEN, KEPT, FAILED = "written", "kept", "failed"


class Captioner(Protocol):
    """Says what is in a picture. "" means that it has nothing to say."""

    def caption(self, image: Image.Image) -> str: ...


@dataclass(frozen=True)
class FixedCaption:
    """A captioner that says the same of every picture, such as the trigger word alone.

    Without any words it fails with the reason ``without_words``.
    """

    words: str
    without_words: str = "there are no words to write"

    def caption(self, image: Image.Image) -> str:
        if not self.words.strip():
            raise ValueError(self.without_words)
        return self.words


@dataclass(frozen=True)
class Report:
    """What became of one image: its caption was written, kept, or could not be had for a reason."""

    path: Path
    outcome: str
    caption: str = ""
    reason: str = ""


def caption_folder(
    paths: Iterable[Path],
    captioner: Captioner,
    mode: str = MODES[0],
    *,
    open_image: Callable[[Path], Image.Image] | None = None,
) -> Iterator[Report]:
    """Caption the images one by one, yielding a report after each; stopping early keeps what is written.

    In the mode "only missing" a caption that exists is never touched, and its image is not even opened.
    ``open_image`` reads a picture as RGB and raises ValueError where it cannot.
    """
    if mode not in MODES:
        raise ValueError(f"The captioning mode '{mode}' is not known. Choose one of: {', '.join(MODES)}.")
    for path in paths:
        yield _caption_one(path, captioner, open_image or open_upright)


def _caption_one(path: Path, captioner: Captioner, open_image: Callable[[Path], Image.Image]) -> Report:
    try:
        if existing := read_caption(path):
            return Report(path, KEPT, existing)
        caption = captioner.caption(open_image(path)).strip()
        if not caption:
            return Report(path, FAILED, reason="the captioner had nothing to say about it")
        write_caption(path, caption)
    except (OSError, ValueError, RuntimeError) as error:
        # The report names the file already.
        return Report(path, FAILED, reason=_first_line(error).removeprefix(f"{path.name} "))
    return Report(path, WRITTEN, caption)


def open_upright(path: Path) -> Image.Image:
    """The picture upright, in RGB, transparency on white; raises ValueError when it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
                return image.convert("RGB")
            image = image.convert("RGBA")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture cannot be read ({_first_line(error)})") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def summary(reports: Iterable[Report]) -> str:
    """The reports in one line: ``12 written, 3 kept (yours), 1 failed: cat.png: reason``.

    Pictures that failed for the same reason are named together, at most three of them.
    """
    reports = list(reports)
    count = {outcome: sum(report.outcome == outcome for report in reports) for outcome in (WRITTEN, KEPT, FAILED)}
    line = f"{count[WRITTEN]} written, {count[KEPT]} kept (yours), {count[FAILED]} failed"
    failures: dict[str, list[str]] = {}
    for report in reports:
        if report.outcome == FAILED:
            failures.setdefault(report.reason, []).append(report.path.name)
    return f"{line}: {'; '.join(f'{_some(names)}: {why}' for why, names in failures.items())}" if failures else line


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
