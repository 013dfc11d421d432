"""What a caption is trained as: its tags in other orders, some left out, now and then no caption at all."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How the texts of training differ from the captions; as it stands they are the captions.

    The first `keep_first` tags stay in front and are never left out. Every other tag is left out with probability
    `tag_dropout`, and the whole caption with `caption_dropout`. A picture has at most `most_texts` texts besides the
    empty one, because every one of them is encoded once and kept.
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
