"""A captioner that asks a model which can look at a picture and write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from .captioner import Answer


@dataclass(frozen=True)
class VisionLanguageCaptioner:
    """Shows each picture to ``generate`` (picture, instruction -> answer), and calls ``free`` when it is closed."""

    generate: Callable[[Image.Image, str], str]
    free: Callable[[], None] = lambda: None
    batch_size: int = 1
    writes_tags: bool = False
    follows_instructions: bool = True

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        return [Answer(self.generate(image, instruction)) for image in images]

    def close(self) -> None:
        self.free()
