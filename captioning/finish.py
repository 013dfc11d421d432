"""What a captioner said -> the caption that is written, by the user's rules."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .exclusion import Exclusion
from .replacement import Replacements
from .style import SENTENCES, STYLES, TAGS
from .tags import spaced, split_tags, unique, without
from .text import SENTENCE_ENDS, clean, clean_tags
from .trigger import holds, in_sentences, in_tags, kept_through

MOST_ROUNDS = 100


@dataclass(frozen=True)
class Finish:
    """How captions are to read. Finishing a finished caption changes nothing.

    ``keep_first`` are tags that come first where they are given; ``most_words`` cuts a caption to whole sentences or
    tags, of which the first always stays (0 = no limit).
    """

    style: str = SENTENCES
    prefix: str = ""
    suffix: str = ""
    replace: Replacements = field(default_factory=Replacements)
    exclude: Exclusion = field(default_factory=Exclusion)
    keep_first: str = ""
    most_words: int = 0

    def __post_init__(self):
        if self.style not in STYLES:
            raise ValueError(f"The caption style '{self.style}' is not known. Choose one of: {', '.join(STYLES)}.")

    def __call__(self, said: str, trigger: str = "", class_word: str = "") -> str:
        """The caption, with the trigger word in it; "" when nothing that was said can stay."""
        trigger, class_word = " ".join(trigger.split()), " ".join(class_word.split())
        rules = _Tags if self.style == TAGS else _Sentences
        return rules(self, trigger, class_word).caption(said)


@dataclass(frozen=True)
class _Sentences:
    rules: Finish
    trigger: str
    class_word: str

    def caption(self, said: str) -> str:
        prefix, suffix = (" ".join(text.split()) for text in (self.rules.prefix, self.rules.suffix))
        trigger = "" if holds(f"{prefix} {suffix}", self.trigger) else self.trigger

        def once(body: str) -> str:
            body = kept_through(clean, _without_ends(body, prefix, suffix), trigger)
            body = self._cut(self._allowed(self.rules.replace.in_sentences(body)))
            return in_sentences(body, trigger, self.class_word) if body else ""

        body = settled(once, said)
        return _joined(_joined(prefix, body), suffix) if body else ""

    def _allowed(self, body: str) -> list[str]:
        """The sentences that hold nothing excluded, each once."""
        return unique(s for s in SENTENCE_ENDS.split(body) if not self.rules.exclude.has_sentence(s))

    def _cut(self, sentences: list[str]) -> str:
        return " ".join(_within(sentences, self.rules.most_words))


@dataclass(frozen=True)
class _Tags:
    rules: Finish
    trigger: str
    class_word: str

    def caption(self, said: str) -> str:
        return settled(self._once, said)

    def _once(self, said: str) -> str:
        prefix, suffix = split_tags(self.rules.prefix), split_tags(self.rules.suffix)
        trigger, *more = split_tags(self.trigger) or [""]
        prefix = more + prefix
        if any(holds(tag, trigger) for tag in prefix + suffix):
            trigger = ""
        tags = without(split_tags(kept_through(clean_tags, said, trigger)), prefix + suffix)
        tags = self.rules.replace.in_tags([tag if holds(tag, trigger) else spaced(tag) for tag in tags])
        tags = [tag for tag in unique(tags) if not self.rules.exclude.has_tag(tag)]
        if not tags:
            return ""
        first = [tag for tag in split_tags(self.rules.keep_first) if tag not in without([tag], tags)]
        tags = in_tags(first + without(tags, first), trigger, self.class_word)
        head = 1 if trigger else 0
        tags = unique(tags[:head] + prefix + tags[head:])
        kept = _within(tags, self.rules.most_words, at_least=head + len(prefix) or 1)
        return ", ".join(kept + without(suffix, kept))


def settled(once: Callable[[str], str], caption: str) -> str:
    """Repeat until nothing changes, because what is cut away may lay bare what must be cut too."""
    for _ in range(MOST_ROUNDS):
        before, caption = caption, once(caption)
        if caption == before:
            break
    return caption


def _within(parts: list[str], most_words: int, at_least: int = 1) -> list[str]:
    """The first parts that together have no more words than allowed, and never fewer than ``at_least``."""
    kept, words = [], 0
    for part in parts:
        words += len(part.split())
        if most_words and words > most_words and len(kept) >= at_least:
            break
        kept.append(part)
    return kept


def _without_ends(body: str, prefix: str, suffix: str) -> str:
    """The body without the prefix and the suffix it may already have."""
    if prefix:
        body = re.sub(rf"^(?:\s*{re.escape(prefix)}(?!\w))+\s*", "", body, flags=re.IGNORECASE)
    if suffix:
        start = r"(?<!\w)" if suffix[0].isalnum() else ""
        body = re.sub(rf"(?:\s*{start}{re.escape(suffix)})+\s*$", "", body, flags=re.IGNORECASE)
    return body


def _joined(first: str, second: str) -> str:
    """Both with a blank between, unless the second is punctuation that belongs to the first."""
    if not (first and second):
        return first or second
    return first + second if second[0] in ",.;:!?" else f"{first} {second}"
