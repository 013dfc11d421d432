"""Find and replace in captions. Pure string functions."""

import re


def replace_in(caption: str, find: str, replacement: str, *, whole_words: bool = True, match_case: bool = False) -> str:
    """The caption with every ``find`` replaced, both taken literally.

    Where the replacement is empty, the commas and blanks that would be left over go too. ``whole_words`` leaves
    "category" alone when "cat" is replaced. Raises ValueError when there is nothing to find.
    """
    if not find:
        raise ValueError("There is nothing to find: type the words to replace.")
    pattern = re.compile(_bounded(find) if whole_words else re.escape(find), 0 if match_case else re.IGNORECASE)
    changed = pattern.sub(lambda _: replacement, caption)
    return _tidied(changed) if changed != caption and not replacement.strip() else changed


def _bounded(find: str) -> str:
    """A pattern for ``find`` that does not begin or end inside a word."""
    start = r"(?<!\w)" if re.match(r"\w", find) else ""
    end = r"(?!\w)" if re.search(r"\w\Z", find) else ""
    return f"{start}{re.escape(find)}{end}"


def _tidied(caption: str) -> str:
    """The caption without empty tags, doubled blanks and blanks before a comma or full stop, line by line."""
    lines = (re.sub(r"[ \t]+", " ", line) for line in caption.splitlines())
    lines = (re.sub(r" ?(?:, ?)+(?=,|\.|$)| (?=[,.])", "", line).strip(" ,") for line in lines)
    return "\n".join(filter(None, lines))
