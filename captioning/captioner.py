"""The Captioner protocol, and the loop that captions the images of a folder."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Protocol

from PIL import Image

from .caption_file import read_caption
from .caption_log import AUTOMATIC, MISSING, REVIEWED, YOURS
from .request import Request
from .sidecar import CaptionStore

ONLY_MISSING, REPLACE_AUTOMATIC = "only missing", "replace automatic"
ADD_AFTER, REPLACE_EVERYTHING = "add after", "replace everything"
TOUCHED = {
    ONLY_MISSING: {MISSING},
    REPLACE_AUTOMATIC: {MISSING, AUTOMATIC},
    ADD_AFTER: {MISSING, AUTOMATIC, YOURS, REVIEWED},
    REPLACE_EVERYTHING: {MISSING, AUTOMATIC, YOURS, REVIEWED},
}
"""Which captions a mode may change; those that the same request wrote stay as they are in every mode."""
MODES = tuple(TOUCHED)
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
    follows_instructions: bool
    """Whether it matters what it is asked."""

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]: ...

    def close(self) -> None:
        """Give its memory back."""


@dataclass(frozen=True)
class Told:
    """A captioner that looks at nothing and says what it is told: the trigger word, or the words of a file name."""

    without_words: str = "there are no words to write"
    batch_size: int = 1
    writes_tags: bool = False
    follows_instructions: bool = False

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        answer = Answer(instruction) if instruction.strip() else Answer(error=self.without_words)
        return [answer for _ in images]

    def close(self) -> None:
        """It has no memory."""


@dataclass(frozen=True)
class Report:
    """What became of one image: its caption was written, kept, or could not be had for a reason.

    ``state`` says whose the caption is now.
    """

    path: Path
    outcome: str
    caption: str = ""
    reason: str = ""
    state: str = ""


def caption_folder(
    paths: Iterable[Path],
    captioner: Captioner,
    mode: str = ONLY_MISSING,
    *,
    request: Callable[[Path], Request] = lambda path: Request(),
    open_image: Callable[[Path], Image.Image],
) -> Iterator[Report]:
    """Caption the images, yielding a report after each; stopping early keeps what is written.

    The captioner gets ``batch_size`` images at once and is closed at the end, whatever the end is. A caption that the
    mode does not touch is never changed, and its image is not even opened. ``request`` says what is wanted for an
    image; ``open_image`` reads a picture as RGB and raises ValueError where it cannot.
    """
    if mode not in MODES:
        raise ValueError(f"The captioning mode '{mode}' is not known. Choose one of: {', '.join(MODES)}.")
    waiting: list[tuple[Path, Request]] = []
    try:
        with CaptionStore() as store:
            work = _Work(captioner, mode, store, open_image)
            for path in paths:
                wanted = request(path)
                if done := work.settled(path, wanted):
                    yield done
                    continue
                waiting.append((path, wanted))
                if len(waiting) >= captioner.batch_size:
                    # All of a batch is written before anybody may stop.
                    yield from list(work.reports(waiting))
                    waiting = []
            yield from list(work.reports(waiting))
    finally:
        captioner.close()


@dataclass(frozen=True)
class _Work:
    captioner: Captioner
    mode: str
    store: CaptionStore
    open_image: Callable[[Path], Image.Image]

    def settled(self, path: Path, request: Request) -> Report | None:
        """The report of an image that needs no captioner: it keeps its caption, or has one that cannot be read."""
        try:
            caption = read_caption(path) or request.known
            state = self._state(path, request)
            touched = state in TOUCHED[self.mode] and not (request.by and self.store.written_by(path) == request.by)
        except OSError as error:
            return _failed(path, error)
        return None if touched else Report(path, KEPT, caption, state=state)

    def reports(self, wanted: Sequence[tuple[Path, Request]]) -> Iterator[Report]:
        """Caption these images, those that are asked the same question at once."""
        pictures = []
        for path, request in wanted:
            try:
                pictures.append((path, request, self.open_image(path)))
            except (OSError, ValueError) as error:
                yield _failed(path, error)
        for question, group in groupby(pictures, key=lambda picture: picture[1].instruction):
            asked = list(group)
            answers = self._ask([image for _, _, image in asked], question)
            for (path, request, _), answer in zip(asked, answers, strict=True):
                yield self._written(path, request, answer)

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

    def _written(self, path: Path, request: Request, answer: Answer) -> Report:
        request = request.for_tags() if self.captioner.writes_tags else request
        caption = request.finish(answer.text, request.trigger, request.class_word)
        if answer.error or not caption:
            return _failed(path, answer.error or _no_caption(answer.text))
        try:
            before, state = read_caption(path) or request.known, self._state(path, request)
            if self.mode == ADD_AFTER and before:
                caption = request.added_to(before, answer.text)
            state = YOURS if self.mode == ADD_AFTER and state in (YOURS, REVIEWED) else AUTOMATIC
            self.store.write(path, caption, state=state, by=request.by)
        except (OSError, ValueError) as error:
            return _failed(path, error)
        return Report(path, KEPT if caption == before else WRITTEN, caption, state=state)

    def _state(self, path: Path, request: Request) -> str:
        state = self.store.state(path)
        return YOURS if state == MISSING and request.known else state


def _no_caption(said: str) -> str:
    """Why an answer made no caption."""
    if not said.strip():
        return "the captioner had nothing to say about it"
    return f"nothing is left of what the captioner said: {' '.join(said.split())[:80]}"


def _failed(path: Path, error: BaseException | str) -> Report:
    reason = error if isinstance(error, str) else _first_line(error)
    # The report names the file already.
    return Report(path, FAILED, reason=reason.removeprefix(f"{path.name} "))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def summary(reports: Iterable[Report]) -> str:
    """The reports in one line: ``12 written, 3 kept (yours), 1 failed: cat.png: reason``.

    Those that were kept and are not yours are counted apart. Pictures that failed for the same reason are named
    together, at most three of them.
    """
    reports = list(reports)
    count = {outcome: sum(report.outcome == outcome for report in reports) for outcome in (WRITTEN, KEPT, FAILED)}
    automatic = sum(report.outcome == KEPT and report.state == AUTOMATIC for report in reports)
    own = f"{automatic} kept (automatic), " if automatic else ""
    line = f"{count[WRITTEN]} written, {own}{count[KEPT] - automatic} kept (yours), {count[FAILED]} failed"
    failures: dict[str, list[str]] = {}
    for report in reports:
        if report.outcome == FAILED:
            failures.setdefault(report.reason, []).append(report.path.name)
    return f"{line}: {'; '.join(f'{_some(names)}: {why}' for why, names in failures.items())}" if failures else line


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
