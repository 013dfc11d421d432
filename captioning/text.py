"""What a captioner said, turned into what belongs in a caption file. Pure string functions."""

import re
from collections.abc import Callable

from .tags import TWO_LETTERS, split_tags, unique

LEAD_INS = re.compile(
    r"""^(?:
        (?:sure|certainly|of\ course|absolutely|okay|ok)\b[^.!:\n]{0,60}[.!:,]
      | (?:here\ is|here's|here\ are|below\ is|below\ are)\b[^.:\n]{0,80}:
      | (?:the\ )?(?:caption|description|tags|image\ description|short\ caption)\s*:
      | (?:in\ )?(?:this|the)\ (?:image|picture|photo|photograph)
          (?:\s+(?:shows|depicts|features|displays|presents|captures|contains|portrays|illustrates|is\ of)\b|,)
    )\s*""",
    re.IGNORECASE | re.VERBOSE,
)
REFUSALS = re.compile(
    r"""\b(?:
        (?:i'm|i\ am)\ (?:really\ |very\ )?(?:sorry|unable|not\ able)
      | i\ (?:can't|cannot|can\ not|won't|will\ not|could\ not|couldn't)\b
      | as\ an?\ (?:ai|language\ model|assistant)\b
      | my\ (?:apologies|guidelines)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)
THINKING = re.compile(r"^.*</think>", re.DOTALL)
# The face <|>_<|> is none.
MARKUP = re.compile(r"(?<!_)</?[a-zA-Z_|][^<>\n]{0,40}>(?!_)")
LIST_MARK = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s+")
SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+")
QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "`": "`"}


def clean(caption: str) -> str:
    """The caption without lead-ins, refusals, quotes, mark-up and line breaks; "" when nothing is left.

    Cleaning twice changes nothing.
    """
    return _settled(_clean_once, caption)


def clean_tags(caption: str) -> str:
    """The caption as comma-separated tags: cleaned, list marks removed, each tag once."""
    return _settled(_clean_tags_once, caption)


def words_of_name(stem: str) -> str:
    """The words in the name of a file, without the number at its end: "red_fox-02" says "red fox"."""
    return " ".join(re.sub(r"[\s_-]*\(?\d*\)?$", "", stem).replace("_", " ").replace("-", " ").split())


def _settled(once: Callable[[str], str], caption: str) -> str:
    """Repeat until nothing is cut, because what is cut away may lay bare another lead-in."""
    before = None
    while caption != before:
        before, caption = caption, once(caption)
    return caption


def _clean_once(caption: str) -> str:
    caption = MARKUP.sub(" ", THINKING.sub("", caption))
    caption = " ".join(caption.replace("**", "").replace("\u2019", "'").split())
    return _without_refusals(_without_lead_in(_unquoted(caption))).lstrip(" ,")


def _unquoted(caption: str) -> str:
    """Strip one pair of quotes that holds the whole caption; quotes inside it stay."""
    inner = caption[1:-1]
    if len(caption) > 1 and QUOTES.get(caption[0]) == caption[-1] and not {caption[0], caption[-1]} & set(inner):
        return inner.strip()
    return caption


def _without_lead_in(caption: str) -> str:
    """Cut "This image shows" and its like; what followed it then opens the sentence, unless a colon set it apart."""
    lead_in = LEAD_INS.match(caption)
    if lead_in is None:
        return caption
    rest = caption[lead_in.end() :]
    opens = caption[0].isupper() and not lead_in.group().rstrip().endswith(":")
    return rest[:1].upper() + rest[1:] if opens else rest


def _without_refusals(caption: str) -> str:
    """A caption that opens with a refusal is one; a refusing sentence later on is only dropped."""
    sentences = SENTENCE_ENDS.split(caption)
    if REFUSALS.search(sentences[0]):
        return ""
    return " ".join(sentence for sentence in sentences if not REFUSALS.search(sentence))


def _clean_tags_once(caption: str) -> str:
    lines = (LIST_MARK.sub("", line) for line in THINKING.sub("", caption).splitlines())
    tags = (tag for line in lines for tag in split_tags(clean(line)))
    # Faces and marks such as ;_; and ... are tags too.
    return ", ".join(unique(tag.strip(" .;") if TWO_LETTERS.search(tag) else tag for tag in tags))
