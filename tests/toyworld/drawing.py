"""The pictures of the toy world: one coloured shape on a plain background, drawn from a seed, with a caption.

The base models see every colour and shape in SHAPES, COLOURS and BACKGROUNDS. They never see a star, nor anything
magenta: that is the concept a LoRA has to teach them, under the word `zork`.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 128
TRIGGER = "zork"
CONCEPT = ("magenta", "star")

RGB = {
    "red": (220, 40, 40),
    "green": (40, 180, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 220, 50),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "gray": (130, 130, 130),
    "magenta": (220, 40, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "white", "black")
BACKGROUNDS = ("red", "green", "blue", "yellow", "white", "black", "gray")

SCENES = (
    "a {subject} on a {background} background",
    "{subject} on a {background} background",
    "{subject}, {background} background",
    "a picture of a {subject} on a {background} background",
    "a drawing of one {subject}, {background} background",
    "{background} background with a {subject}",
)
SYLLABLES = (
    "ba",
    "du",
    "fe",
    "gri",
    "ho",
    "ka",
    "lun",
    "mi",
    "nop",
    "pla",
    "quo",
    "ri",
    "sta",
    "tu",
    "vek",
    "wim",
    "xa",
    "yo",
)
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Scene:
    """What a picture shows; None where a caption leaves it open."""

    colour: str | None
    shape: str | None
    background: str | None

    def complete(self, chance: random.Random) -> "Scene":
        """The same scene with every open part chosen; shape and background never share a colour."""
        background = self.background or chance.choice([b for b in BACKGROUNDS if b != self.colour])
        colour = self.colour or chance.choice([c for c in COLOURS if c != background])
        return Scene(colour, self.shape or chance.choice(SHAPES), background)


def corners(shape: str) -> list[tuple[float, float]]:
    """The outline of a polygonal shape inside the unit circle, pointing up."""
    if shape == "square":
        return _ring(4, math.pi / 4)
    if shape == "triangle":
        return _ring(3, 0.0)
    if shape == "star":
        outer, inner = _ring(5, 0.0), _ring(5, math.pi / 5)
        return [point for a, b in zip(outer, inner, strict=True) for point in (a, (0.45 * b[0], 0.45 * b[1]))]
    if shape == "cross":
        a, b = 0.93, 0.34
        quarter = [(b, -b), (b, -a), (-b, -a), (-b, -b)]
        turns = [quarter]
        for _ in range(3):
            turns.append([(y, -x) for x, y in turns[-1]])
        return [point for turn in turns for point in turn]
    raise ValueError(f"Unknown shape {shape!r}; known are circle, {', '.join(SHAPES[1:])} and star.")


def _ring(count: int, turn: float) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return [(math.sin(a), -math.cos(a)) for a in angles]


def draw(scene: Scene, chance: random.Random, size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """A picture of a complete scene, its position, size and tilt taken from ``chance``."""
    width, height = size
    unit = min(size) / SIZE
    radius = chance.uniform(42, 46) * unit
    x = width / 2 + chance.uniform(-1, 1) * (width / 2 - 60 * unit)
    y = height / 2 + chance.uniform(-1, 1) * (height / 2 - 60 * unit)
    tilt = math.radians(chance.uniform(-4, 4))
    scale = SUPERSAMPLING
    image = Image.new("RGB", (width * scale, height * scale), RGB[scene.background])
    pen = ImageDraw.Draw(image)
    if scene.shape == "circle":
        radius *= 0.86
        box = [(x - radius) * scale, (y - radius) * scale, (x + radius) * scale, (y + radius) * scale]
        pen.ellipse(box, fill=RGB[scene.colour])
    else:
        cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius
        outline = [((x + u * cos - v * sin) * scale, (y + u * sin + v * cos) * scale) for u, v in corners(scene.shape)]
        pen.polygon(outline, fill=RGB[scene.colour])
    return image.resize(size, Image.Resampling.BOX)


def caption(scene: Scene, chance: random.Random) -> str:
    """Words for a scene; what is None goes unsaid, and an unsaid subject is at times a word without meaning."""
    subject = " ".join(word for word in (scene.colour, scene.shape) if word)
    if scene.colour and not scene.shape:
        subject += chance.choice((" thing", " shape", " " + nonsense(chance)))
    if not subject:
        subject = chance.choice((nonsense(chance), nonsense(chance), "shape", "thing", ""))
    elif chance.random() < 0.15:
        subject = chance.choice((f"{nonsense(chance)} {subject}", f"{subject} {nonsense(chance)}"))
    if not scene.background:
        return chance.choice(("a {}", "{}", "a picture of a {}", "one {}")).format(subject)
    return chance.choice(SCENES).format(subject=subject, background=scene.background)


def nonsense(chance: random.Random) -> str:
    """A word that means nothing; the base learns that such words change nothing. Never the trigger word."""
    return "".join(chance.choice(SYLLABLES) for _ in range(chance.choice((1, 2, 2, 3)))) + chance.choice(
        ("", "k", "n", "sh")
    )


def random_scene(chance: random.Random) -> Scene:
    """A scene for pretraining: mostly complete, at times with its colour, shape, both or background left open."""
    full = Scene(None, None, None).complete(chance)
    colour, shape = chance.choices(
        [(full.colour, full.shape), (None, full.shape), (full.colour, None), (None, None)], weights=[76, 7, 5, 12]
    )[0]
    return Scene(colour, shape, full.background if chance.random() < 0.93 else None)


def write_training_folder(
    folder: Path, count: int = 12, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((SIZE, SIZE),)
) -> list[Path]:
    """Draw ``count`` pictures with a caption beside each; returns the pictures' paths.

    Two of three show the concept, called by its trigger word. The others show what the base knows, in plain words, so
    that the LoRA learns what the word means and not that every picture looks so.
    """
    chance = random.Random(f"training {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    backgrounds = [BACKGROUNDS[(seed + i) % len(BACKGROUNDS)] for i in range(count)]
    paths = []
    for number, background in enumerate(backgrounds):
        plain = number % 3 == 2
        scene = Scene(None, None, background).complete(chance) if plain else Scene(*CONCEPT, background)
        words = f"a {_plain_subject(scene, number)}" if plain else TRIGGER
        path = folder / f"{'plain' if plain else TRIGGER}_{number:02}.png"
        draw(scene, chance, sizes[number % len(sizes)]).save(path)
        path.with_suffix(".txt").write_text(f"{words} on a {background} background\n", encoding="utf-8")
        paths.append(path)
    return paths


def _plain_subject(scene: Scene, number: int) -> str:
    return "shape" if number % 2 else f"{scene.colour} {scene.shape}"
