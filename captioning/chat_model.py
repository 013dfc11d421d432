"""Vision-language models to chat with, out of a local folder: Qwen-VL, JoyCaption and other LLaVA, Gemma, SmolVLM."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from .asking import shrunk
from .captioner import Answer
from .local_model import generate, open_network, open_processor


class ChatModel:
    """Answers an instruction about each picture; ValueError when the folder holds no such model."""

    batch_size = 4
    writes_tags = False
    follows_instructions = True

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32):
        self._name = folder.name
        self._processor = open_processor(folder)
        self.network = open_network(folder, dtype)
        tokenizer = self._processor.tokenizer
        # Not saved with a model. Padded at the right, all captions of a batch but the longest would silently be wrong.
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self._question("Is there a place for the picture?")

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        question = self._question(instruction)
        inputs = self._processor(
            text=[question] * len(images),
            images=[[shrunk(image)] for image in images],
            add_special_tokens=not question.startswith(self._processor.tokenizer.bos_token or "\0"),
            padding=True,
            return_tensors="pt",
        )
        written = generate(self.network, inputs)[:, inputs["input_ids"].shape[1] :]
        answers = self._processor.batch_decode(written, skip_special_tokens=True)
        return [Answer(answer.strip()) for answer in answers]

    def close(self) -> None:
        self.network = self._processor = None

    def _question(self, instruction: str) -> str:
        """The instruction in the model's chat template, with a place for the picture.

        Most templates place a picture where the content lists one; JoyCaption's takes text alone and places it itself.
        """
        parts = [{"type": "image"}, {"type": "text", "text": instruction}]
        for content in (parts, instruction):
            try:
                question = self._templated(content)
            except TypeError:  # from a template that adds the content to a text
                continue
            if str(parts[0]) not in question and any(place in question for place in self._places() if place):
                return question
        raise ValueError(
            f"The chat template of the model {self._name} has no place for a picture: choose another model."
        )

    def _templated(self, content: str | list[dict[str, str]]) -> str:
        template = self._processor.chat_template or self._processor.tokenizer.chat_template
        if not template:
            raise ValueError(
                f"The model {self._name} has no chat template: choose one that is made to be chatted with."
            )
        # Only where it is known: others warn about it for every picture.
        thinking = {"enable_thinking": False} if "enable_thinking" in template else {}
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            **thinking,
        )

    def _places(self) -> tuple[str, ...]:
        """What may stand for a picture in a question; Gemma writes where one begins."""
        return getattr(self._processor, "image_token", ""), getattr(self._processor, "boi_token", "")
