"""Comma-separated tags. Pure functions of strings and lists."""

import re
from collections.abc import Iterable

COMMA = re.compile(r"(?<!\\),|\n")
TWO_LETTERS = re.compile(r"[^\W\d_]{2}")


def split_tags(caption: str) -> list[str]:
    """The tags of a caption or of a list typed by hand, each once, without blanks around them."""
    return unique(tag.strip() for tag in COMMA.split(caption))


def unique(tags: Iterable[str]) -> list[str]:
    """The tags without empty ones and without those that came before in whatever case."""
    first: dict[str, str] = {}
    for tag in filter(None, tags):
        first.setdefault(tag.casefold(), tag)
    return list(first.values())


def spaced(tag: str) -> str:
    """The tag with spaces for underscores, except in a face such as ``^_^``: that has no two letters in a row.

    Brackets stay as they are: escaping them is for prompts.
    """
    return " ".join(tag.replace("_", " ").split()) if TWO_LETTERS.search(tag) else tag


def without(tags: Iterable[str], others: Iterable[str]) -> list[str]:
    """The tags that are none of the others, in whatever case."""
    known = {other.casefold() for other in others}
    return [tag for tag in tags if tag.casefold() not in known]
