import struct
import zlib

import numpy as np
import pytest
from pictures import deep_png, draw
from PIL import ExifTags, Image, ImageCms

from lora_workbench.training.buckets import crop_box
from lora_workbench.training.images import Look, fit, look_at, open_alpha, open_image


def size_of(path):
    """(width, height) as the header says it."""
    look = look_at(path)
    return look.width, look.height


def sideways(path, orientation=6):
    """A picture 40 wide and 20 high, red left half, whose EXIF says to turn it."""
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_pictures_are_turned_upright_as_their_exif_says(tmp_path, suffix):
    """Trap 17."""
    path = sideways(tmp_path / f"turned{suffix}")
    assert size_of(path) == open_image(path).size == (20, 40)
    red, _, blue = open_image(path).getpixel((10, 5))
    assert red > 200 > 50 > blue  # the left half is on top when a picture is turned right


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_read_from_the_header_is_the_size_of_the_opened_picture(tmp_path, orientation):
    path = sideways(tmp_path / "any.jpg", orientation)
    assert size_of(path) == open_image(path).size


def test_exif_behind_the_pixels_of_a_png_is_found_too(tmp_path):
    data = sideways(tmp_path / "before.png").read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path = tmp_path / "behind.png"
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert size_of(path) == open_image(path).size == (20, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white(tmp_path, mode):
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.convert(mode).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_transparent_palette_colour_becomes_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    opened = open_image(tmp_path / "palette.png")
    assert opened.getpixel((3, 3)) == (255, 255, 255) and opened.getpixel((0, 0)) == (40, 50, 60)


def test_half_transparent_colours_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 51)).save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png").getpixel((0, 0)) == (204, 204, 204)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    grey = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    opened = np.asarray(open_image(tmp_path / "deep.png"))
    assert opened[..., 0].tolist() == [[0, 100], [200, 255]]


def test_floating_point_grey_keeps_its_brightness(tmp_path):
    Image.fromarray(np.array([[0.0, 1.0], [0.2, 0.4]], dtype=np.float32)).save(tmp_path / "float.tif")
    assert np.asarray(open_image(tmp_path / "float.tif"))[..., 1].tolist() == [[0, 255], [51, 102]]


def test_cmyk_and_black_and_white_become_rgb(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    red, green, _ = open_image(tmp_path / "print.jpg").getpixel((0, 0))
    assert red > 200 and green < 60
    assert open_image(tmp_path / "bits.png").getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
def test_a_picture_that_is_cut_off_is_refused_by_name_before_it_is_opened(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-600])
    for read in (size_of, open_image):
        with pytest.raises(ValueError, match=f"cut{suffix} cannot be read as a picture .*: save it again or remove it"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_not_a_picture_is_refused_by_name(tmp_path, content):
    path = tmp_path / "fake.png"
    path.write_bytes(content)
    for read in (size_of, open_image):
        with pytest.raises(ValueError, match="fake.png cannot be read"):
            read(path)


def test_a_file_that_is_gone_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="gone.png cannot be read .*No such file"):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize("limit", ["Pillow's own", "turned off by another pack"])
def test_a_decompression_bomb_is_refused_by_name(tmp_path, monkeypatch, limit):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    if limit.startswith("turned"):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (size_of, open_image):
        with pytest.raises(ValueError, match="bomb.png cannot be read"):
            read(path)


def test_sizes_are_read_without_decoding_pixels(tmp_path, monkeypatch):
    paths = [draw(tmp_path / f"plain{suffix}", (30, 20)) for suffix in (".png", ".jpg", ".webp")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("pixels were decoded"))
    assert [size_of(path) for path in paths] == [(30, 20)] * 3


def test_the_trained_pixels_are_those_inside_the_crop_box():
    image = Image.new("RGB", (800, 200), "black")
    left, top, right, bottom = map(round, crop_box(800, 200, (128, 64)))
    image.paste("lime", (left, top, right, bottom))
    inside = np.asarray(fit(image, (128, 64)))
    assert inside.shape == (64, 128, 3)
    assert (inside[:, 2:-2, 1] > 250).all() and (inside[:, [0, -1], 1] > 200).all()


def test_small_pictures_are_enlarged_to_their_size():
    assert fit(Image.new("RGB", (7, 3)), (128, 64)).size == (128, 64)


@pytest.mark.parametrize("colour, expected", [("black", (0, 0, 0)), ("#102030", (16, 32, 48))])
def test_transparent_parts_become_the_chosen_colour(tmp_path, colour, expected):
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png", colour).getpixel((0, 0)) == expected


def test_alpha_is_read_upright_from_every_kind_of_transparency(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpixel((0, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    alpha = open_alpha(tmp_path / "palette.png")
    assert (alpha.getpixel((0, 0)), alpha.getpixel((3, 3))) == (255, 0)
    assert open_alpha(draw(tmp_path / "plain.jpg")).getextrema() == (255, 255)


def swapped_profile():
    """An RGB profile whose red is the green of sRGB, its green the red; made from Pillow's own sRGB profile."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[start : start + 4]): start for start in range(132, 132 + 12 * data[131], 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace("sRGB built-in".encode("utf-16-be"), "swap built-in".encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_of_another_profile_become_those_of_srgb(tmp_path, mode):
    Image.new("RGB", (8, 8), (255, 0, 0)).convert(mode).save(tmp_path / "wide.png", icc_profile=swapped_profile())
    red, green, _ = open_image(tmp_path / "wide.png").getpixel((0, 0))
    assert red < 10 and green > 245


def test_a_profile_of_srgb_or_of_no_use_changes_nothing(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for name, profile in (
        ("srgb.png", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        ("lab.png", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        ("junk.png", b"no profile"),
    ):
        picture.save(tmp_path / name, icc_profile=profile)
        assert open_image(tmp_path / name).tobytes() == picture.tobytes()


def test_sixteen_bit_colours_keep_their_upper_half_and_are_remarked(tmp_path):
    (tmp_path / "deep.png").write_bytes(deep_png())
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (0xC0, 0x40, 0x01)
    assert look_at(tmp_path / "deep.png").remarks == ("16 bits a colour, of which Pillow reads the upper 8",)


def test_a_wrong_extension_is_remarked(tmp_path):
    draw(tmp_path / "1.jpg").rename(tmp_path / "1.png")
    draw(tmp_path / "2.png").rename(tmp_path / "2.webp")
    draw(tmp_path / "3.jpg").rename(tmp_path / "3.jfif")
    told = [look_at(tmp_path / name).remarks for name in ("1.png", "2.webp", "3.jfif")]
    assert told == [
        ("really a JPEG picture, whatever the name says",),
        ("really a PNG picture, whatever the name says",),
        (),
    ]
    assert open_image(tmp_path / "1.png").size == (64, 64)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".avif"])
def test_an_animation_gives_its_first_frame_and_is_remarked(tmp_path, suffix):
    path = tmp_path / f"moving{suffix}"
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    red, _, blue = open_image(path).getpixel((9, 9))
    assert red > 200 and blue < 60
    assert look_at(path).remarks == ("more than one frame, of which the first is used",)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".bmp", ".gif", ".tif"])
def test_plain_pictures_are_read_without_a_remark(tmp_path, suffix):
    look = look_at(draw(tmp_path / f"plain{suffix}", (96, 64)))
    assert look == Look(96, 64, False, ())
    red, green, _ = open_image(tmp_path / f"plain{suffix}").getpixel((9, 9))
    assert red > 245 and green < 10
