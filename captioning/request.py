"""What is wanted of a captioner for one image."""

from dataclasses import dataclass, replace

from .finish import Finish
from .style import TAGS
from .tags import split_tags, without


@dataclass(frozen=True)
class Request:
    """What is wanted for one image: what to ask, how the caption is to read, and whose it is then.

    ``by`` stands for the captioner and all its settings, so that the same is not asked twice. ``known`` is a caption
    that the image has elsewhere than in a file beside it, such as in a table.
    """

    instruction: str = ""
    finish: Finish = Finish()
    trigger: str = ""
    class_word: str = ""
    by: str = ""
    known: str = ""

    def for_tags(self) -> "Request":
        """The same where the answers are tags, whatever was asked."""
        return replace(self, finish=replace(self.finish, style=TAGS))

    def added_to(self, caption: str, answer: str) -> str:
        """The caption, word for word, with what is new in the answer after it; the trigger word is not repeated."""
        new = self.finish(answer)
        return "\n".join(self._after(line, new) for line in caption.splitlines())

    def _after(self, line: str, new: str) -> str:
        if self.finish.style == TAGS:
            new = ", ".join(without(split_tags(new), split_tags(line)))
        return f"{line}{' ' if line[-1:] in '.,;:!?' else ', '}{new}" if new else line
