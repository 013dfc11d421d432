"""What a dataset holds, in words, before a step is spent on it."""

from collections import Counter
from collections.abc import Sequence

from .dataset import REGULARIZATION, Dataset, Example
from .doctor import Diagnosis, Finding
from .doctor.vocabulary import style_of, tag_counts

# How many pictures people usually teach something with.
PURPOSES = {"a character": (15, 30), "an object": (20, 50), "a style": (50, 200), "a concept": (30, 100)}
MOST_OF_A_KIND, MOST_NAMED = 3, 10
MOST_TAGS = 12


def describe(dataset: Dataset, diagnosis: Diagnosis | None = None) -> str:
    """The report on a dataset, one fact a line: pictures, epoch, captions, buckets, and what is odd."""
    sections = [_facts(dataset), _words(dataset, diagnosis), _buckets(dataset), _notes(dataset), _oddities(diagnosis)]
    return "\n".join(line for section in sections for line in section)


def guidance(count: int) -> str:
    """What `count` pictures are enough for, by what people usually take."""
    usual = {what: f"{what} ({least}-{most})" for what, (least, most) in PURPOSES.items()}
    fitting = [usual[what] for what, (least, most) in PURPOSES.items() if least <= count <= most]
    if fitting:
        return f"{_pictures(count)} are as many as {' or '.join(fitting)} usually takes"
    extent = "fewer" if count < min(least for least, _ in PURPOSES.values()) else "more"
    return f"{_pictures(count)} {'is' if count == 1 else 'are'} {extent} than usual: {', '.join(usual.values())}"


def _facts(dataset: Dataset) -> list[str]:
    pictures = dataset.examples + dataset.held_out
    learned = [example for example in dataset.examples if example.role != REGULARIZATION]
    remembered = [example for example in dataset.examples if example.role == REGULARIZATION]
    lines = [
        f"{_pictures(len(pictures))} in {dataset.folder}",
        f"Trained on: {_pictures(len(learned))}, {_epoch(learned)}",
        f"Held out for validation: {_names(dataset.held_out)}",
    ]
    if remembered:
        lines.insert(2, f"Regularization: {_pictures(len(remembered))}, {_epoch(remembered)}")
    if learned:
        lines.append(f"Count: {guidance(len(learned) + len(dataset.held_out))}")
    if masked := sum(example.mask is not None for example in pictures):
        lines.append(f"Masks: {masked} of {len(pictures)}")
    return lines


def _words(dataset: Dataset, diagnosis: Diagnosis | None) -> list[str]:
    pictures, uncaptioned = dataset.examples + dataset.held_out, set(dataset.uncaptioned)
    lines = [
        f"Trigger word: {dataset.trigger_word or 'none'}",
        f"Captions: {len(pictures) - len(uncaptioned)} of {len(pictures)}",
    ]
    captions = [example.caption for example in pictures if example.path not in uncaptioned]
    if style_of(captions) == "tags":
        lines.append(f"Tags: {_tags(tag_counts(captions))}")
    if diagnosis and diagnosis.tokens:
        counts = diagnosis.tokens.values()
        lines.append(f"Tokens: {min(counts)} to {max(counts)}, the model takes {diagnosis.limit} in one piece")
    return lines


def _tags(counts: Counter[str]) -> str:
    often = ", ".join(f"{tag} ({count})" for tag, count in counts.most_common(MOST_TAGS))
    once = sum(count == 1 for count in counts.values())
    return f"{len(counts)} different, {once} of them once only; most often {often}"


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _epoch(examples: Sequence[Example]) -> str:
    """How many pictures an epoch shows, and why when some are repeated."""
    repeats = {example.repeats for example in examples}
    total = sum(example.repeats for example in examples)
    times = f"{min(repeats, default=1)} to {max(repeats)}" if len(repeats) > 1 else f"{max(repeats, default=1)}"
    return f"{total} in an epoch" + (f" ({times} repeats)" if repeats - {1} else "")


def _names(examples: Sequence[Example]) -> str:
    if not examples:
        return "none, so the picker can only guess from the training pictures"
    return f"{len(examples)} ({_some([example.path.name for example in examples])})"


def _some(names: Sequence[str]) -> str:
    """The first names, and how many there are beside them: a report of thousands would be read by nobody."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} others" if more > 0 else "")


def _buckets(dataset: Dataset) -> list[str]:
    counts = Counter(size for example in dataset.examples for size in dataset.sizes_of(example))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"  {width} x {height}: {_pictures(count)}" for (width, height), count in ordered]
    resolutions = ", ".join(map(str, dataset.resolutions))
    at = f"resolutions {resolutions}" if resolutions else f"resolution {dataset.resolution}"
    return [f"Buckets at {at}:", *lines] if lines else []


def _notes(dataset: Dataset) -> list[str]:
    return ["Notes:", *(f"  {note}" for note in dataset.notes)] if dataset.notes else []


def _oddities(diagnosis: Diagnosis | None) -> list[str]:
    """What the doctor found, the dataset first; pictures without a caption are among the notes already."""
    if diagnosis is None:
        return []
    whole = [f"  {finding.kind}: {finding.message}" for finding in diagnosis.of(None)]
    kinds: dict[str, list[Finding]] = {}
    for finding in diagnosis.findings:
        if finding.path is not None and finding.kind != "no caption":
            kinds.setdefault(finding.kind, []).append(finding)
    single = [line for kind, findings in kinds.items() for line in _of_a_kind(kind, findings)]
    return ["Worth a look:", *whole, *single] if whole or single else ["Worth a look: nothing, all seems well"]


def _of_a_kind(kind: str, findings: Sequence[Finding]) -> list[str]:
    lines = [f"  {kind}: {finding.path.name} {finding.message}" for finding in findings[:MOST_OF_A_KIND]]
    more = [finding.path.name for finding in findings[MOST_OF_A_KIND:]]
    return lines + [f"  {kind}: {len(more)} more ({_some(more)})"] * bool(more)
