"""BLIP and BLIP-2, out of a local folder: one short caption, whatever they are asked."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .captioner import Answer
from .local_model import generate, open_network, open_processor


class Blip:
    """Captions pictures without being asked anything: BLIP would repeat the question, in lower case."""

    batch_size = 8
    writes_tags = False
    follows_instructions = False

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self._processor = open_processor(folder)
        self.network = open_network(folder, dtype)

    def caption(self, images: Sequence[Image.Image], instruction: str = "") -> list[Answer]:
        written = generate(self.network, self._processor(images=list(images), return_tensors="pt"))
        return [Answer(text.strip()) for text in self._processor.batch_decode(written, skip_special_tokens=True)]

    def close(self) -> None:
        self.network = self._processor = None
