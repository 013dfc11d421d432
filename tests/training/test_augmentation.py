import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_workbench.training.augmentation import Augmentation, View, tells_sides, variant_of, view_of
from lora_workbench.training.buckets import crop_box
from lora_workbench.training.dataset import Example

ALL = Augmentation(variants=8, crop_jitter=0.2, flip=True, colour=0.1)


def example(width=300, height=200, caption="a star", *variants):
    return Example(Path("1.png"), caption, width, height, variants=variants)


def view(variant, augmentation=ALL, size=(192, 128), key="picture", of=None, **limit):
    return view_of(of or example(), size, variant, augmentation, key=key, **limit)


def noise(width, height, mode="RGB"):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(("name", "value"), [("variants", 0), ("crop_jitter", 0.6), ("colour", float("nan"))])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be between"):
        Augmentation(**{name: value})


@pytest.mark.parametrize("difference", [{"crop_jitter": 0.1}, {"flip": True}, {"colour": 0.1}])
def test_a_difference_that_could_never_be_seen_is_refused(difference):
    with pytest.raises(ValueError, match="variants is 1, which is the plain picture alone: set it to 2 or more"):
        Augmentation(variants=1, **difference)


def test_variant_0_is_the_plain_picture_whatever_the_settings():
    box, image = crop_box(300, 200, (192, 128)), noise(300, 200)
    assert view(0) == View((192, 128), box)
    assert view(0).picture(image) == image.resize((192, 128), Image.Resampling.LANCZOS, box=box)


def test_without_a_difference_every_variant_is_the_plain_picture():
    assert {view(variant, Augmentation(variants=4), size=(192, 192)) for variant in range(4)} == {
        view(0, size=(192,) * 2)
    }


def test_a_moved_crop_keeps_its_shape_and_stays_inside_the_picture():
    drawn = random.Random(0)
    for variant in range(1, 500):
        picture = example(drawn.randint(64, 3000), drawn.randint(64, 3000))
        size = drawn.choice(((512, 512), (384, 640), (1024, 256)))
        jitter = drawn.choice((0.01, 0.1, 0.5))
        left, top, right, bottom = view(variant, Augmentation(2, crop_jitter=jitter), size, of=picture).box
        plain = crop_box(picture.width, picture.height, size)
        assert 0 <= left < right <= picture.width and 0 <= top < bottom <= picture.height
        assert (right - left) / (bottom - top) == pytest.approx(size[0] / size[1])
        assert 1 - jitter <= (right - left) / (plain[2] - plain[0]) <= 1 + 1e-9
        assert abs(left + right - plain[0] - plain[2]) / 2 <= jitter * (plain[2] - plain[0]) + 1e-6
        # A grey picture takes half the time.
        View(size, (left, top, right, bottom)).picture(Image.new("L", (picture.width, picture.height)))


def test_a_moved_crop_is_not_enlarged_beyond_the_limit():
    for variant in range(1, 50):
        left, _, right, _ = view(variant, largest_enlargement=0.7).box
        assert 192 / (right - left) <= 0.7 + 1e-9
        left, top, right, bottom = view(variant, size=(384, 256), largest_enlargement=1.0).box
        assert (left, top, right, bottom) == pytest.approx((0, 0, 300, 200))


def test_every_second_variant_is_mirrored_unless_a_caption_tells_left_from_right():
    assert [view(variant).mirrored for variant in range(6)] == [False, True] * 3
    for of in (example(caption="a cat, looking to the LEFT"), example(200, 200, "a cat", "left_hand up")):
        assert not any(view(variant, of=of).mirrored for variant in range(6))
    image = noise(192, 128)
    mirrored = np.asarray(view(1, Augmentation(2, flip=True), of=example(192, 128)).picture(image))
    assert np.array_equal(mirrored, np.asarray(image)[:, ::-1])


@pytest.mark.parametrize(
    ("caption", "tells"),
    [("the rightmost star", True), ("Right-handed", True), ("right_arm, 1girl", True), ("leftward", True)]
    + [("bright leftovers, copyright, righteous", False), ("", False)],
)
def test_words_that_tell_left_from_right_are_known(caption, tells):
    assert tells_sides([caption]) == tells


def test_colours_change_slightly_and_the_crop_does_not():
    for variant in range(1, 30):
        changed = view(variant, Augmentation(2, colour=0.1))
        assert changed.box == view(0).box and all(0.9 <= factor <= 1.1 for factor in changed.colour)
    grey = view(1, Augmentation(2, colour=0.1)).picture(Image.new("RGB", (300, 200), (120, 120, 120)))
    value = np.asarray(grey)[0, 0, 0]
    assert value != 120 and abs(int(value) - 120) <= 12


def test_one_setting_changes_nothing_else_about_a_variant():
    less = view(3, Augmentation(8, crop_jitter=0.2))
    assert less.box == view(3).box and less.colour == (1, 1, 1) and not less.mirrored
    assert view(3, Augmentation(4, 0.2, True, 0.1)) == view(3)
    assert view(3, key="other picture") != view(3)


def test_a_mask_is_seen_exactly_as_its_picture():
    colourless = Augmentation(8, crop_jitter=0.2, flip=True)
    picture = noise(300, 200, "L").resize((300, 200), Image.Resampling.BOX, box=(0, 0, 40, 27))  # large blocks
    for variant in range(8):
        seen = view(variant, colourless)
        through = np.asarray(seen.mask(picture, (24, 16)), dtype=float)
        pixels = np.asarray(seen.picture(picture.convert("RGB")), dtype=float)[..., 0]
        expected = pixels.reshape(16, 8, 24, 8).mean((1, 3))
        assert np.abs(through - expected).mean() < 3
        assert seen.mask(Image.new("L", (300, 200), 255), (24, 16)).getextrema() == (255, 255)


def test_every_variant_comes_once_in_as_many_turns_as_there_are_variants():
    for key in "abc":
        turns = [variant_of(4, 0, turn, key) for turn in range(40)]
        assert all(sorted(turns[start : start + 4]) == [0, 1, 2, 3] for start in range(0, 40, 4))
    assert {variant_of(1, 0, turn, "a") for turn in range(9)} == {0}


def test_which_variant_comes_depends_on_the_seed_and_the_picture():
    firsts = Counter(variant_of(4, seed, 0, key) for seed in range(20) for key in "abcde")
    assert all(15 < firsts[variant] < 35 for variant in range(4))
    assert variant_of(4, 1, 7, "a") == variant_of(4, 1, 7, "a")


def test_with_nothing_varied_there_is_the_plain_picture_alone():
    assert Augmentation().count == Augmentation(variants=7).count == 1
    assert Augmentation(flip=True).count == 4 and Augmentation(variants=2, colour=0.1).count == 2
