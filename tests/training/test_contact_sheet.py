"""The contact sheet: what is trained on, seen at a glance."""

import pictures
import pytest
from PIL import Image

from lora_workbench.training import contact_sheet
from lora_workbench.training.contact_sheet import CELL, CROP, GAP, HANDLED, HELD_OUT, MARGIN, MASKED, ODD
from lora_workbench.training.doctor import Diagnosis, Finding
from lora_workbench.training.folder import scan


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
    thumbnail = next(contact_sheet._cells(dataset, dataset.examples, Diagnosis())).thumbnail
    assert max(thumbnail.getpixel((4, thumbnail.height // 2))) < 128
    assert thumbnail.getpixel((thumbnail.width // 2, thumbnail.height // 2)) == (255, 255, 255)


def test_held_out_and_missing_captions_have_badges(folder):
    assert has(contact_sheet.draw(scan(folder, hold_out=1)), HELD_OUT) > 300
    plain = contact_sheet.draw(scan(folder, hold_out=0))
    assert has(plain, HELD_OUT) == 0 and has(plain, ODD) > 300
    (folder / "1.txt").write_text("a blue thing")
    assert has(contact_sheet.draw(scan(folder, hold_out=0)), ODD) == 0


def test_a_big_folder_is_cut_short(tmp_path, monkeypatch):
    for number in range(contact_sheet.MOST_PICTURES + 7):
        pictures.draw(tmp_path / f"{number}.png", (16, 16), "red", "x")
    opened, real = [], contact_sheet.open_image
    monkeypatch.setattr(contact_sheet, "open_image", lambda path, back: opened.append(path.name) or real(path, back))
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


def cells(dataset, diagnosis):
    return {cell.title: cell for cell in contact_sheet._cells(dataset, dataset.examples, diagnosis)}


def badges(cell):
    return [words for row in cell.badges for words, _ in row]


def test_findings_are_badges_and_duplicates_share_a_number(folder):
    dataset = scan(folder, hold_out=0)
    one, two, ten = (folder / name for name in ("1.png", "2.png", "10.png"))
    findings = (Finding("near-duplicate", "is like 2.png.", ten), Finding("alpha", "is see-through.", two))
    drawn = cells(dataset, Diagnosis(findings, clusters=((two, ten),)))
    assert badges(drawn["1.png"]) == ["no caption"]
    assert badges(drawn["2.png"]) == ["duplicate 1", "alpha"] and badges(drawn["10.png"]) == ["duplicate 1"]
    assert has(contact_sheet.draw(dataset, Diagnosis(findings)), HANDLED) > 300


def test_many_badges_wrap_into_rows_that_fit(folder):
    findings = tuple(Finding(f"a finding {number}", "is odd.", folder / "2.png") for number in range(9))
    cell = cells(scan(folder), Diagnosis(findings))["2.png"]
    assert badges(cell) == [f"a finding {number}" for number in range(9)] and len(cell.badges) > 2
    for row in cell.badges:
        assert sum(contact_sheet._badge_width(words) + 6 for words, _ in row) - 6 <= contact_sheet.INSIDE


def test_tokens_stand_against_the_limit(folder):
    dataset = scan(folder)
    drawn = cells(dataset, Diagnosis(tokens={folder / "1.png": 80, folder / "2.png": 7}, limit=75))
    assert ("80 of 75 tokens", ODD) in drawn["1.png"].details
    assert ("7 of 75 tokens", contact_sheet.FAINT) in drawn["2.png"].details
    assert len(drawn["10.png"].details) == 1


def test_a_mask_tints_what_is_not_learned(folder):
    assert has(contact_sheet.draw(scan(folder)), MASKED) == 0
    mask = Image.new("L", (200, 100), 0)
    mask.paste(255, (100, 0, 200, 100))
    mask.save(folder / "2_mask.png")
    thumbnail = cells(scan(folder, resolution=256), Diagnosis())["2.png"].thumbnail
    left, right = (thumbnail.getpixel((x, thumbnail.height // 2)) for x in (60, 200))
    assert right == (255, 0, 0) and left[2] > 100


def test_all_sizes_to_train_at_are_told(folder):
    dataset = scan(folder, resolution=128, resolutions=(64, 128))
    assert cells(dataset, Diagnosis())["1.png"].details == [("128 x 128 at 64 x 64, 128 x 128", CROP)]


def test_every_caption_of_a_picture_is_shown(folder):
    (folder / "1.txt").write_text("a blue thing\nblue all over")
    assert "".join(cells(scan(folder), Diagnosis())["1.png"].caption) == "a blue thing | blue all over"


def test_odd_pictures_go_before_others_when_there_are_many(tmp_path):
    for number in range(contact_sheet.MOST_PICTURES + 3):
        pictures.draw(tmp_path / f"{number}.png", (16, 16), "red" if number < 62 else "blue", "x")
    odd = Finding("blurry", "is blurry.", tmp_path / "62.png")
    assert has(contact_sheet.draw(scan(tmp_path, hold_out=0, resolution=64)), "blue") == 0
    assert has(contact_sheet.draw(scan(tmp_path, hold_out=0, resolution=64), Diagnosis((odd,))), "blue") > 1000


def test_what_is_odd_about_the_dataset_stands_above(folder):
    dataset = scan(folder)
    odd = Diagnosis((Finding("tied phrase", "“red carpet” is in 90% of the captions."),))
    assert contact_sheet.draw(dataset, odd).height > contact_sheet.draw(dataset).height
