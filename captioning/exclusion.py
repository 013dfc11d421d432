"""The list of what must not be in a caption: words, words with ``*``, and ``/regular expressions/``."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from .tags import COMMA

LONGEST_EXPRESSION = 200
MOST_REPEATS, MOST_OPTIONAL = 2, 2
LONGEST_SENTENCE = 400
"""Within these a regular expression takes about a second at the worst; it sees so many characters of a sentence."""


@dataclass(frozen=True)
class Exclusion:
    """What must not be in a caption. A tag is excluded as a whole; a sentence when it holds one of the words."""

    words: tuple[str, ...] = ()
    expressions: tuple[str, ...] = ()

    @classmethod
    def parse(cls, typed: str) -> "Exclusion":
        """The list as a user types it, by commas or lines; a line in slashes is one regular expression."""
        words, expressions = [], []
        for line in map(str.strip, typed.splitlines()):
            if len(line) > 2 and line[0] == line[-1] == "/":
                expressions.append(checked(line[1:-1]))
            else:
                words += [word.strip().casefold() for word in COMMA.split(line) if word.strip()]
        return cls(tuple(words), tuple(expressions))

    def has_tag(self, tag: str) -> bool:
        """Whether the whole tag is excluded."""
        return any(_is_like(tag.casefold(), word) for word in self.words) or any(
            re.fullmatch(expression, tag[:LONGEST_SENTENCE], re.IGNORECASE) for expression in self.expressions
        )

    def has_sentence(self, sentence: str) -> bool:
        """Whether the sentence holds excluded words."""
        said = _words(sentence)
        return any(_occurs(_words(word), said) for word in self.words) or any(
            re.search(expression, sentence[:LONGEST_SENTENCE], re.IGNORECASE) for expression in self.expressions
        )


def checked(expression: str) -> str:
    """The regular expression, if it is one that cannot take forever; ValueError in one sentence otherwise."""
    trouble = _trouble(expression)
    if not trouble:
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            trouble = str(error)
    if trouble:
        raise ValueError(
            f"exclude: /{expression}/ cannot be used ({trouble}): write it simpler, or use * for any text."
        )
    return expression


def _trouble(expression: str) -> str:
    """Why the time an expression takes could explode; "" when it cannot."""
    if len(expression) > LONGEST_EXPRESSION:
        return f"it is longer than {LONGEST_EXPRESSION} characters"
    parts = _parts(expression)
    if any(re.fullmatch(r"\\[1-9]", part) for part in parts):
        return "it refers back to a group"
    if any(before == "(" and after == "?" for before, after in pairwise(parts)):
        return "groups with (? are not supported"
    repeats, optional = sum(map(_repeats, parts)), parts.count("?")
    if repeats > MOST_REPEATS or optional > MOST_OPTIONAL:
        return f"it has more than {MOST_REPEATS} of * + {{}} or more than {MOST_OPTIONAL} of ?"
    return "a group that varies is repeated" if _repeats_a_varying_group(parts) else ""


def _parts(expression: str) -> list[str]:
    """The expression in characters, an escape, a set [..] and a number of times {..} as one part each."""
    return re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|.", expression, re.DOTALL)


def _repeats(part: str) -> bool:
    return part in ("*", "+") or (len(part) > 2 and part[0] == "{")


def _repeats_a_varying_group(parts: Sequence[str]) -> bool:
    """Whether a group that holds a repetition or a choice is itself repeated, such as in ``(a+)+``."""
    varies = [False]
    for part, following in zip(parts, [*parts[1:], ""], strict=True):
        if part == "(":
            varies.append(False)
        elif part == ")" and len(varies) > 1:
            inside = varies.pop()
            if inside and _repeats(following):
                return True
            varies[-1] |= inside
        elif part in ("|", "?") or _repeats(part):
            varies[-1] = True
    return False


def _words(text: str) -> list[str]:
    return re.findall(r"[\w*'’-]+", text.casefold())


def _occurs(wanted: Sequence[str], said: Sequence[str]) -> bool:
    """Whether the wanted words follow each other somewhere in what is said."""
    if not wanted:
        return False
    windows = (said[place : place + len(wanted)] for place in range(len(said) - len(wanted) + 1))
    return any(all(map(_is_like, window, wanted)) for window in windows)


def _is_like(text: str, pattern: str) -> bool:
    """Whether the text is the pattern, in which ``*`` stands for any text and everything else for itself."""
    return fnmatchcase(text, re.sub(r"[\[?]", r"[\g<0>]", pattern))
