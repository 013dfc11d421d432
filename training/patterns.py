"""Patterns over the names of layers, a line each, as users write them."""

from __future__ import annotations

import re

Overrides = list[tuple[re.Pattern[str], float]]


def patterns(text: str, setting: str) -> list[re.Pattern[str]]:
    """The regular expressions of a setting, a line each; ValueError naming the setting and the line that is none."""
    return [_compiled(line.strip(), setting) for line in text.splitlines() if line.strip()]


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
    return pairs


def last_match(pairs: Overrides, *names: str) -> float | None:
    """The number of the last pattern that is found in one of the names; None when none is."""
    return next((value for pattern, value in reversed(pairs) if any(map(pattern.search, names))), None)


def _compiled(pattern: str, setting: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{setting} has the pattern '{pattern}', which is no regular expression ({error}): correct or remove it."
        ) from error


def _number(text: str, whole: bool) -> float | None:
    try:
        return int(text) if whole else float(text)
    except ValueError:
        return None
