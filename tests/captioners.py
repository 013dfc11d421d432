"""Captioners that look at pictures without a model."""

from functools import partial

from lora_workbench.captioning import captioner
from lora_workbench.captioning.captioner import Answer
from lora_workbench.training.images import open_image

caption_folder = partial(captioner.caption_folder, open_image=open_image)
"""As the node calls it."""


class Sizes:
    """Says how large a picture is, and remembers what it was shown; cannot bear pictures of the colours in ``bad``."""

    writes_tags = False
    follows_instructions = True

    def __init__(self, batch_size=1, bad=(), error=None):
        self.batch_size, self.bad = batch_size, bad
        self.error = error or RuntimeError("out of memory")
        self.shown, self.batches, self.closed = [], [], 0

    def caption(self, images, instruction):
        self.batches.append((len(images), instruction))
        if any(image.getpixel((0, 0)) in self.bad for image in images):
            raise self.error
        self.shown += images
        return [Answer(f"{image.width} by {image.height}") for image in images]

    def close(self):
        self.closed += 1


class Telling(Sizes):
    """Says the same of every picture."""

    def __init__(self, said, batch_size=1, writes_tags=False, follows_instructions=True):
        super().__init__(batch_size)
        self.said, self.writes_tags, self.follows_instructions = said, writes_tags, follows_instructions

    def caption(self, images, instruction):
        super().caption(images, instruction)
        return [Answer(self.said) for _ in images]
