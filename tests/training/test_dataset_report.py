"""The report on a dataset, read before a step is spent on it."""

import pictures
import pytest

from lora_workbench.training.dataset import joined
from lora_workbench.training.dataset_report import describe, guidance
from lora_workbench.training.doctor import Diagnosis, Finding
from lora_workbench.training.folder import scan


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
        "Count: 3 pictures are fewer than usual: a character (15-30), an object (20-50), a style (50-200), "
        "a concept (30-100)",
        "Trigger word: zork",
        "Captions: 2 of 3",
        "Buckets at resolution 256:",
        "  256 x 256: 2 pictures",
        *report[8:9],
        "Notes:",
        "  1 of 3 pictures has no caption, e.g. 2.png: the trigger word alone is used.",
    ]
    assert report[8].endswith(": 1 picture")


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


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "1 picture is fewer than usual: a character (15-30)"),
        (15, "15 pictures are as many as a character (15-30) usually takes"),
        (40, "40 pictures are as many as an object (20-50) or a concept (30-100) usually takes"),
        (200, "200 pictures are as many as a style (50-200) usually takes"),
        (201, "201 pictures are more than usual"),
    ],
)
def test_the_count_is_compared_with_what_people_take(count, said):
    assert guidance(count).startswith(said)


def test_findings_are_listed_with_those_of_the_dataset_first(folder):
    dataset = scan(folder)
    names = [folder / f"{number}.png" for number in range(1, 6)]
    blurry = tuple(Finding("blurry", "is blurry.", path) for path in names)
    whole = Finding("tied phrase", "“red” is everywhere.")
    report = describe(dataset, Diagnosis((*blurry, Finding("no caption", "has no caption.", names[1]), whole)))
    assert report.splitlines()[-5:] == [
        "  tied phrase: “red” is everywhere.",
        "  blurry: 1.png is blurry.",
        "  blurry: 2.png is blurry.",
        "  blurry: 3.png is blurry.",
        "  blurry: 2 more (4.png, 5.png)",
    ]


def test_of_thousands_the_first_are_named_and_the_others_counted(folder):
    blurry = tuple(Finding("blurry", "is blurry.", folder / f"{number}.png") for number in range(20_000))
    report = describe(scan(folder), Diagnosis(blurry))
    assert len(report) < 5_000
    assert report.endswith(
        "  blurry: 19997 more (3.png, 4.png, 5.png, 6.png, 7.png, 8.png, 9.png, 10.png, 11.png, 12.png"
        " and 19987 others)"
    )


def test_a_clean_bill_is_said(folder):
    dataset = scan(folder)
    assert "Worth a look: nothing, all seems well" in describe(dataset, Diagnosis())
    assert "Worth a look" not in describe(dataset)


def test_tokens_masks_and_roles_are_told(folder):
    dataset = scan(folder)
    assert "Masks" not in describe(dataset) and "Regularization" not in describe(dataset)
    pictures.draw(folder / "1_mask.png", (300, 300), "white")
    masked = scan(folder)
    assert "Masks: 1 of 3" in describe(masked)
    tokens = {folder / "1.png": 3, folder / "2.png": 80}
    assert "Tokens: 3 to 80, the model takes 75 in one piece" in describe(masked, Diagnosis(tokens=tokens, limit=75))
    both = joined([scan(folder, role="regularization"), scan(pictures.draw(folder / "own" / "x.png").parent)])
    assert "Regularization: 3 pictures, 3 in an epoch" in describe(both)
    assert "Trained on: 1 picture, 1 in an epoch" in describe(both)


def test_the_balance_of_tags_is_told(tmp_path):
    for number in range(10):
        pictures.draw(tmp_path / f"{number}.png", caption=f"zork, solo, thing {number}")
    report = describe(scan(tmp_path, resolution=64))
    assert "Tags: 12 different, 10 of them once only; most often zork (10), solo (10), " in report


def test_pictures_are_counted_at_every_size(tmp_path):
    pictures.draw(tmp_path / "1.png", (256, 256), caption="a cat")
    report = describe(scan(tmp_path, resolution=256, resolutions=(128, 256)))
    assert "Buckets at resolutions 128, 256:\n  128 x 128: 1 picture\n  256 x 256: 1 picture" in report
