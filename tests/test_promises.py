"""The page of promises and traps names tests that exist, and all of those that carry a promise in their name."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE))
PROMISES, _, TRAPS = PAGE.partition("## Traps of other trainers")


def defined_in(path: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_test_the_page_names_exists():
    assert [f"{file}::{name}" for file, name in sorted(NAMED) if name not in defined_in(ROOT / file)] == []


def test_every_test_that_carries_a_promise_is_on_the_page():
    carried = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in defined_in(path)
        if re.search(r"promise_\d", name)
    }
    assert sorted(carried - NAMED) == []


def test_all_twelve_promises_have_a_test():
    rows = re.findall(r"^\| \*\*(\d+)\..*?\| `tests/", PROMISES, re.MULTILINE)
    assert list(map(int, rows)) == list(range(1, 13))


def test_all_23_traps_have_a_test():
    rows = re.findall(r"^\| (\*\*\d+\.\*\* [^|]+)?\| `tests/[\w/]+\.py::test_\w+` \| [^|]+ \|$", TRAPS, re.MULTILINE)
    assert len(rows) == TRAPS.count("\n| ") - 1, "every row but the heading names one test and says what it shows"
    assert [int(trap.strip("*").split(".")[0]) for trap in rows if trap] == list(range(1, 24))
