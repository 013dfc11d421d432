"""What is wrong with one caption. Pure functions of the text."""

import re
from collections.abc import Iterator

SENTENCES, TAGS = "sentences", "tags"

_REFUSAL = re.compile(
    r"\b(?:i['’]m|i am) (?:\w+ )?(?:sorry|unable|not able)\b|\bi (?:cannot|can['’]t|can not|won['’]t|will not)\b"
    r"|\bas an? (?:\w+ )?(?:ai|(?:language )?model|assistant)\b|\bmy (?:apologies|guidelines)\b",
    re.IGNORECASE,
)
_BOILER_PLATE = re.compile(
    r"^\W*(?:(?:in )?(?:this|the) (?:\w+ )?(?:image|picture|photo|photograph)"
    r"(?: (?:shows|depicts|features|displays|presents|captures|contains|portrays|illustrates|is of)\b|,)"
    r"|(?:sure|certainly|of course|absolutely)\b[^.!:]{0,60}[.!:,]|here(?:['’]s| is| are)\b[^.:]{0,80}:"
    r"|(?:caption|description|tags|prompt) ?:)",
    re.IGNORECASE,
)
_MARK_UP = re.compile(r"</?s>|</?think>|<loc_|<\|[^|>]*\|>|\*\*|\[/?INST\]|https?://", re.IGNORECASE)
_GLUE = re.compile(r"an?|the|is|are|was|were|has|have|with|wearing|while|and|which|that|his|her|their|its")


def lint(caption: str, trigger: str = "", style: str = "") -> Iterator[tuple[str, str]]:
    """(kind, what its picture is or has) for everything odd about a caption as it is trained.

    `style` is what the model reads best; it and `trigger` are "" when there is nothing to compare with.
    """
    yield from _remains(caption)
    if trigger:
        times = trigger_count(caption, trigger)
        if times == 0:
            yield "trigger missing", f"is captioned without “{trigger}”, so it is learned under other words."
        elif times > 1:
            yield "trigger twice", f"has “{trigger}” {times} times in its caption: once is enough."
    if style == SENTENCES and looks_like_tags(caption):
        yield "tags, not a sentence", "is captioned with tags, but the model or the other captions use sentences."
    elif style == TAGS and looks_like_a_sentence(caption):
        yield "a sentence, not tags", "is captioned with a sentence, but the model or the other captions use tags."


def _remains(caption: str) -> Iterator[tuple[str, str]]:
    """What a captioner says besides the caption."""
    if found := _REFUSAL.search(caption):
        yield "refusal", f"has the captioner talking in its caption (“{found[0]}”): write it by hand."
    if found := _BOILER_PLATE.search(caption):
        yield "boiler-plate", f"has a caption that opens with “{found[0].strip()}”: only what is seen should be in it."
    if found := _MARK_UP.search(caption):
        yield "mark-up", f"has “{found[0]}” in its caption, which the model would learn as a word: remove it."


def trigger_count(caption: str, trigger: str) -> int:
    """How often `trigger` is in the caption as a whole word, in any case."""
    return len(re.findall(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE))


def tags_of(caption: str) -> list[str]:
    """The comma-separated parts of a caption, blanks and underscores evened out, lower case."""
    parts = (" ".join(part.replace("_", " ").split()).casefold() for part in re.split(r"[,\n]", caption))
    return [part for part in parts if part]


def looks_like_tags(caption: str) -> bool:
    """Whether it is three or more short parts between commas, hardly joined by articles and verbs."""
    tags = tags_of(caption)
    words = [word for tag in tags for word in tag.split()]
    return len(tags) >= 3 and len(words) <= 3 * len(tags) and 10 * _glue(words) <= len(words)


def looks_like_a_sentence(caption: str) -> bool:
    """Whether it is six or more words joined by articles and verbs."""
    words = caption.casefold().split()
    return len(words) >= 6 and 10 * _glue(words) > len(words) and not looks_like_tags(caption)


def _glue(words: list[str]) -> int:
    return sum(bool(_GLUE.fullmatch(word.strip(".,;:!?"))) for word in words)
