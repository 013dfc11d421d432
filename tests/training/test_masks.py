from unicodedata import normalize

import numpy as np
import pytest
from pictures import draw
from PIL import ExifTags, Image

from lora_workbench.training.folder import scan
from lora_workbench.training.listing import ALL
from lora_workbench.training.masks import FILES, OFF, open_mask


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
