"""The examination of a dataset: every picture opened once, a few at a time, and every caption read."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ..buckets import enlargement
from ..dataset import REGULARIZATION, Dataset, Example, natural_key
from ..masks import open_mask
from . import captions, duplicates, pictures, vocabulary
from .diagnosis import Diagnosis, Finding
from .pictures import Measures

TOO_SMALL = 0.5  # of the pixels it is trained with
MOST_NAMED = 5
AT_ONCE, MOST_THREADS = 32, 4
TWIN = "twin in training"


def examine(
    dataset: Dataset,
    *,
    tokens: Callable[[str], int] | None = None,
    limit: int = 75,
    style: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diagnosis:
    """What is odd about the pictures and captions to learn from and held out; no file is changed.

    `tokens` counts those of a text and `limit` is how many the model takes in one piece. `style` is what it reads best,
    "tags" or "sentences"; "" compares the captions with each other. Regularization pictures are not looked at: they
    are to show what the base model makes, odd or not. `progress` hears (done, total) and may raise to stop.
    """
    examples = _examined(dataset)
    style = style or vocabulary.style_of([text for example in examples for text in _texts(example)])
    counts = {example.path: max(map(tokens, _texts(example))) for example in examples} if tokens else {}
    uncaptioned = set(dataset.uncaptioned)
    measured: dict[Path, Measures] = {}
    findings: list[Finding] = []
    for done, (example, seen) in enumerate(zip(examples, _seen(examples, dataset), strict=True), 1):
        if isinstance(seen, Measures):
            measured[example.path] = seen
            findings += (Finding(kind, said, example.path) for kind, said in _about_picture(example, dataset, seen))
        else:
            findings.append(Finding("unreadable", str(seen).removeprefix(f"{example.path.name} "), example.path))
        if example.path in uncaptioned:
            findings.append(Finding("no caption", "has no caption.", example.path))
        else:
            findings += (Finding(kind, said, example.path) for kind, said in _about_captions(example, style))
        progress(done, len(examples))
    alike, clusters = _alike(measured)
    return as_split(Diagnosis((*findings, *alike), counts, clusters, limit if tokens else 0), dataset)


def as_split(diagnosis: Diagnosis, dataset: Dataset) -> Diagnosis:
    """The diagnosis of the same pictures when others of them are held out; no picture is opened for it."""
    single = [finding for finding in diagnosis.findings if finding.path is not None and finding.kind != TWIN]
    whole = (Finding(kind, said) for kind, said in _about_all(dataset, diagnosis))
    return replace(diagnosis, findings=(*single, *_twins(dataset, diagnosis), *whole))


def _examined(dataset: Dataset) -> list[Example]:
    """The pictures to look at, in the order of their names whatever is held out."""
    examples = (example for example in dataset.examples + dataset.held_out if example.role != REGULARIZATION)
    return sorted(examples, key=lambda example: natural_key(str(example.path)))


def _seen(examples: Sequence[Example], dataset: Dataset) -> Iterator[Measures | ValueError]:
    """The measures of each picture in turn, or why it has none; the pictures themselves are not kept."""

    def seen(example: Example) -> Measures | ValueError:
        try:
            mask = open_mask(example) if example.fill_masked else None
            return pictures.measure(example.path, math.prod(dataset.sizes_of(example)[-1]), mask)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(examples), AT_ONCE):
            yield from pool.map(seen, examples[start : start + AT_ONCE])


def _about_picture(example: Example, dataset: Dataset, measures: Measures) -> Iterator[tuple[str, str]]:
    if measures.blur >= pictures.BLURRY:
        yield "blurry", f"is blurry ({measures.blur:.2f}; sharp pictures are below .50): the LoRA would learn the blur."
    elif measures.blur >= pictures.SOFT:
        yield "soft", f"is a little soft ({measures.blur:.2f}; sharp pictures are below .50): is there a sharper one?"
    if measures.detail < pictures.ENLARGED:
        yield "enlarged", "has no fine detail at the size it is trained at, as if enlarged from a smaller picture."
    width, height = dataset.sizes_of(example)[0]
    share = example.width * example.height / (width * height)
    if share < TOO_SMALL:
        factor = enlargement(example.width, example.height, (width, height))
        size = f"{example.width} x {example.height}"
        yield "too small", f"is {size}, scaled up {factor:.1f} times to {width} x {height}: use a larger original."
    if measures.turned:
        yield "EXIF-rotated", "lies on its side or upside down in its file and was turned as its EXIF data say."
    if measures.transparent:
        masked = example.mask == example.path
        instead = "which is masked: it is not learned" if masked else f"where {dataset.background} is learned instead"
        yield "alpha", f"is see-through in {max(0.01, measures.transparent):.0%} of its area, {instead}."


def _about_captions(example: Example, style: str) -> Iterator[tuple[str, str]]:
    """Each kind once, however many captions a picture has."""
    texts = reversed(_texts(example))
    yield from {kind: said for text in texts for kind, said in captions.lint(text, example.trigger_word, style)}.items()


def _texts(example: Example) -> tuple[str, ...]:
    return (example.caption, *example.variants)


def _alike(measured: dict[Path, Measures]) -> tuple[list[Finding], tuple[tuple[Path, ...], ...]]:
    """Findings on pictures that are nearly the same or similar, and the groups of the former."""
    paths, findings = list(measured), []
    pairs = sorted(duplicates.pairs(list(measured.values())), key=lambda pair: pair.bits)
    for pair in {pair.second: pair for pair in reversed(pairs)}.values():  # the closest of each
        findings.append(Finding(*_likeness(pair, paths[pair.first].name), paths[pair.second]))
    same = [(pair.first, pair.second) for pair in pairs if pair.bits <= duplicates.SAME]
    groups = duplicates.clusters(len(paths), same)
    return findings, tuple(tuple(paths[number] for number in group) for group in groups)


def _likeness(pair: duplicates.Pair, other: str) -> tuple[str, str]:
    if pair.bits > duplicates.SAME:
        return "similar", f"is similar to {other}: look whether both add something."
    if pair.mirrored:
        return "mirrored", f"is nearly the mirror image of {other}: one is enough."
    return "near-duplicate", f"is nearly the same picture as {other}: one is enough."


def _twins(dataset: Dataset, diagnosis: Diagnosis) -> Iterator[Finding]:
    held_out = {example.path for example in dataset.held_out}
    for cluster in diagnosis.clusters:
        trained = [path for path in cluster if path not in held_out]
        for path in cluster:
            if path in held_out and trained:
                said = (
                    f"is held out, but {trained[0].name}, nearly the same, is trained on: it says little about others."
                )
                yield Finding(TWIN, said, path)


def _about_all(dataset: Dataset, diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    uncaptioned, counts, limit = set(dataset.uncaptioned), diagnosis.tokens, diagnosis.limit
    captioned = [example for example in _examined(dataset) if example.path not in uncaptioned]
    for text, count in vocabulary.repeated([example.caption for example in captioned])[:MOST_NAMED]:
        yield "identical captions", f"{count} pictures have the same caption, “{text}”: say what differs between them."
    concepts: dict[str, list[Example]] = defaultdict(list)
    for example in captioned:
        concepts[example.trigger_word].append(example)
    for trigger, members in concepts.items():
        tied = vocabulary.tied([example.caption for example in members], trigger, members[0].class_words)
        for phrase, share in tied[:MOST_NAMED]:
            bound = f"the trigger word “{trigger}”" if trigger else "everything the LoRA learns"
            yield "tied phrase", f"“{phrase}” is in {share:.0%} of the captions and will be tied to {bound}."
    yield from _lonely(dataset)
    yield from _sharing(captioned)
    long = sorted(((count, path) for path, count in counts.items() if count > limit), reverse=True)
    if long:
        share = f"{len(long)} of {len(counts)} captions"
        longest = f"{long[0][1].name} with {long[0][0]}"
        yield (
            "long captions",
            f"{share} have more than the {limit} tokens the model takes in one piece, most {longest}.",
        )


def _lonely(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Sizes that one picture alone is trained at."""
    members: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for example in dataset.examples:
        for size in dataset.sizes_of(example):
            members[size].append(example.path)
    lonely = [f"{w} x {h} ({paths[0].name})" for (w, h), paths in members.items() if len(paths) == 1]
    if lonely and len(dataset.examples) > 1:
        names = ", ".join(lonely[:MOST_NAMED]) + (" and more" if len(lonely) > MOST_NAMED else "")
        yield "one-picture bucket", f"only one picture each is trained at {names}: it never shares a batch with others."


def _sharing(examples: Sequence[Example]) -> Iterator[tuple[str, str]]:
    """Pictures whose caption file is the same one, as of a.jpg and a.png."""
    first: dict[tuple[Path, str], Path] = {}
    for example in examples:
        other = first.setdefault((example.path.with_suffix(""), example.caption), example.path)
        if other != example.path:
            yield "one caption file", f"{other.name} and {example.path.name} have one caption file between them."
