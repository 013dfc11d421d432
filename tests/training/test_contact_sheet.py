"""The contact sheet: what is trained on, seen at a glance."""

import pictures
import pytest
from PIL import Image, ImageFont

from lora_workbench.training import contact_sheet
from lora_workbench.training.contact_sheet import CELL, CROP, GAP, HELD_OUT, MARGIN, MISSING, wrap
from lora_workbench.training.folder import scan

FONT = ImageFont.load_default(14)


@pytest.fixture
def folder(tmp_path):
    pictures.draw(tmp_path / "2.png", (200, 100), "red", "a red thing")
    pictures.draw(tmp_path / "10.png", (100, 200), "green", "a green thing")
    pictures.draw(tmp_path / "1.png", (128, 128), "blue")
    return tmp_path


def has(sheet, colour):
    """How many pixels of the sheet have exactly this colour."""
    wanted = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    return sum(count for count, pixel in sheet.getcolors(sheet.width * sheet.height) if pixel == wanted)


def test_each_picture_is_shown_with_its_crop(folder):
    sheet = contact_sheet.draw(scan(folder, resolution=256))
    assert sheet.mode == "RGB"
    assert all(has(sheet, colour) > 1000 for colour in ("red", "green", "blue"))
    assert has(sheet, CROP) > 500


def test_pictures_are_in_the_order_of_the_folder(folder):
    sheet = contact_sheet.draw(scan(folder, resolution=256))
    middles = [MARGIN + column * (CELL + GAP) + CELL // 2 for column in range(3)]
    assert [sheet.getpixel((x, MARGIN + 68 + 60)) for x in middles] == [(0, 0, 255), (255, 0, 0), (0, 128, 0)]


def test_what_is_cut_away_is_dark(folder):
    dataset = scan(pictures.draw(folder / "wide" / "x.png", (1000, 100), "white").parent, resolution=128)
    thumbnail = next(contact_sheet._cells(dataset, list(dataset.examples))).thumbnail
    assert max(thumbnail.getpixel((4, thumbnail.height // 2))) < 128
    assert thumbnail.getpixel((thumbnail.width // 2, thumbnail.height // 2)) == (255, 255, 255)


def test_held_out_and_missing_captions_have_badges(folder):
    assert has(contact_sheet.draw(scan(folder, hold_out=1)), HELD_OUT) > 300
    plain = contact_sheet.draw(scan(folder, hold_out=0))
    assert has(plain, HELD_OUT) == 0 and has(plain, MISSING) > 300
    (folder / "1.txt").write_text("a blue thing")
    assert has(contact_sheet.draw(scan(folder, hold_out=0)), MISSING) == 0


def test_a_big_folder_is_cut_short(tmp_path, monkeypatch):
    for number in range(contact_sheet.MOST_PICTURES + 7):
        pictures.draw(tmp_path / f"{number}.png", (16, 16), "red", "x")
    opened, real = [], contact_sheet.open_image
    monkeypatch.setattr(contact_sheet, "open_image", lambda path: opened.append(path.name) or real(path))
    sheet = contact_sheet.draw(scan(tmp_path))
    assert opened == [f"{number}.png" for number in range(contact_sheet.MOST_PICTURES)]
    assert sheet.width * sheet.height < 12_000_000


def test_a_picture_that_vanished_does_not_stop_the_others(folder):
    dataset = scan(folder)
    (folder / "2.png").unlink()
    sheet = contact_sheet.draw(dataset)
    assert has(sheet, "red") == 0 and has(sheet, "blue") > 1000


@pytest.mark.parametrize("size", [(3000, 20), (20, 3000), (1, 1)])
def test_pictures_of_odd_shapes_fit(size, tmp_path):
    pictures.draw(tmp_path / "odd.png", size, "red")
    assert contact_sheet.draw(scan(tmp_path, resolution=256)).height < 1000


@pytest.mark.parametrize(
    "text", ["", "short", "word " * 60, "w" * 500, "short " + "w" * 90 + " end", "\u6c34" * 80, "a\nb\tc  d"]
)
def test_wrapped_text_fits(text):
    lines = wrap(text, FONT, 200, 4)
    assert 1 <= len(lines) <= 4 and all(FONT.getlength(line) <= 200 for line in lines)
    if FONT.getlength(" ".join(text.split())) > 4 * 200:
        assert lines[-1].endswith("…")
    else:
        assert "".join(lines).replace(" ", "") == "".join(text.split())


@pytest.mark.skipif(contact_sheet._font(14).getname()[0] == "Aileron", reason="no font of the system to be found")
def test_letters_beyond_ascii_are_drawn_as_themselves():
    def drawn(letter):
        return bytes(contact_sheet._font(14).getmask(letter))

    assert len({drawn(letter) for letter in "üßéЖλ"} | {drawn("\uffff")}) == 6
