"""The Captioner protocol, and the loop that gives every image without a caption one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from .caption_file import read_caption, write_caption
from .text import clean

MODES = ("only missing",)
WRITTEN, KEPT, FAILED = "written", "kept", "failed"
OF_ONE_PICTURE = (OSError, ValueError, RuntimeError, LookupError, TypeError)
"""What a captioner may raise because of one picture; the others are still captioned."""


@dataclass(frozen=True)
class Answer:
    """What a captioner says of one picture, or why it cannot; one of the two, both "" where it has nothing to say."""

    text: str = ""
    error: str = ""


class CaptioningStopped(Exception):
    """Raised by a captioner that cannot caption any picture from now on: a refused key, a server that is gone."""


class Captioner(Protocol):
    """Says what is in pictures, as many at once as it likes.

    ``caption`` takes RGB pictures and answers in their order. It puts what is wrong with one picture into that
    picture's answer, or raises, upon which the pictures are asked for one by one; `CaptioningStopped` ends the run.
    """

    batch_size: int
    writes_tags: bool
    """Whether it answers in comma-separated tags, whatever it is asked."""

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]: ...

    def close(self) -> None:
        """Give its memory back."""


@dataclass(frozen=True)
class Told:
    """A captioner that looks at nothing and says what it is told: the trigger word, or the words of a file name."""

    without_words: str = "there are no words to write"
    batch_size: int = 1
    writes_tags: bool = False

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        answer = Answer(instruction) if instruction.strip() else Answer(error=self.without_words)
        return [answer for _ in images]

    def close(self) -> None:
        """It has no memory."""


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
    instruction: Callable[[Path], str] = lambda path: "",
    finish: Callable[[Path, str], str] = lambda path, answer: clean(answer),
    open_image: Callable[[Path], Image.Image] | None = None,
) -> Iterator[Report]:
    """Caption the images, yielding a report after each; stopping early keeps what is written.

    The captioner gets ``batch_size`` images at once and is closed at the end, whatever the end is. In the mode
    "only missing" a caption that exists is never touched, and its image is not even opened. ``instruction`` says what
    to ask about an image, ``finish`` makes a caption of the answer ("" when the answer is none), and ``open_image``
    reads a picture as RGB and raises ValueError where it cannot.
    """
    if mode not in MODES:
        raise ValueError(f"The captioning mode '{mode}' is not known. Choose one of: {', '.join(MODES)}.")
    work = _Work(captioner, instruction, finish, open_image or open_upright)
    waiting: list[Path] = []
    try:
        for path in paths:
            if done := _settled(path):
                yield done
                continue
            waiting.append(path)
            if len(waiting) >= captioner.batch_size:
                yield from work.reports(waiting)
                waiting = []
        yield from work.reports(waiting)
    finally:
        captioner.close()


def _settled(path: Path) -> Report | None:
    """The report of an image that needs no captioner: it keeps its caption, or has one that cannot be read."""
    try:
        existing = read_caption(path)
    except OSError as error:
        return _failed(path, error)
    return Report(path, KEPT, existing) if existing else None


@dataclass(frozen=True)
class _Work:
    captioner: Captioner
    instruction: Callable[[Path], str]
    finish: Callable[[Path, str], str]
    open_image: Callable[[Path], Image.Image]

    def reports(self, paths: Sequence[Path]) -> Iterator[Report]:
        """Caption these images, those that are asked the same question at once."""
        pictures = []
        for path in paths:
            try:
                pictures.append((path, self.open_image(path)))
            except (OSError, ValueError) as error:
                yield _failed(path, error)
        for question, group in groupby(pictures, key=lambda picture: self.instruction(picture[0])):
            asked = list(group)
            for (path, _), answer in zip(asked, self._ask([image for _, image in asked], question), strict=True):
                yield self._write(path, answer)

    def _ask(self, images: list[Image.Image], question: str) -> list[Answer]:
        try:
            answers = self.captioner.caption(images, question)
            if len(answers) != len(images):
                raise RuntimeError(f"the captioner gave {len(answers)} answers for {len(images)} pictures")
            return answers
        except OF_ONE_PICTURE as error:
            if len(images) == 1:
                return [Answer(error=_first_line(error))]
        # Which of them it was shows when they are asked for one by one.
        return [answer for image in images for answer in self._ask([image], question)]

    def _write(self, path: Path, answer: Answer) -> Report:
        if answer.error:
            return _failed(path, answer.error)
        caption = self.finish(path, answer.text)
        if not caption:
            said = " ".join(answer.text.split())[:80]
            return _failed(path, f"the model refused: {said}" if said else "the captioner had nothing to say about it")
        try:
            write_caption(path, caption)
        except (OSError, ValueError) as error:
            return _failed(path, error)
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


def _failed(path: Path, error: BaseException | str) -> Report:
    reason = error if isinstance(error, str) else _first_line(error)
    # The report names the file already.
    return Report(path, FAILED, reason=reason.removeprefix(f"{path.name} "))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
