"""Pictures that are nearly the same, found by their fingerprints."""

import planted
import pytest
from PIL import Image, ImageFilter, ImageOps

from lora_workbench.training.doctor.duplicates import SAME, clusters, pairs
from lora_workbench.training.doctor.pictures import measure


@pytest.fixture(scope="module")
def photographs():
    pytest.importorskip("skimage")
    return list(planted.photographs())


def measured(pictures, folder):
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    return [measure(folder / f"{number}.png", planted.SIDE**2) for number in range(len(pictures))]


CHANGES = {
    "half the size": lambda picture: picture.resize((128, 128)),
    "brighter": lambda picture: picture.point(lambda level: min(255, int(1.2 * level))),
    "blurred": lambda picture: picture.filter(ImageFilter.GaussianBlur(2)),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "few colours": lambda picture: picture.quantize(32).convert("RGB"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found(change, photographs, tmp_path):
    originals = photographs[:6] + photographs[19:24]
    both = measured([*originals, *map(CHANGES[change], originals)], tmp_path)
    found = {(pair.first, pair.second) for pair in pairs(both) if pair.bits <= SAME}
    assert found == {(number, number + len(originals)) for number in range(len(originals))}


def test_mirror_images_are_found_as_such(photographs, tmp_path):
    found = list(pairs(measured([photographs[0], photographs[4], ImageOps.mirror(photographs[0])], tmp_path)))
    assert [(pair.first, pair.second, pair.mirrored) for pair in found] == [(0, 2, True)]


def test_different_photographs_are_not_alike(photographs, tmp_path):
    assert list(pairs(measured(photographs, tmp_path))) == []


def test_the_same_drawing_in_other_colours_is_another_picture(tmp_path):
    def drawing(colour):
        picture = Image.new("RGB", (128, 128), colour)
        picture.paste("magenta", (40, 30, 90, 70))
        return picture

    assert list(pairs(measured([drawing("green"), drawing("gray")], tmp_path))) == []
    assert len(list(pairs(measured([drawing("green"), drawing("green")], tmp_path)))) == 1


def test_pairs_form_groups():
    assert clusters(7, [(0, 3), (3, 5), (6, 1)]) == [[0, 3, 5], [1, 6]]
    assert clusters(3, []) == [] and list(pairs([])) == []
