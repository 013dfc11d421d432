"""Patterns over the names of layers, a line each, as users write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

try:
    from re import _parser as parser
except ImportError:  # before Python 3.11
    import sre_parse as parser

Overrides = list[tuple[re.Pattern[str], float]]

LONGEST, MOST_WAYS = 500, 25_000
"""Characters of a pattern, and ways in which all of a setting may fit one name; with more a search could take hours."""
ANY_LENGTH, BEFORE_LETTER, IN_NUMBER = 100, 10, 3
"""Lengths that a wildcard can have in a name, where a given letter must follow, and where it stands for digits."""
REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")
NUMBERS = tuple(str(parser.parse(pattern)[0][1]) for pattern in (r"\d", "[0-9]"))
ENDS = tuple(str(parser.parse(pattern)[0]) for pattern in (".*", ".*?"))


def patterns(text: str, setting: str) -> list[re.Pattern[str]]:
    """The regular expressions of a setting, a line each; ValueError naming the setting and the line that is none."""
    found = [_compiled(line.strip(), setting) for line in text.splitlines() if line.strip()]
    _check_time(found, setting)
    return found


def overrides(text: str, setting: str, highest: float, *, whole: bool = False) -> Overrides:
    """`pattern = number` lines as pairs, in order; `whole` asks for whole numbers.

    ValueError naming the setting and the line when it is no such pair or its number is not within 0 and `highest`.
    """
    pairs = []
    for line in filter(None, map(str.strip, text.splitlines())):
        pattern, equals, number = map(str.strip, line.rpartition("="))
        value = _number(number, whole)
        if not equals or not pattern or value is None or not 0 <= value <= highest:
            kind = "whole number" if whole else "number"
            raise ValueError(
                f"{setting} has the line '{line}', which must say 'pattern = number' with a {kind} "
                f"between 0 and {highest:g}: correct or remove it."
            )
        pairs.append((_compiled(pattern, setting), value))
    _check_time([pattern for pattern, _ in pairs], setting)
    return pairs


def last_match(pairs: Overrides, *names: str) -> float | None:
    """The number of the last pattern that is found in one of the names; None when none is."""
    return next((value for pattern, value in reversed(pairs) if any(map(pattern.search, names))), None)


def _compiled(pattern: str, setting: str) -> re.Pattern[str]:
    try:
        if len(pattern) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
        return re.compile(pattern)
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{setting} has the pattern '{pattern[:LONGEST]}', which is no regular expression ({error}): correct or "
            "remove it."
        ) from error


def _check_time(found: Sequence[re.Pattern[str]], setting: str) -> None:
    """ValueError where looking for the patterns could take minutes; somebody else may have written them."""
    ways = [_ways(_without_end(list(parser.parse(pattern.pattern)))) for pattern in found]
    if sum(ways) > MOST_WAYS:
        worst = found[ways.index(max(ways))].pattern
        raise ValueError(
            f"{setting} has the pattern '{worst}', which could take minutes to look for: use fewer wildcards such as "
            ".*, and do not repeat groups."
        )


def _without_end(items: list[tuple]) -> list[tuple]:
    """A parsed pattern without the .* it ends in, which always fits at once."""
    return items[:-1] if items and str(items[-1]) in ENDS else items


def _ways(items: Iterable[tuple]) -> float:
    """In about how many ways a parsed pattern can fit a name from a given place on; infinite for nested repeats."""
    items = list(items)
    followed = zip_longest(items, items[1:])
    return math.prod(_ways_of(str(kind), what, following) for (kind, what), following in followed)


def _ways_of(kind: str, what: object, following: tuple | None) -> float:
    if kind in REPEATS:
        least, most, repeated = what
        inner = _ways(repeated)
        if most == 1:
            return 1 + inner
        return math.inf if inner > 1 else min(most - least + 1, _lengths(repeated, following))
    if kind == "BRANCH":
        return sum(map(_ways, what[1]))
    parts = what if isinstance(what, (tuple, list)) else (what,)
    return math.prod(_ways(part) for part in parts if isinstance(part, parser.SubPattern))


def _lengths(repeated: Iterable[tuple], following: tuple | None) -> int:
    """How many lengths a repeated part can have in a name."""
    ((kind, what), *others) = repeated
    if not others and (str(kind) == "LITERAL" or str(what) in NUMBERS):
        return IN_NUMBER
    return BEFORE_LETTER if following and str(following[0]) == "LITERAL" else ANY_LENGTH


def _number(text: str, whole: bool) -> float | None:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        return None
