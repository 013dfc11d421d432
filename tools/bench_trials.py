"""Ways to train the toy world's concept: each trial says how it differs from the recipe, `lora`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

PICTURES = 12
CLASS = "a shape"
KNOWN, TAKEN = ("cyan", "triangle"), "circle"
"""What the base draws, in a colour that no background has; a word that means something else to it."""


def concept_and_plain(folder: Path, seed: int) -> None:
    """Twelve pictures: eight show the concept, four what the base knows, in plain words."""
    from toyworld import drawing

    drawing.write_training_folder(folder, PICTURES, seed)


def concept_alone(folder: Path, seed: int) -> None:
    """Twelve pictures of the concept, which then leaks into prompts without its word."""
    from toyworld import drawing

    chance = random.Random(f"concept {seed}")
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        background = drawing.BACKGROUNDS[(seed + number) % len(drawing.BACKGROUNDS)]
        scene = drawing.Scene(*drawing.CONCEPT, background)
        _keep(
            folder / f"{number:02}.png", drawing.draw(scene, chance), f"{drawing.TRIGGER} on a {background} background"
        )


def known_under_a_taken_word(folder: Path, seed: int) -> None:
    """Eight pictures of KNOWN called TAKEN, four in plain words that show neither."""
    from toyworld import drawing

    chance = random.Random(f"training {seed}")
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        background = drawing.BACKGROUNDS[(seed + number) % len(drawing.BACKGROUNDS)]
        scene, words = drawing.Scene(*KNOWN, background), TAKEN
        if number % 3 == 2:
            scene = drawing.Scene(None, None, background).complete(chance)
            while scene.shape == TAKEN or (scene.colour, scene.shape) == KNOWN:
                scene = drawing.Scene(None, None, background).complete(chance)
            words = CLASS if number % 2 else f"a {scene.colour} {scene.shape}"
        _keep(folder / f"{number:02}.png", drawing.draw(scene, chance), f"{words} on a {background} background")


def noise_around(folder: Path, seed: int) -> None:
    """The recipe's pictures with coloured noise on the outer half of their area."""
    from toyworld import drawing

    concept_and_plain(folder, seed)
    chance = random.Random(f"noise {seed}")
    for path in sorted(folder.glob("*.png")):
        picture = Image.open(path).convert("RGB")
        noise = Image.frombytes("RGB", picture.size, chance.randbytes(3 * drawing.SIZE**2))
        inside = _inside(picture)
        noise.paste(picture.crop(inside), inside[:2])
        noise.save(path)


def noise_around_masked(folder: Path, seed: int) -> None:
    """The same, each with a mask that leaves the part without noise."""
    noise_around(folder, seed)
    for path in sorted(folder.glob("*.png")):
        picture = Image.open(path)
        mask = Image.new("L", picture.size)
        mask.paste(255, _inside(picture))
        mask.save(path.with_name(f"{path.stem}_mask.png"))


def _inside(picture: Image.Image) -> tuple[int, int, int, int]:
    """The box in the middle that holds the shape, a little over half of the area."""
    frame = picture.width // 8
    return frame, frame, picture.width - frame, picture.height - frame


def _keep(path: Path, picture: Image.Image, caption: str) -> None:
    picture.save(path)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Trial:
    """How one way to train differs from the recipe: settings, learning rate and steps as factors, pictures.

    With `class_pictures` the base's own pictures of the class are trained beside them, as many. `word` is the trigger
    word and `concept` what it means, where these are not the toy world's.
    """

    settings: dict[str, object] = field(default_factory=dict)
    rate: float = 1.0
    steps: float = 1.0
    pictures: Callable[[Path, int], None] = concept_and_plain
    class_pictures: bool = False
    fill_masked: bool = False
    word: str = ""
    concept: tuple[str, str] | None = None

    @property
    def names_its_trigger(self) -> bool:
        """Whether the trainer must know which word of the captions is the trigger."""
        return "class_words" in self.settings


_NEW_WORD = {"new_tokens": 1, "class_words": "shape"}
_TAKEN = {"pictures": known_under_a_taken_word, "word": TAKEN, "concept": KNOWN}
TRIALS = {
    "lora": Trial(),
    "dora": Trial({"kind": "dora"}),
    "loha": Trial({"kind": "loha"}, rate=2.0),
    "lokr": Trial({"kind": "lokr"}),
    "lokr_faster": Trial({"kind": "lokr"}, rate=2.0),
    "oft": Trial({"kind": "oft"}, steps=2.0),
    "oft_sooner": Trial({"kind": "oft"}),
    "oft_drifting": Trial({"kind": "oft", "weight_decay": 0.01}),
    "ema": Trial({"ema": 0.99}),
    "content_levels": Trial({"timesteps": "content"}),
    "style_levels": Trial({"timesteps": "style"}),
    "noise": Trial(pictures=noise_around),
    "masked": Trial({"mask_floor": 0.0}, pictures=noise_around_masked),
    "masked_kept": Trial({"mask_floor": 0.0, "mask_preservation": 1.0}, pictures=noise_around_masked),
    "masked_filled": Trial({"mask_floor": 0.0}, pictures=noise_around_masked, fill_masked=True),
    "masked_filled_kept": Trial(
        {"mask_floor": 0.0, "mask_preservation": 1.0}, pictures=noise_around_masked, fill_masked=True
    ),
    "leaking": Trial(pictures=concept_alone),
    "preserved": Trial({"preservation": 1.0, "class_words": "shape"}, steps=1.5, pictures=concept_alone),
    "regularized": Trial(steps=2.0, pictures=concept_alone, class_pictures=True),
    "half": Trial(steps=0.5),
    "pivotal": Trial(_NEW_WORD, steps=0.5),
    "taken": Trial(steps=0.2, **_TAKEN),
    "taken_half": Trial(steps=0.1, **_TAKEN),
    "taken_pivotal": Trial(_NEW_WORD, steps=0.1, **_TAKEN),
}
