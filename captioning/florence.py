"""Florence-2, out of a local folder in either layout."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from . import florence_legacy
from .captioner import Answer
from .local_model import generate, open_network, open_processor, read_config

TASK = re.compile(r"<[A-Z_]+>")
DESCRIBE = "<MORE_DETAILED_CAPTION>"


class Florence:
    """Does one of the tasks it was trained for: an instruction that is one (``<CAPTION>``), else a long caption."""

    batch_size = 8
    writes_tags = False
    follows_instructions = False

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        legacy = florence_legacy.is_legacy(read_config(folder))
        self._processor = (florence_legacy.open_processor if legacy else open_processor)(folder)
        if legacy:
            self.network = florence_legacy.open_network(folder, dtype, self._processor)
        else:
            self.network = open_network(folder, dtype)

    def caption(self, images: Sequence[Image.Image], instruction: str = "") -> list[Answer]:
        task = instruction.strip() if TASK.fullmatch(instruction.strip()) else DESCRIBE
        inputs = self._processor(text=[task] * len(images), images=list(images), return_tensors="pt")
        written = generate(self.network, inputs, num_beams=3)
        return [Answer(text.strip()) for text in self._processor.batch_decode(written, skip_special_tokens=True)]

    def close(self) -> None:
        self.network = self._processor = None
