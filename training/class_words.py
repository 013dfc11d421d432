"""What a trigger word stands for, in words that the model knows already: "woman" for "zork"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from .dataset import TRAIN, Dataset, says


def with_class_words(dataset: Dataset, class_words: str) -> Dataset:
    """The dataset with these words as the class of all its concepts; with none, it keeps those of its folders."""
    words = " ".join(class_words.split())
    if not words:
        return dataset
    told = (replace(e, class_words=words) if e.role == TRAIN else e for e in dataset.examples)
    return replace(dataset, examples=tuple(told))


def classes_of(dataset: Dataset) -> dict[str, str]:
    """Each concept's trigger word with its class words; ValueError saying where to type those that are missing."""
    classes = {}
    for example in dataset.concepts:
        trigger = example.trigger_word.strip()
        if not trigger:
            raise ValueError(
                f"preservation says class words for the trigger word, and {example.path.name} has none: type a "
                "trigger_word in LoRA Dataset Loader, or set preservation to 0."
            )
        words = _replaced(example.class_words, trigger, "").strip()
        if not words:
            raise ValueError(
                f"preservation needs to know what '{trigger}' is: type its class, such as 'woman', into class_words of "
                f"LoRA Training Settings, or call its folder '1_{trigger} woman', or set preservation to 0."
            )
        classes.setdefault(trigger, words)
    return classes


def class_text(text: str, classes: Mapping[str, str]) -> str | None:
    """The text with class words for every trigger word, also where they follow it; None when it holds none."""
    found = [trigger for trigger in sorted(classes, key=len, reverse=True) if says(text, trigger)]
    for trigger in found:
        text = _replaced(text, trigger, classes[trigger])
    return text if found else None


def _replaced(text: str, trigger: str, words: str) -> str:
    """`words` for the trigger word, and for "trigger words" too, so that "zork woman" is no "woman woman"."""
    following = rf"(\s+{re.escape(words)}(?!\w))?" if words else ""
    pattern = rf"(?<!\w){re.escape(trigger)}(?!\w){following}"
    return re.sub(pattern, lambda _: words, text, flags=re.IGNORECASE)
