"""What a dataset holds, in words, before a step is spent on it."""

from collections import Counter

from .buckets import bucket_for, bucket_sizes
from .dataset import Dataset, Example


def describe(dataset: Dataset) -> str:
    """The report on a dataset, one fact a line: pictures, epoch, captions, buckets, and what is odd."""
    return "\n".join([*_facts(dataset), *_buckets(dataset), *_notes(dataset)])


def _facts(dataset: Dataset) -> list[str]:
    pictures = dataset.examples + dataset.held_out
    captioned = len(pictures) - len(dataset.uncaptioned)
    return [
        f"{_pictures(len(pictures))} in {dataset.folder}",
        f"Trained on: {_pictures(len(dataset.examples))}, {_epoch(dataset.examples)}",
        f"Held out for validation: {_names(dataset.held_out)}",
        f"Trigger word: {dataset.trigger_word or 'none'}",
        f"Captions: {captioned} of {len(pictures)}",
    ]


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def _epoch(examples: tuple[Example, ...]) -> str:
    """How many pictures an epoch shows, and why when some are repeated."""
    repeats = {example.repeats for example in examples}
    total = sum(example.repeats for example in examples)
    times = f"{min(repeats)} to {max(repeats)}" if len(repeats) > 1 else f"{max(repeats)}"
    return f"{total} in an epoch" + (f" ({times} repeats)" if repeats != {1} else "")


def _names(examples: tuple[Example, ...]) -> str:
    if not examples:
        return "none, so the picker can only guess from the training pictures"
    return f"{len(examples)} ({', '.join(example.path.name for example in examples)})"


def _buckets(dataset: Dataset) -> list[str]:
    sizes = bucket_sizes(dataset.resolution)
    counts = Counter(bucket_for(example.width, example.height, sizes) for example in dataset.examples)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    lines = [f"  {width} x {height}: {_pictures(count)}" for (width, height), count in ordered]
    return [f"Buckets at resolution {dataset.resolution}:", *lines]


def _notes(dataset: Dataset) -> list[str]:
    return ["Notes:", *(f"  {note}" for note in dataset.notes)] if dataset.notes else []
