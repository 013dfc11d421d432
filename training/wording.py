"""What a caption is trained as: its tags in other orders, some left out, now and then no caption at all.

The texts are few and known before training, so that each is encoded once: they depend on the caption and the settings
alone. Which of them a step sees is a function of (seed, number, place).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dataset import Example


@dataclass(frozen=True)
class Wording:
    """How the texts of training differ from the captions; as it stands they are the captions.

    The first `keep_first` tags stay in front and are never left out, nor is a tag with the trigger word in it. Every
    other tag is left out with probability `tag_dropout`, and the whole caption with `caption_dropout`. A picture has
    at most `most_texts` texts besides the empty one, because every one of them is encoded once and kept; of more
    captions than that the first ones are used.
    """

    shuffle_tags: bool = False
    keep_first: int = 1
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    most_texts: int = 32

    def __post_init__(self) -> None:
        for name, low, high in (
            ("keep_first", 0, 100),
            ("tag_dropout", 0, 1),
            ("caption_dropout", 0, 1),
            ("most_texts", 1, 1000),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}, but must be between {low} and {high}.")

    @property
    def changes_captions(self) -> bool:
        """Whether a caption becomes more than one text."""
        return self.shuffle_tags or self.tag_dropout > 0


def texts_of(example: Example, wording: Wording) -> tuple[str, ...]:
    """Every distinct text that training may ask for, the captions as they are where nothing changes them."""
    texts = [_text(example, wording, number) for number in range(_count(example, wording))]
    return tuple(dict.fromkeys(texts + [""] * (wording.caption_dropout > 0)))


def text_of(example: Example, wording: Wording, seed: int, number: int, place: int) -> str:
    """The text of the example at `place` in batch `number`: one of `texts_of`, each caption as likely as any other."""
    drawn = random.Random(f"{seed} text {number} {place}")
    if drawn.random() < wording.caption_dropout:
        return ""
    return _text(example, wording, int(drawn.random() * _count(example, wording)))


def _count(example: Example, wording: Wording) -> int:
    """How many texts are made of an example, equally many of each caption; some may be equal."""
    captions = min(1 + len(example.variants), wording.most_texts)
    return captions * (wording.most_texts // captions if wording.changes_captions else 1)


def _text(example: Example, wording: Wording, number: int) -> str:
    captions = (example.caption, *example.variants)[: wording.most_texts]
    turn, which = divmod(number, len(captions))
    caption = captions[which]
    return _reworded(caption, wording, example.trigger_word, turn) if wording.changes_captions else caption


def _reworded(caption: str, wording: Wording, trigger_word: str, turn: int) -> str:
    """One order of the caption's tags, some left out; every tag draws its place and its fate in any case."""
    drawn, trigger = random.Random(f"{caption} {turn}"), trigger_word.casefold()
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    fates = [(drawn.random(), drawn.random(), tag) for tag in tags[wording.keep_first :]]
    if wording.shuffle_tags:
        fates.sort()
    kept = [tag for _, u, tag in fates if u >= wording.tag_dropout or (trigger and trigger in tag.casefold())]
    return ", ".join(tags[: wording.keep_first] + kept)
