from unicodedata import normalize

import numpy as np
import pytest
from pictures import draw
from PIL import ExifTags, Image, ImageDraw, ImageFilter

from lora_workbench.training.folder import scan
from lora_workbench.training.listing import ALL
from lora_workbench.training.masks import FILES, OFF, filled, open_mask, shown


def half(path, size=(64, 64)):
    """A mask whose left half is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)
    return path


def clear(path):
    """A picture whose right half is transparent."""
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((9, 9, 9, 0), (32, 0, 64, 64))
    image.save(path)
    return path


def only(dataset):
    (example,) = dataset.examples
    return example


@pytest.mark.parametrize(
    "name",
    [
        "star_mask.png",
        "star-masklabel.png",
        "STAR_Mask.PNG",
        "masks/star.png",
        "masks/star_mask.png",
        "mask/star.webp",
        "Masks/star.png",
    ],
)
def test_a_mask_is_found_by_its_name_and_is_no_picture(tmp_path, name):
    draw(tmp_path / "star.jpg", caption="x")
    mask = half(tmp_path / name)
    example = only(scan(tmp_path, resolution=64, sub_folders=ALL))
    assert example.mask == mask
    values = np.asarray(open_mask(example))
    assert values.shape == (64, 64) and values[:, 4].min() > 250 and values[:, 60].max() < 5


def test_the_masks_of_a_sub_folder_belong_to_its_own_pictures(tmp_path):
    draw(tmp_path / "1.png"), draw(tmp_path / "2_zork" / "1.png")
    mask = half(tmp_path / "2_zork" / "masks" / "1.png")
    assert {e.path.parent: e.mask for e in scan(tmp_path).examples} == {tmp_path: None, mask.parent.parent: mask}


def test_the_alpha_channel_is_the_mask_when_something_shows_through(tmp_path):
    path = clear(tmp_path / "1.png")
    example = only(scan(tmp_path))
    assert example.mask == path and open_mask(example).getpixel((5, 5)) == 255 > open_mask(example).getpixel((60, 5))
    Image.new("RGBA", (64, 64), "red").save(path)
    assert only(scan(tmp_path)).mask is None


def test_a_mask_file_goes_before_the_alpha_channel(tmp_path):
    clear(tmp_path / "1.png")
    mask = half(tmp_path / "1_mask.png")
    assert only(scan(tmp_path)).mask == mask


def test_masks_can_be_left_unused_and_still_are_no_pictures(tmp_path):
    clear(tmp_path / "1.png"), draw(tmp_path / "2.png"), half(tmp_path / "2_mask.png")
    assert [e.mask for e in scan(tmp_path, mask_source=OFF).examples] == [None, None]
    assert [e.mask and e.mask.name for e in scan(tmp_path, mask_source=FILES).examples] == [None, "2_mask.png"]


def test_a_mask_is_turned_and_sized_as_its_picture_is(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (80, 40), "red").save(tmp_path / "1.jpg", exif=exif)
    half(tmp_path / "1_mask.png", (20, 40))
    assert open_mask(only(scan(tmp_path))).size == (40, 80)
    image = Image.new("RGBA", (80, 40), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 40))
    image.save(tmp_path / "2.png", exif=exif)
    alpha = open_mask(scan(tmp_path).examples[1])
    assert alpha.size == (40, 80) and alpha.getpixel((20, 10)) == 0 and alpha.getpixel((20, 70)) == 255


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path: path.write_text("x"), "which cannot be read"),
        (lambda path: Image.new("L", (64, 32), 255).save(path), r"which has another shape (64 x 32)"),
        (lambda path: Image.new("L", (64, 64), 0).save(path), "which is black all over"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named_and_its_picture_trained_without(tmp_path, spoil, said):
    draw(tmp_path / "1.png", caption="x")
    spoil(tmp_path / "1_mask.png")
    dataset = scan(tmp_path, resolution=64)
    assert only(dataset).mask is None
    assert dataset.notes == (f"1.png: trained without its mask 1_mask.png, {said}.",)


def test_a_mask_without_a_picture_is_named(tmp_path):
    draw(tmp_path / "1.png", caption="x"), draw(tmp_path / "gas_mask.png")
    assert scan(tmp_path, resolution=64).notes == (
        "gas_mask.png: a mask by its name, but there is no picture of that name.",
    )


def test_a_transparent_mask_file_is_black_where_it_is_clear(tmp_path):
    draw(tmp_path / "1.png")
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 64))
    image.save(tmp_path / "1_mask.png")
    mask = open_mask(only(scan(tmp_path)))
    assert (mask.getpixel((5, 5)), mask.getpixel((60, 5))) == (255, 0)


def test_without_a_mask_there_is_none_to_open(tmp_path):
    draw(tmp_path / "1.png")
    assert open_mask(only(scan(tmp_path))) is None


def test_a_mask_is_found_when_one_of_picture_and_mask_came_from_a_mac(tmp_path):
    draw(tmp_path / normalize("NFD", "é.png"))
    mask = half(tmp_path / normalize("NFC", "é_mask.png"))
    dataset = scan(tmp_path)
    assert only(dataset).mask == mask and not [note for note in dataset.notes if "no picture of that name" in note]


# What a mask leaves out, painted over


def stripes_and_noise(size=128):
    """A picture of red over blue in its left half and noise in the right one, and the mask of the left."""
    noise = np.random.default_rng(1).integers(0, 256, (size, size, 3), dtype=np.uint8)
    noise[: size // 2, : size // 2], noise[size // 2 :, : size // 2] = (200, 0, 0), (0, 0, 200)
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return Image.fromarray(noise), mask


def test_what_is_left_out_is_painted_in_the_colours_beside_it_and_the_rest_stays():
    picture, mask = stripes_and_noise()
    before, after = np.asarray(picture), np.asarray(filled(picture, mask))
    assert np.array_equal(after[:, :64], before[:, :64])
    assert np.abs(after[:56, 64:].astype(int) - (200, 0, 0)).max() <= 2
    assert np.abs(after[72:, 64:].astype(int) - (0, 0, 200)).max() <= 2
    softened = np.abs(np.diff(after[:, 64:].astype(int), axis=0)).max()
    assert softened < 100 < np.abs(np.diff(after[:, :64].astype(int), axis=0)).max()


def test_a_mask_that_jpeg_has_touched_leaves_no_specks(tmp_path):
    circle = Image.new("L", (512, 512))
    ImageDraw.Draw(circle).ellipse((128, 128, 384, 384), fill=255)
    circle.save(tmp_path / "mask.jpg", quality=75)
    written = Image.open(tmp_path / "mask.jpg")
    outside = np.asarray(circle.filter(ImageFilter.MaxFilter(5))) == 0
    assert np.asarray(written)[outside].max() > 16
    picture = np.zeros((512, 512, 3), dtype=np.uint8)
    picture[outside] = 255
    assert np.asarray(filled(Image.fromarray(picture), written))[outside].max() == 0


def test_only_what_is_black_is_painted_over_and_only_with_what_is_white():
    """Grey counts for something, so it stays; black and white as JPEG writes them are black and white."""
    picture, mask = stripes_and_noise()
    written = np.asarray(mask).copy()
    written[:, 64:], written[:, :64], written[:, 60:64] = 9, 250, 120
    after = np.asarray(filled(picture, Image.fromarray(written)))
    assert np.array_equal(after[:, :64], np.asarray(picture)[:, :64])
    recoloured = np.asarray(picture).copy()
    recoloured[:, 60:64] = (0, 255, 0)
    after = np.asarray(filled(Image.fromarray(recoloured), Image.fromarray(written)))
    assert after[:, 64:, 1].max() <= 2


@pytest.mark.parametrize("level", [0, 9, 40, 255])
def test_a_mask_of_one_brightness_changes_nothing(level):
    picture, _ = stripes_and_noise()
    assert np.array_equal(np.asarray(filled(picture, Image.new("L", picture.size, level))), np.asarray(picture))


def test_a_faint_mask_is_filled_from_its_brightest_part():
    picture, mask = stripes_and_noise()
    after = np.asarray(filled(picture, mask.point(lambda level: level // 5)))
    assert np.array_equal(after, np.asarray(filled(picture, mask)))


def test_transparent_parts_take_the_colours_beside_them_instead_of_the_background(tmp_path):
    folder = clear(tmp_path / "1.png").parent
    plain, painted = (shown(only(scan(folder, resolution=64, fill_masked=fill)), "white") for fill in (False, True))
    assert plain.getpixel((50, 30)) == (255, 255, 255) and painted.getpixel((50, 30)) == (200, 0, 0)


def test_a_picture_without_a_mask_is_shown_as_it_is(tmp_path):
    draw(tmp_path / "1.png")
    plain, wanted = (scan(tmp_path, resolution=64, fill_masked=fill) for fill in (False, True))
    assert plain.examples == wanted.examples
    assert set(wanted.notes) - set(plain.notes) == {
        "fill_masked is on and no picture has a mask, so nothing is painted over."
    }


def test_a_photograph_is_painted_over_at_a_smaller_size_and_kept_at_its_own():
    picture, mask = (image.resize((3000, 3000), Image.Resampling.NEAREST) for image in stripes_and_noise())
    before, after = np.asarray(picture), np.asarray(filled(picture, mask))
    assert np.array_equal(after[:, :1500], before[:, :1500])
    assert np.abs(after[:1300, 1500:].astype(int) - (200, 0, 0)).max() <= 2, "nothing of the noise at the edge"
