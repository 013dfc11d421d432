import pytest
from pictures import draw

from lora_workbench.training.dataset import insert_trigger, read_caption, scan, with_captions


def folder_of(folder, count, caption="a thing", size=(64, 64)):
    for number in range(count):
        draw(folder / f"{number}.png", size, caption=caption)
    return folder


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
    assert dataset.notes == ("The sub-folder more is not read: call it 1_more to train on its pictures too.",)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_captions_are_read_in_the_encodings_people_have(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("café – “naïve” star\r\n".encode(encoding))
    assert read_caption(path) == "café – “naïve” star"


def test_bytes_that_are_text_in_no_encoding_do_not_stop_the_scan(tmp_path):
    draw(tmp_path / "1.png").with_suffix(".txt").write_bytes(b"star \x81\xff")
    assert scan(tmp_path).examples[0].caption.startswith("star")


def test_captions_are_kept_verbatim(tmp_path):
    caption = r"asuka \(evangelion\), (red:1.3), [from|to], embedding:x,  two  spaces" + "\nsecond line"
    draw(tmp_path / "1.png", caption=caption)
    assert scan(tmp_path).examples[0].caption == caption
    assert scan(tmp_path, trigger_word="zork").examples[0].caption == "zork, " + caption


def test_caption_files_with_a_capital_suffix_are_found(tmp_path):
    draw(tmp_path / "1.png").with_suffix(".TXT").write_text("shouted")
    assert scan(tmp_path).examples[0].caption == "shouted"


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a star", "zork, a star"),
        ("a zork star", "a zork star"),
        ("ZORK, star", "ZORK, star"),
        ("a zorky star", "zork, a zorky star"),
        ("pre_zork", "zork, pre_zork"),
        ("(zork:1.2)", "(zork:1.2)"),
        ("", "zork"),
        ("  ", "zork"),
    ],
)
def test_the_trigger_is_put_first_where_it_is_absent_as_a_whole_word_and_never_twice(caption, expected):
    once = insert_trigger(caption, "zork")
    assert once == expected
    assert insert_trigger(once, " zork ") == once


@pytest.mark.parametrize("trigger", ["z(o.r*k", "two words", "c++", "ohwx man", "星"])
def test_a_trigger_may_hold_any_characters(trigger):
    once = insert_trigger("a picture", trigger)
    assert once == f"{trigger}, a picture" and insert_trigger(once, trigger) == once


def test_no_trigger_leaves_captions_alone():
    assert insert_trigger("a star", "  ") == "a star" and insert_trigger("", "") == ""


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


def test_repeats_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        scan(folder_of(tmp_path, 1), repeats=0)


def test_new_captions_replace_old_ones_and_their_note(tmp_path):
    folder_of(tmp_path, 12, caption=None)
    dataset = scan(tmp_path, trigger_word="zork", resolution=64)
    held = dataset.held_out[0].path
    some = with_captions(dataset, {dataset.examples[0].path: "a star", held: "my zork", tmp_path / "other.png": "x"})
    assert [e.caption for e in some.examples[:2]] == ["zork, a star", "zork"]
    assert some.held_out[0].caption == "my zork"
    assert len(some.notes) == 1 and some.notes[0].startswith("10 of 12 pictures have no caption")
    every = with_captions(dataset, {e.path: "zork" for e in dataset.examples + dataset.held_out})
    assert every.notes == every.uncaptioned == ()
    assert with_captions(every, {held: ""}).uncaptioned == (held,)


def test_a_caption_that_may_not_be_read_becomes_a_note(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    draw(tmp_path / "1.png", caption="x")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert any(note.startswith("The caption file 1.txt cannot be read (Permission") for note in scan(tmp_path).notes)
