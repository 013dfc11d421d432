"""The measures of one picture, against references and against what was done to it."""

import planted
import pytest
from PIL import Image, ImageFilter, ImageOps

from lora_workbench.training.doctor import pictures
from lora_workbench.training.doctor.pictures import (
    BLURRY,
    ENLARGED,
    SOFT,
    blur,
    fine_detail,
    measure,
    perceptual_hashes,
)

SIDE = planted.SIDE


@pytest.fixture(scope="module")
def greys():
    pytest.importorskip("skimage")
    return [picture.convert("L") for picture in planted.photographs()]


def test_the_hash_is_the_published_one(greys):
    """The lowest 8 x 8 coefficients of scipy's cosine transform, each above or below their median."""
    fft, numpy = pytest.importorskip("scipy.fft"), pytest.importorskip("numpy")
    for grey in greys[:10]:
        pixels = numpy.asarray(grey.resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
        low = fft.dctn(pixels)[:8, :8]
        assert (perceptual_hashes(grey)[0] == (low > numpy.median(low)).ravel()).all()


def test_the_second_hash_is_that_of_the_mirror_image(greys):
    for grey in greys[:10]:
        straight, mirrored = perceptual_hashes(grey)
        assert (perceptual_hashes(ImageOps.mirror(grey))[0] == mirrored).sum() >= 63
        assert (straight != mirrored).any()


def test_photographs_are_sharp_and_blurred_ones_are_not(greys):
    assert max(map(blur, greys)) < SOFT
    blurred = [blur(grey.filter(ImageFilter.GaussianBlur(4))) for grey in greys]
    assert sum(value >= BLURRY for value in blurred) > 0.6 * len(greys)


def test_blur_grows_with_the_blur(greys):
    grey = greys[0]
    values = [blur(grey), *(blur(grey.filter(ImageFilter.GaussianBlur(radius))) for radius in (1, 2, 4, 8))]
    assert values == sorted(values)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_enlarged_photographs_lack_fine_detail(greys, factor):
    assert min(map(fine_detail, greys)) >= ENLARGED
    enlarged = [
        fine_detail(
            grey.resize((SIDE // factor,) * 2, Image.Resampling.LANCZOS).resize((SIDE,) * 2, Image.Resampling.BICUBIC)
        )
        for grey in greys
    ]
    assert sum(value < ENLARGED for value in enlarged) > 0.75 * len(greys)


def test_a_large_picture_that_is_soft_at_full_size_only_is_not_called_enlarged(greys, tmp_path):
    """What is trained on is scaled down, and then the detail is there."""
    greys[0].resize((4 * SIDE, 4 * SIDE), Image.Resampling.BICUBIC).save(tmp_path / "large.png")
    assert (
        measure(tmp_path / "large.png", SIDE**2).detail
        > ENLARGED
        > measure(tmp_path / "large.png", 16 * SIDE**2).detail
    )


def test_drawings_and_plain_pictures_are_not_found_fault_with():
    plain = Image.new("L", (300, 200), 90)
    assert blur(plain) == 0 and fine_detail(plain) == 1
    drawing = planted.drawn(1).convert("L")
    assert blur(drawing) < SOFT and fine_detail(drawing) > ENLARGED


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 9), (12, 12)])
def test_tiny_and_narrow_pictures_can_be_measured(size, tmp_path):
    planted.drawn(2).resize(size).save(tmp_path / "x.png")
    measured = measure(tmp_path / "x.png", 64**2)
    assert measured.bits.shape == (64,) and 0 <= measured.blur <= 1


def test_transparency_is_measured_as_a_share_of_the_area(tmp_path):
    picture = planted.drawn(3).convert("RGBA")
    picture.save(tmp_path / "opaque.png")
    assert measure(tmp_path / "opaque.png", SIDE**2).transparent == 0
    picture.paste((0, 0, 0, 0), (0, 0, SIDE // 4, SIDE))
    picture.save(tmp_path / "quarter.png")
    assert measure(tmp_path / "quarter.png", SIDE**2).transparent == pytest.approx(0.25)


def test_an_opaque_picture_is_decoded_once(tmp_path, monkeypatch):
    planted.drawn(4).save(tmp_path / "x.jpg")
    opened, real = [], pictures.open_image
    monkeypatch.setattr(pictures, "open_image", lambda path: opened.append(path) or real(path))
    monkeypatch.setattr(pictures, "open_alpha", lambda path: pytest.fail("decoded for its alpha channel"))
    measure(tmp_path / "x.jpg", SIDE**2)
    assert len(opened) == 1
