"""What the Auto-Captioner wants for each picture of a dataset."""

from __future__ import annotations

from pathlib import Path

from ..captioning.caption_file import hash_of
from ..captioning.request import Request
from ..captioning.style import instruction
from ..captioning.text import words_of_name
from ..captioning.trigger import named
from ..training.dataset import Dataset, Example
from .captioner_inputs import FILE_NAME, TRIGGER_ONLY, Choices


def requests_for(dataset: Dataset, choices: Choices, style: str, source: str) -> dict[Path, Request]:
    """A request for every picture, by its path; `source` says which captioner is asked."""
    finish = choices.finish(style)
    missing = set(dataset.uncaptioned)
    requests = {}
    for example in (*dataset.examples, *dataset.held_out):
        class_word = choices.class_word.strip() or class_of(example)
        asked = question(example, choices, finish.style, class_word)
        decided_by = (source, asked, finish, example.trigger_word, class_word)
        if example.fill_masked:
            decided_by = (*decided_by, "painted over")
        requests[example.path] = Request(
            instruction=asked,
            finish=finish,
            trigger=example.trigger_word,
            class_word=class_word,
            by=f"{choices.captioner} {hash_of(repr(decided_by))}",
            known="" if example.path in missing else "\n".join((example.caption, *example.variants)),
        )
    return requests


def question(example: Example, choices: Choices, style: str, class_word: str) -> str:
    """What the captioner is asked about the picture, or told to say."""
    if choices.captioner == TRIGGER_ONLY:
        return named(example.trigger_word, class_word)
    if choices.captioner == FILE_NAME:
        return words_of_name(example.path.stem)
    return choices.instruction.strip() or instruction(style, choices.purpose, class_word)


def class_of(example: Example) -> str:
    """What the name of its folder says it is, without the trigger word: "star" in "10_zork star"."""
    words = example.class_words.split()
    trigger = example.trigger_word.split()
    return " ".join(words[len(trigger) :] if words[: len(trigger)] == trigger else words)
