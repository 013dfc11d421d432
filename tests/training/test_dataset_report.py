"""The report on a dataset, read before a step is spent on it."""

import pictures
import pytest

from lora_workbench.training.folder import scan
from lora_workbench.training.dataset_report import describe


@pytest.fixture
def folder(tmp_path):
    pictures.draw(tmp_path / "1.png", (300, 300), caption="a cat")
    pictures.draw(tmp_path / "2.png", (300, 300))
    pictures.draw(tmp_path / "3.png", (600, 300), caption="zork, a dog")
    return tmp_path


def test_it_says_what_was_found(folder):
    report = describe(scan(folder, trigger_word="zork", resolution=256)).splitlines()
    assert report == [
        f"3 pictures in {folder}",
        "Trained on: 3 pictures, 3 in an epoch",
        "Held out for validation: none, so the picker can only guess from the training pictures",
        "Trigger word: zork",
        "Captions: 2 of 3",
        "Buckets at resolution 256:",
        "  256 x 256: 2 pictures",
        *report[7:8],
        "Notes:",
        "  1 of 3 pictures has no caption, e.g. 2.png: the trigger word alone is used.",
    ]
    assert report[7].endswith(": 1 picture")


def test_repeats_are_counted(folder):
    assert "Trained on: 3 pictures, 12 in an epoch (4 repeats)" in describe(scan(folder, repeats=4))
    pictures.draw(folder / "10_cat" / "4.png")
    assert "Trained on: 4 pictures, 26 in an epoch (2 to 20 repeats)" in describe(scan(folder, repeats=2))


def test_held_out_pictures_are_named(folder):
    dataset = scan(folder, hold_out=1)
    assert f"Held out for validation: 1 ({dataset.held_out[0].path.name})" in describe(dataset)


def test_what_is_wrong_is_named(folder):
    (folder / "broken.png").write_bytes(b"not a picture")
    report = describe(scan(folder, resolution=512))
    assert "Left out: broken.png cannot be read as a picture" in report
    assert "3 of 3 pictures are smaller than 512 x 512, e.g. 1.png (300 x 300)" in report
    assert "Trigger word: none" in report


def test_a_clean_folder_has_no_notes(tmp_path):
    pictures.draw(tmp_path / "1.png", (256, 256), caption="a cat")
    assert "Notes" not in describe(scan(tmp_path, resolution=256))
