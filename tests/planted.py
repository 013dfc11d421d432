"""A folder of sixty good pictures with captions, and pictures with one defect each to hide among them.

Two thirds of the good ones are parts of the photographs that scikit-image ships, the others are drawn.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

TRIGGER = "zork"
SIDE = 256
# How many parts across and down; together they stay inside the picture and never overlap.
PHOTOGRAPHS = {
    "astronaut": (2, 2),
    "camera": (2, 2),
    "coffee": (2, 1),
    "hubble_deep_field": (3, 3),
    "immunohistochemistry": (2, 2),
    "stereo_motorcycle": (2, 1),
    "rocket": (2, 1),
    "moon": (2, 2),
    "chelsea": (1, 1),
    "coins": (1, 1),
    "grass": (2, 2),
    "gravel": (2, 2),
    "brick": (1, 1),
}


def good(count: int = 60) -> list[Image.Image]:
    """Different, sharp pictures of at least 256 x 256 pixels; needs scikit-image."""
    found = list(photographs())
    return found + [drawn(seed) for seed in range(count - len(found))]


def photographs() -> Iterator[Image.Image]:
    from skimage import data

    for name, (across, down) in PHOTOGRAPHS.items():
        pixels = getattr(data, name)()
        picture = Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
        wide, high = picture.width // across, picture.height // down
        for number in range(across * down):
            left, top = number % across * wide, number // across * high
            yield ImageOps.fit(picture.crop((left, top, left + wide, top + high)), (SIDE, SIDE))


def drawn(seed: int) -> Image.Image:
    """Hills before a cloudy sky with a few things in it, grainy as a photograph."""
    chance, noise = random.Random(seed), np.random.default_rng(seed)
    sky = Image.fromarray(noise.integers(0, 256, (6, 6, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(sky)
    for _ in range(8):
        colour = tuple(chance.randrange(256) for _ in range(3))
        x, y, size = chance.randrange(SIDE), chance.randrange(SIDE), chance.randrange(10, 70)
        shape = chance.choice([pen.ellipse, pen.rectangle])
        shape((x, y, x + size, y + size * chance.uniform(0.5, 2)), fill=colour)
    grain = noise.normal(0, 6, (SIDE, SIDE, 1))
    return Image.fromarray((np.asarray(sky, np.float64) + grain).clip(0, 255).astype(np.uint8))


WHO = ("standing", "sitting", "walking", "looking up", "laughing", "asleep", "waving", "reading")
WHERE = ("a market", "the beach", "a narrow street", "an old kitchen", "the forest", "a bridge", "snow", "a train")
LIGHT = ("at noon", "in the evening", "under lamps", "in fog", "before sunrise", "in hard shadow", "by a window")
WEAR = ("a red coat", "jeans", "a straw hat", "a blue dress", "rubber boots", "a grey suit", "a scarf")


def sentence(number: int) -> str:
    chance = random.Random(number)
    who, where, light, wear = (chance.choice(words) for words in (WHO, WHERE, LIGHT, WEAR))
    return (
        f"{TRIGGER} in {wear}, {who} near {where} {light}."
        if number % 2
        else (f"A close view of {TRIGGER} {who} with {wear} {light}; behind is {where}.")
    )


def write_good(folder: Path, pictures: list[Image.Image]) -> list[Path]:
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(folder / f"good_{number:02}.png")
        picture.save(paths[-1])
        paths[-1].with_suffix(".txt").write_text(sentence(number))
    return paths


@dataclass(frozen=True)
class Plant:
    """A defect: the kind it is to be found as, how it is saved, its caption if that is what is wrong."""

    kind: str
    save: Callable[[Image.Image, Path], None] = lambda picture, path: picture.save(path)
    caption: str | None = None
    of_good: bool = False  # made from one of the good pictures


def _filtered(change: Callable[[Image.Image], Image.Image]) -> Callable[[Image.Image, Path], None]:
    return lambda picture, path: change(picture).save(path)


def _scaled(picture: Image.Image, factor: float) -> Image.Image:
    size = (round(picture.width * factor), round(picture.height * factor))
    return picture.resize(size, Image.Resampling.BICUBIC)


def _see_through(picture: Image.Image) -> Image.Image:
    opacity = Image.new("L", picture.size, 255)
    ImageDraw.Draw(opacity).rectangle((0, 0, picture.width // 3, picture.height), fill=0)
    picture.putalpha(opacity)
    return picture


def _on_its_side(picture: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


PLANTS = (
    Plant("near-duplicate", _filtered(lambda picture: _scaled(picture, 1.5)), of_good=True),
    Plant("near-duplicate", _filtered(lambda picture: picture.point(lambda level: min(255, level + 25))), of_good=True),
    Plant("mirrored", _filtered(ImageOps.mirror), of_good=True),
    Plant("blurry", _filtered(lambda picture: picture.filter(ImageFilter.GaussianBlur(4)))),
    Plant("enlarged", _filtered(lambda picture: _scaled(_scaled(picture, 1 / 3), 3))),
    Plant("too small", _filtered(lambda picture: picture.crop((0, 0, 150, 150)))),
    Plant("EXIF-rotated", _on_its_side),
    Plant("alpha", _filtered(_see_through)),
    Plant("no caption", caption=""),
    Plant("trigger twice", caption=f"{TRIGGER} beside a mirror in which {TRIGGER} is seen again."),
    Plant("tags, not a sentence", caption=f"{TRIGGER}, solo, red_hair, outdoors, looking at viewer, smile"),
    Plant("boiler-plate", caption=f"This image shows {TRIGGER} on a chair beside an open door."),
    Plant("refusal", caption=f"{TRIGGER}, I'm sorry, but I can't describe the people in it."),
    Plant("mark-up", caption=f"{TRIGGER} holding a lamp<loc_12><loc_600> in a dark room."),
)


def write_plants(folder: Path, pictures: list[Image.Image], times: int = 2) -> dict[Path, str]:
    """Each plant `times` times, on other pictures than the good ones; returns what each file is to be found as."""
    expected = {}
    for number, plant in enumerate(PLANTS * times):
        path = folder / f"plant_{number:02}.png"
        own = drawn(1000 + number) if number % 2 else pictures[number % len(pictures)].rotate(180)
        plant.save(pictures[2 * number].copy() if plant.of_good else own, path)
        if plant.caption != "":
            path.with_suffix(".txt").write_text(plant.caption or sentence(500 + number))
        expected[path] = plant.kind
    return expected
