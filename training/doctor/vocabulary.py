"""What the captions of a dataset have in common, and whether a LoRA should learn it."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from .captions import SENTENCES, TAGS, looks_like_a_sentence, looks_like_tags, tags_of

LEAST_CAPTIONS = 8  # of fewer captions, "most of them" says little
TIED_SHARE = 0.8
SAME_SHARE, SAME_COUNT = 0.3, 3
LONGEST_PHRASE = 5
# Words that teach nothing: grammar, and that a picture is a picture.
_EMPTY = re.compile(
    r"an?|the|of|in|on|at|with|and|or|to|from|by|for|near|is|are|was|were|be|as|its?|this|that|his|her|their|he|she|they"
    r"|there|which|while|into|over|under|behind|beside|photo|photograph|picture|image"
)


def style_of(captions: Sequence[str]) -> str:
    """What at least four of five captions are, "tags" or "sentences"; "" when they are mixed, short or few."""
    if len(captions) >= LEAST_CAPTIONS:
        for style, fits in ((TAGS, looks_like_tags), (SENTENCES, looks_like_a_sentence)):
            if sum(map(fits, captions)) >= TIED_SHARE * len(captions):
                return style
    return ""


def repeated(captions: Sequence[str]) -> list[tuple[str, int]]:
    """(caption, how often) of what three or more pictures share, or more than 30 % of them, most frequent first."""
    counts = Counter(" ".join(caption.split()).casefold() for caption in captions if caption.strip())
    least = min(SAME_COUNT, max(2, int(SAME_SHARE * len(captions)) + 1))
    return [(text, count) for text, count in counts.most_common() if count >= least]


def tag_counts(captions: Sequence[str]) -> Counter[str]:
    """In how many captions each tag is."""
    return Counter(tag for caption in captions for tag in dict.fromkeys(tags_of(caption)))


def tied(captions: Sequence[str], trigger: str = "", class_words: str = "") -> list[tuple[str, float]]:
    """(phrase, share of captions) of what more than 80 % of the captions say besides the trigger and its class.

    A phrase is a tag, or up to five words of a sentence; of overlapping ones the longest are named. The class is
    `class_words` and the word that usually follows the trigger, as "woman" in "zork woman": it is meant to be tied.
    """
    if len(captions) < LEAST_CAPTIONS:
        return []
    whole = style_of(captions) == TAGS
    known = {*_words(class_words), *_words(trigger), _follower(captions, trigger)}
    phrases = Counter(
        phrase for caption in captions for phrase in set(tags_of(caption) if whole else _phrases(caption, trigger))
    )
    often = {phrase: count for phrase, count in phrases.items() if count > TIED_SHARE * len(captions)}
    often = {phrase: count for phrase, count in often.items() if _says_more(phrase, known)}
    longest = [p for p in often if not any(p != other and f" {p} " in f" {other} " for other in often)]
    return [(phrase, often[phrase] / len(captions)) for phrase in sorted(longest, key=lambda p: (-often[p], p))]


def _says_more(phrase: str, known: set[str]) -> bool:
    return any(word not in known and not _EMPTY.fullmatch(word) for word in _words(phrase))


def _phrases(caption: str, trigger: str) -> Iterator[str]:
    """Every run of up to five words between commas and stops whose first and last word say something."""
    for part in re.split(r"[.,;:!?()\n]", _without(caption, trigger)):
        words = _words(part)
        telling = [place for place, word in enumerate(words) if not _EMPTY.fullmatch(word)]
        for first in telling:
            yield from (" ".join(words[first : last + 1]) for last in telling if first <= last < first + LONGEST_PHRASE)


def _without(caption: str, trigger: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(trigger)}(?!\w)", ",", caption, flags=re.IGNORECASE) if trigger else caption


def _follower(captions: Sequence[str], trigger: str) -> str:
    """The word that comes right after the trigger in most captions, or ""."""
    pattern = rf"(?<!\w){re.escape(trigger)},? (?:an? |the )?(\w+)"
    found = (re.search(pattern, caption, re.IGNORECASE) for caption in captions) if trigger else ()
    counts = Counter(match[1].casefold() for match in found if match)
    word, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return word if 2 * count > len(captions) else ""


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.casefold())
