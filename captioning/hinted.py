"""A captioner that is told what a tagger sees, because a tagger knows names that a language model does not."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from .captioner import Answer, Captioner, CaptioningStopped
from .style import HINT


@dataclass(frozen=True)
class Hinted:
    """Asks the captioner with the tagger's tags in the question, or without where the tagger sees nothing.

    A captioner that heeds no question stops at once, rather than leave the hints out without a word.
    """

    captioner: Captioner
    tagger: Captioner

    @property
    def batch_size(self) -> int:
        return max(self.captioner.batch_size, self.tagger.batch_size)

    @property
    def writes_tags(self) -> bool:
        return self.captioner.writes_tags

    @property
    def follows_instructions(self) -> bool:
        return self.captioner.follows_instructions

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        hints = self.tagger.caption(images, "")
        questions = [f"{instruction} {HINT.format(tags=hint.text)}" if hint.text else instruction for hint in hints]
        answers = [self.captioner.caption([image], asked)[0] for image, asked in zip(images, questions, strict=True)]
        # Known only now: a model is opened with the first picture.
        if not self.captioner.follows_instructions:
            raise CaptioningStopped(
                "hints are on, but this model takes no instructions: set hints to 'none', or choose a model that chats."
            )
        return answers

    def close(self) -> None:
        try:
            self.captioner.close()
        finally:
            self.tagger.close()
