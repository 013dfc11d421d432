import os
import tracemalloc

import numpy as np
import pytest
from pictures import deep_png, draw, folder_of, png
from PIL import ExifTags, Image, ImageCms

from lora_workbench.training.dataset import REGULARIZATION, VALIDATION
from lora_workbench.training.folder import scan
from lora_workbench.training.images import open_image
from lora_workbench.training.listing import ALL, CONCEPTS


def names(examples):
    return [example.path.name for example in examples]


def test_pictures_come_with_the_text_beside_them_and_their_upright_size(tmp_path):
    draw(tmp_path / "star.png", (96, 64), caption="a star\n")
    dataset = scan(tmp_path, resolution=64)
    (example,) = dataset.examples
    assert (example.path, example.caption) == (tmp_path / "star.png", "a star")
    assert (example.width, example.height, example.repeats) == (96, 64, 1)
    assert dataset.notes == () and dataset.held_out == () and dataset.uncaptioned == ()


def test_pictures_come_in_natural_order(tmp_path):
    for name in ("10.png", "2.png", "a10.png", "A9.png", "1.png"):
        draw(tmp_path / name)
    assert names(scan(tmp_path).examples) == ["1.png", "2.png", "10.png", "A9.png", "a10.png"]


def test_paths_are_absolute_even_when_the_folder_is_not(tmp_path, monkeypatch):
    draw(tmp_path / "set" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert scan("set").examples[0].path == tmp_path / "set" / "1.png"


def test_hidden_files_and_other_files_are_passed_over(tmp_path):
    for name in ("seen.png", "._seen.png", ".hidden/1.png"):
        draw(tmp_path / name)
    (tmp_path / "notes.md").write_text("x")
    assert names(scan(tmp_path).examples) == ["seen.png"]


def test_kohya_folders_repeat_their_pictures_by_their_number(tmp_path):
    draw(tmp_path / "5_zork star" / "1.png", caption="five")
    draw(tmp_path / "1_other" / "1.png", caption="one")
    draw(tmp_path / "root.png", caption="root")
    assert [(e.caption, e.repeats) for e in scan(tmp_path).examples] == [("one", 1), ("five", 5), ("root", 1)]
    assert [e.repeats for e in scan(tmp_path, repeats=3).examples] == [3, 15, 3]


def test_a_sub_folder_that_is_not_read_is_named_with_its_remedy(tmp_path):
    draw(tmp_path / "1.png", (64, 64), caption="x")
    draw(tmp_path / "more" / "2.png")
    dataset = scan(tmp_path, resolution=64)
    assert len(dataset.examples) == 1
    assert dataset.notes == (
        "The sub-folder more is not read: call it 1_more, or set sub_folders to 'all', to train on its pictures too.",
    )


def test_missing_captions_are_counted_with_an_example_and_what_is_used_instead(tmp_path):
    folder_of(tmp_path, 9)
    for name in ("x1.png", "x2.png", "x3.png"):
        draw(tmp_path / name, caption="" if name == "x2.png" else None)
    said = "3 of 12 pictures have no caption, e.g. x1.png: "
    with_trigger = scan(tmp_path, trigger_word="zork", resolution=64, hold_out=0)
    assert with_trigger.notes == (said + "the trigger word alone is used.",)
    assert [e.caption for e in with_trigger.examples[-3:]] == ["zork"] * 3
    assert names(with_trigger.examples)[-3:] == [path.name for path in with_trigger.uncaptioned]
    without = scan(tmp_path, resolution=64, hold_out=0)
    assert without.notes == (said + "no text at all is used.",)
    assert without.examples[-1].caption == ""


def test_small_pictures_are_noted(tmp_path):
    draw(tmp_path / "1.png", (640, 480), caption="x")
    draw(tmp_path / "2.png", (1200, 1000), caption="x")
    (note,) = scan(tmp_path).notes
    assert note.startswith("1 of 2 pictures is smaller than 1024 x 1024, e.g. 1.png (640 x 480): they are enlarged")


def test_pictures_that_cannot_be_read_become_notes_and_the_rest_goes_on(tmp_path):
    folder_of(tmp_path, 3)
    (tmp_path / "4.jpg").write_text("not a picture")
    cut = draw(tmp_path / "5.png")
    cut.write_bytes(cut.read_bytes()[:60])
    dataset = scan(tmp_path, resolution=64)
    assert names(dataset.examples) == ["0.png", "1.png", "2.png"]
    assert [note.split(" cannot")[0] for note in dataset.notes] == ["Left out: 4.jpg", "Left out: 5.png"]


def test_a_folder_in_which_no_picture_can_be_read_is_refused_with_an_example(tmp_path):
    (tmp_path / "a.png").write_text("x")
    (tmp_path / "b.heic").write_text("x")
    with pytest.raises(ValueError, match=r"None of the pictures in .* can be read, e\.g\. b\.heic cannot be read"):
        scan(tmp_path)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="The folder .*nowhere does not exist: check the path"):
        scan(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="1.png is a file: give the folder it lies in"):
        scan(draw(tmp_path / "1.png"))


def test_a_folder_without_pictures_is_refused_by_name(tmp_path):
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match="has no pictures: put files such as"):
        scan(tmp_path)


@pytest.mark.parametrize("count, held_out", [(1, 0), (9, 0), (10, 2), (19, 2), (20, 4), (39, 4), (40, 4), (85, 8)])
def test_pictures_are_held_out_by_how_many_there_are(tmp_path, count, held_out):
    dataset = scan(folder_of(tmp_path, count))
    assert (len(dataset.examples), len(dataset.held_out)) == (count - held_out, held_out)
    assert not set(names(dataset.examples)) & set(names(dataset.held_out))


def test_as_many_are_held_out_as_asked_but_never_all(tmp_path):
    folder_of(tmp_path, 12)
    assert [len(scan(tmp_path, hold_out=n).held_out) for n in (0, 1, 11)] == [0, 1, 11]
    for number in (12, -1):
        with pytest.raises(ValueError, match=f"between 0 and 11 for a folder with 12 pictures, got {number}"):
            scan(tmp_path, hold_out=number)


def test_who_is_held_out_hardly_changes_when_files_are_added_elsewhere(tmp_path):
    before = set(names(scan(folder_of(tmp_path, 20)).held_out))
    draw(tmp_path / "5_more" / "new.png")
    after = set(names(scan(tmp_path).held_out))
    assert len(before & after) >= len(before) - 1 and after - before <= {"new.png"}


def test_who_is_held_out_does_not_depend_on_where_the_folder_lies(tmp_path):
    first, second = (scan(folder_of(tmp_path / name, 15)) for name in ("one", "two"))
    assert names(first.held_out) == names(second.held_out)


def test_a_date_in_the_place_of_repeats_is_said_and_an_epoch_that_would_fill_memory_is_refused(tmp_path):
    draw(tmp_path / "1_star" / "1.png", (64, 64), caption="a star")
    folder_of(tmp_path / "231225_holiday", 2)
    rename = "rename the folder if its number means something else, such as a date"
    assert scan(tmp_path, resolution=64).notes == (
        f"231225_holiday repeats each of its pictures 231,225 times: {rename}.",
    )
    with pytest.raises(
        ValueError, match=r"An epoch of 4,624,510 pictures .* lower repeats, or .* in 231225_holiday\.$"
    ):
        scan(tmp_path, resolution=64, repeats=10)
    with pytest.raises(ValueError, match=r"memory: lower repeats\.$"):
        scan(tmp_path / "1_star", repeats=2_000_001)


def test_repeats_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        scan(folder_of(tmp_path, 1), repeats=0)


def test_the_words_of_a_kohya_folder_stand_in_for_missing_captions(tmp_path):
    draw(tmp_path / "10_zork star" / "1.png")
    (example,) = (dataset := scan(tmp_path, trigger_word="zork", resolution=64)).examples
    assert (example.caption, example.class_words, example.trigger_word) == ("zork star", "zork star", "zork")
    assert dataset.notes == ("1 of 1 pictures has no caption, e.g. 1.png: the name of their folder is used.",)


def test_all_sub_folders_are_read_when_asked(tmp_path):
    for name in ("closeups/1.png", "3_zork/2.png", "3.png", ".hidden/4.png", "masks/5.png"):
        draw(tmp_path / name, caption="x")
    dataset = scan(tmp_path, sub_folders=ALL, trigger_word="zork", resolution=64)
    assert {e.path.name: (e.repeats, e.trigger_word) for e in dataset.examples} == {
        "1.png": (1, "zork"),
        "2.png": (3, "zork"),
        "3.png": (1, "zork"),
    }


def test_each_sub_folder_can_be_a_concept_with_its_name_as_trigger_word(tmp_path):
    draw(tmp_path / "blip" / "1.png", caption="a star")
    draw(tmp_path / "5_red dragon" / "2.png")
    draw(tmp_path / "3.png", caption="a moon")
    dataset = scan(tmp_path, sub_folders=CONCEPTS, trigger_word="zork")
    assert [(e.caption, e.repeats, e.trigger_word, e.class_words) for e in dataset.examples] == [
        ("zork, a moon", 1, "zork", ""),
        ("red dragon", 5, "red dragon", "red dragon"),
        ("blip, a star", 1, "blip", "blip"),
    ]
    assert dataset.trigger_word == "zork, red dragon, blip"


def test_regularization_pictures_get_no_trigger_word_and_are_never_held_out(tmp_path):
    for number in range(12):
        draw(tmp_path / "1_star" / f"{number}.png", caption="a moon" if number else None)
    dataset = scan(tmp_path, trigger_word="zork", role=REGULARIZATION, weight=0.5, hold_out=3)
    assert {e.role for e in dataset.examples} == {REGULARIZATION} and {e.weight for e in dataset.examples} == {0.5}
    assert [e.caption for e in dataset.examples[:2]] == ["star", "a moon"]
    assert dataset.trigger_word == "" and dataset.held_out == ()


def test_validation_pictures_are_all_held_out(tmp_path):
    dataset = scan(folder_of(tmp_path, 3), trigger_word="zork", role=VALIDATION)
    assert dataset.examples == () and [e.caption for e in dataset.held_out] == ["zork, a thing"] * 3


def test_how_it_is_trained_is_part_of_the_dataset_and_heeded_in_the_notes(tmp_path):
    draw(tmp_path / "1.png", (300, 300), caption="x")
    dataset = scan(tmp_path, resolution=512, background="#102030", largest_enlargement=1.2)
    assert (dataset.background, dataset.largest_enlargement) == ("#102030", 1.2)
    (note,) = dataset.notes
    assert "trained smaller instead of enlarged" in note and "1.png" in note
    with pytest.raises(TypeError):
        scan(tmp_path, bakcground="white")


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"role": "test"}, "role is 'test', but must be one of: train, regularization, validation"),
        ({"weight": 0}, "weight must be above 0, got 0"),
        ({"sub_folders": "some"}, "sub_folders is 'some', but must be one of: named 10_name, all, each a concept"),
        ({"mask_source": "x"}, "mask_source is 'x', but must be one of"),
        ({"background": "sky"}, "background is 'sky': give a colour such as white or #808080"),
        ({"largest_enlargement": 0.5}, "largest_enlargement must be 0 or at least 1, got 0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, setting, said):
    draw(tmp_path / "1.png")
    with pytest.raises(ValueError, match=said):
        scan(tmp_path, **setting)


def test_a_folder_whose_pictures_lie_one_level_deeper_says_so(tmp_path):
    draw(tmp_path / "cats" / "1.png")
    with pytest.raises(ValueError, match="no pictures: its sub-folder cats has some, so give that folder, or set"):
        scan(tmp_path)


def test_the_folders_of_the_caption_store_are_passed_over(tmp_path):
    draw(tmp_path / "1.png", caption="x")
    draw(tmp_path / ".caption_backups" / "today" / "2.png")
    (tmp_path / ".caption_log.json").write_text("{}")
    assert names(scan(tmp_path, sub_folders=ALL).examples) == ["1.png"]


def test_progress_is_told_and_may_stop_the_scan(tmp_path):
    told = []
    scan(folder_of(tmp_path, 3), progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3)]

    def cancel(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(tmp_path, progress=cancel)


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """Measured over the second half of many links to one big picture with an alpha channel, which must be decoded."""
    first = tmp_path / "0.png"
    Image.new("RGBA", (1000, 1000), (200, 0, 0, 99)).save(first)
    for number in range(1, 16):
        os.link(first, tmp_path / f"{number}.png")
    peaks = []

    def measure(done, total):
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        dataset = scan(tmp_path, progress=measure)
    finally:
        tracemalloc.stop()
    assert len(dataset.examples) == 14 and all(e.mask == e.path for e in dataset.examples)
    assert max(peaks[-4:]) < max(peaks[1:5]) + 100_000


def awkward_files(folder):
    """The 22 files of which trainers get some wrong; what is wrong with each is its name."""

    def save(name, image, **options):
        image.save(folder / name, **options)

    def half_clear(mode="RGBA"):
        image = Image.new("RGBA", (96, 64), (200, 30, 30, 255))
        image.paste((0, 0, 0, 0), (0, 0, 48, 64))
        return image if mode == "RGBA" else image.convert(mode)

    red, frames = Image.new("RGB", (96, 64), "red"), [Image.new("RGB", (96, 64), c) for c in ("red", "blue")]
    moving = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    (folder / "empty.png").write_bytes(b"")
    save("truncated.jpg", red)
    (folder / "truncated.jpg").write_bytes((folder / "truncated.jpg").read_bytes()[:-200])
    save("cut.png", Image.effect_noise((96, 64), 99))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-900])
    save("really_a_jpeg.png", red, format="JPEG")
    (folder / "not_an_image.png").write_text("<html>404</html>")
    save("turned.jpg", red, exif=exif)
    save("turned.png", red, exif=exif)
    save("alpha.png", half_clear())
    save("all_clear.png", Image.new("RGBA", (96, 64), (1, 2, 3, 0)))
    save("grey_alpha.png", half_clear("LA"))
    save("palette.png", red.convert("P"))
    palette = Image.new("P", (96, 64), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30])
    palette.paste(0, (0, 0, 48, 64))
    save("palette_clear.png", palette, transparency=0)
    save("print.jpg", Image.new("CMYK", (96, 64), (0, 255, 255, 0)))
    save("deep_grey.png", Image.fromarray(np.full((64, 96), 40000, dtype=np.uint16)))
    (folder / "deep_rgb.png").write_bytes(deep_png())
    wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    save("useless_profile.jpg", red, icc_profile=wide)
    save("moving.gif", frames[0], **moving)
    save("moving.webp", frames[0], **moving)
    save("moving.png", frames[0], **moving)
    save("modern.avif", red)
    (folder / "bomb.png").write_bytes(png((60000, 60000), 8, 2, b""))
    save("bits.tif", Image.new("1", (96, 64), 1))
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_22_awkward_files_load_or_are_named(tmp_path):
    every = awkward_files(tmp_path)
    dataset = scan(tmp_path, hold_out=0, resolution=64)
    loaded, told = names(dataset.examples), " ".join(dataset.notes)
    assert len(every) == 22
    refused = {"empty.png", "truncated.jpg", "cut.png", "not_an_image.png", "bomb.png"}
    assert set(every) - set(loaded) == refused and all(f"Left out: {name} " in told for name in refused)
    assert all(open_image(e.path).size == (e.width, e.height) for e in dataset.examples)
    assert "really_a_jpeg.png: really a JPEG picture" in told
    assert "deep_rgb.png: 16 bits a colour, of which Pillow reads the upper 8" in told
    assert "moving.gif and 2 more: more than one frame" in told
    assert "all_clear.png: trained without a mask, as it is transparent all over" in told
    assert {e.path.name for e in dataset.examples if e.mask} == {"alpha.png", "grey_alpha.png", "palette_clear.png"}
    assert [(e.width, e.height) for e in dataset.examples if "turned" in e.path.name] == [(64, 96)] * 2
