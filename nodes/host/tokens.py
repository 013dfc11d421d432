"""How many tokens a caption has, and how many a text encoder takes in one piece."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.sd1_clip

WITHOUT_PIECES = 512
"""What T5 and language models are trained with as text encoders, as those of FLUX, Qwen-Image and Z-Image."""

_LONG = "long " * 600


class TokenCounter:
    """Counts the tokens of a text, brackets as letters; `limit` is how many the text encoder takes in one piece.

    Of several encoders the one that takes most is meant, as T5 of FLUX: it reads the sentence, CLIP sums it up.
    Start, end, padding and an instruction around the text do not count.
    """

    def __init__(self, tokenize: Callable[..., dict[str, Any]]) -> None:
        self._tokenize = tokenize
        pieces = self._pieces(_LONG)
        limits = {name: _limit(some) for name, some in pieces.items()}
        self._name = max(limits, key=limits.__getitem__)
        self.limit: int = limits[self._name]
        self._around = 0
        self._around = self("")

    def __call__(self, text: str) -> int:
        return sum(token[2] != 0 for piece in self._pieces(text)[self._name] for token in piece) - self._around

    def _pieces(self, text: str) -> dict[str, list[list[tuple]]]:
        """By encoder, the pieces a text is cut into, each token with its value, weight and the number of its word."""
        # Escaped and not by disable_weights, which some tokenizers set themselves and then refuse.
        return self._tokenize(text.replace("(", r"\(").replace(")", r"\)"), return_word_ids=True)


def counter(clip=None) -> TokenCounter:
    """The counter of a CLIP; without one that of CLIP-L, whose tokenizer comes with ComfyUI and all of SD use."""
    return TokenCounter(clip.tokenize) if clip is not None else _clip_l()


@cache
def _clip_l() -> TokenCounter:
    return TokenCounter(comfy.sd1_clip.SD1Tokenizer().tokenize_with_weights)


def _limit(pieces: list[list[tuple]]) -> int:
    """The words in the first piece of a long text; an encoder that cuts nothing has a limit of its own."""
    return sum(token[2] != 0 for token in pieces[0]) if len(pieces) > 1 else WITHOUT_PIECES
