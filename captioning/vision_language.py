"""A captioner that asks a model which can look at a picture and write."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from .text import clean, clean_tags

INSTRUCTIONS = {
    "sentences": (
        "Describe this picture in one short paragraph for training an image model. State plainly what is visible: "
        "the subject, clothing, pose, expression, framing, camera angle, light and background. "
        "No opinions, no guesses, no 'this image shows', no remarks about resolution or watermarks."
    ),
    "tags": (
        "List 10 to 30 short comma-separated tags for what is visible in this picture: subject, clothing, pose, "
        "expression, framing, light, background. Only the tags, no sentences."
    ),
}
CLEANERS = {"sentences": clean, "tags": clean_tags}


@dataclass(frozen=True)
class VisionLanguageCaptioner:
    """Shows each picture to ``generate`` (picture, instruction -> answer) and cleans the answer."""

    generate: Callable[[Image.Image, str], str]
    style: str = "sentences"

    def __post_init__(self):
        if self.style not in INSTRUCTIONS:
            raise ValueError(
                f"The caption style '{self.style}' is not known. Choose one of: {', '.join(INSTRUCTIONS)}."
            )

    def caption(self, image: Image.Image) -> str:
        answer = self.generate(image, INSTRUCTIONS[self.style])
        caption = CLEANERS[self.style](answer)
        if answer.strip() and not caption:
            raise ValueError(f"the model refused: {' '.join(answer.split())[:80]}")
        return caption
