"""Where the trigger word goes in a caption. Pure functions of strings and lists."""

import re
from collections.abc import Callable, Sequence

from .tags import without

STAND_IN = "\ua66e\ua66e"
"""Two letters that nobody writes."""


def holds(text: str, words: str) -> bool:
    """Whether the words are in the text, whole and in any case."""
    return bool(words) and _whole(words).search(text) is not None


def named(trigger: str, class_word: str) -> str:
    """The trigger word together with its class, such as "ohwx woman"; a class that is in it is not repeated."""
    return trigger if holds(trigger, class_word) else f"{trigger} {class_word}".strip()


def kept_through(clean: Callable[[str], str], said: str, trigger: str) -> str:
    """What ``clean`` makes of the text, but for the trigger word, which may look like mark-up: ``<s0>``."""
    return clean(_whole(trigger).sub(STAND_IN, said)).replace(STAND_IN, trigger) if trigger else clean(said)


def in_sentences(caption: str, trigger: str, class_word: str = "") -> str:
    """The caption with the trigger word in it once: "a woman sits" becomes "ohwx woman sits".

    It takes the place of the article before the first ``class_word``; without one it is put first. A caption that has
    it already only has it written as it should be.
    """
    if not trigger:
        return caption
    if holds(caption, trigger):
        return _whole(trigger).sub(lambda _: trigger, caption)
    name = named(trigger, class_word)
    if class_word:
        with_article = re.compile(rf"(?<!\w)(?:an?|the)\s+{re.escape(class_word)}(?!\w)", re.IGNORECASE)
        for pattern in (with_article, _whole(class_word)):
            if pattern.search(caption):
                return pattern.sub(lambda _: name, caption, count=1)
    return f"{name}, {caption}" if caption else name


def in_tags(tags: Sequence[str], trigger: str, class_word: str = "") -> list[str]:
    """The tags with the trigger word first, together with its class: "ohwx woman, red coat"."""
    if not trigger:
        return list(tags)
    name = named(trigger, class_word)
    holders = [_whole(trigger).sub(lambda _: trigger, tag) for tag in tags if holds(tag, trigger)]
    others = [tag for tag in tags if not holds(tag, trigger)]
    first = name if not holders or holders[0] == trigger else holders[0]
    return [first, *holders[1:], *without(others, [class_word])]


def _whole(words: str) -> re.Pattern:
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)
