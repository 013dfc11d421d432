"""Words to write instead of others: ``old => new``, one pair a line."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .find_replace import replace_in
from .tags import split_tags
from .trigger import holds

ARROW = "=>"


@dataclass(frozen=True)
class Replacements:
    """Pairs of words and what is written instead; whole words, in any case. Replacing twice changes nothing."""

    pairs: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        for old, new in self.pairs:
            again = next((other for other, _ in self.pairs if other != old and holds(new, other)), None)
            if again:
                raise ValueError(
                    f"replace: '{old} {ARROW} {new}' writes '{again}', which another line replaces: "
                    "write there what you want in the end."
                )

    @classmethod
    def parse(cls, typed: str) -> "Replacements":
        """The pairs as a user types them; ValueError naming a line that is none."""
        pairs = []
        for line in filter(None, map(str.strip, typed.splitlines())):
            old, arrow, new = (part.strip() for part in line.partition(ARROW))
            if not (old and arrow):
                raise ValueError(f"replace: '{line}' is not of the form 'old {ARROW} new': one pair a line.")
            pairs.append((old, new))
        return cls(tuple(pairs))

    def in_sentences(self, caption: str) -> str:
        """The caption with each old word replaced, except where it is part of the new words already."""
        for old, new in self.pairs:
            if not holds(new, old):
                caption = replace_in(caption, old, new)
                continue
            both = rf"(?<!\w)(?:{re.escape(new)}|{re.escape(old)})(?!\w)"
            caption = re.sub(both, lambda _, new=new: new, caption, flags=re.IGNORECASE)
        return caption

    def in_tags(self, tags: Sequence[str]) -> list[str]:
        """The tags with those that are an old word as a whole replaced by one tag or several, or left out."""
        new_tags = {old.casefold(): split_tags(new) for old, new in self.pairs}
        return [new for tag in tags for new in new_tags.get(tag.casefold(), [tag])]
