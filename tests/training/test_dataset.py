from pathlib import Path

import pytest
from pictures import draw, folder_of

from lora_workbench.training.augmentation import Augmentation
from lora_workbench.training.dataset import (
    REGULARIZATION,
    Dataset,
    Example,
    insert_trigger,
    joined,
    resolutions_in,
    with_captions,
)
from lora_workbench.training.folder import scan
from lora_workbench.training.wording import Wording


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


def example(name, **facts):
    return Example(Path(name), "x", 64, 64, **facts)


def test_datasets_are_joined_and_each_keeps_its_own_trigger_word_repeats_weight_and_role(tmp_path):
    draw(tmp_path / "a" / "1.png", caption="a star")
    draw(tmp_path / "b" / "1.png", caption="a moon")
    draw(tmp_path / "c" / "1.png", caption="a sun")
    whole = joined(
        [
            scan(tmp_path / "a", trigger_word="zork", repeats=3, weight=0.5),
            scan(tmp_path / "b", trigger_word="blip", role="validation"),
            scan(tmp_path / "c", role="regularization"),
        ]
    )
    assert [(e.caption, e.repeats, e.weight, e.role) for e in whole.examples] == [
        ("zork, a star", 3, 0.5, "train"),
        ("a sun", 1, 1.0, "regularization"),
    ]
    assert [e.caption for e in whole.held_out] == ["blip, a moon"]
    assert (whole.trigger_word, whole.folder) == ("zork, blip", tmp_path / "c")


def test_what_is_held_out_in_one_dataset_is_trained_on_in_none():
    train = Dataset(Path("a"), (example("1"), example("2")), (example("3"),))
    held = Dataset(Path("b"), (example("3"),), (example("2"),))
    whole = joined([train, held])
    assert [e.path.name for e in whole.examples] == ["1"] and [e.path.name for e in whole.held_out] == ["3", "2"]
    assert whole.notes[0].startswith("2 pictures are in one dataset to train on and in another to measure with")


def test_a_trigger_word_in_a_regularization_caption_is_told(tmp_path):
    concept = Dataset(tmp_path, (Example(tmp_path / "a.png", "zork, a star", 64, 64, trigger_word="zork"),))
    plain = Example(tmp_path / "b.png", "a zorky shape", 64, 64, role=REGULARIZATION)
    said = Example(tmp_path / "c.png", "a Zork thing", 64, 64, role=REGULARIZATION)
    (note,) = joined([Dataset(tmp_path, (plain, said)), concept]).notes
    assert note.startswith("Regularization captions hold the trigger word 'zork' (1, e.g. that of c.png): ")
    assert joined([Dataset(tmp_path, (plain,)), concept]).notes == ()


def test_the_last_of_joined_datasets_decides_how_they_are_trained_and_a_note_says_so():
    first = Dataset(Path("a"), (example("1"),), resolution=512, wording=Wording(shuffle_tags=True))
    last = Dataset(Path("b"), (example("2"),), augmentation=Augmentation(variants=2, flip=True))
    whole = joined([first, last])
    assert (whole.resolution, whole.wording, whole.augmentation) == (1024, Wording(), last.augmentation)
    (note,) = whole.notes
    assert note.startswith("a: the last loader decides how all pictures are trained, so its own resolution, wording, ")


def test_joined_datasets_count_their_missing_captions_together(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / name / "1.png"), draw(tmp_path / name / "2.png", caption="x")
    whole = joined([scan(tmp_path / name, trigger_word=name, resolution=64) for name in ("a", "b")])
    assert whole.notes == ("2 of 4 pictures have no caption, e.g. 1.png: the trigger word alone is used.",)
    described = with_captions(whole, {tmp_path / "a" / "1.png": "a star", tmp_path / "b" / "1.png": "a moon\nmoon"})
    assert described.notes == () and [e.caption for e in described.examples] == ["a star", "a, x", "b, a moon", "b, x"]
    assert described.examples[2].variants == ("b, moon",)


@pytest.mark.parametrize(
    "text, resolution, sizes",
    [
        ("", 1024, ()),
        ("512, 768", 1024, (512, 768, 1024)),
        (" 512;768 1280, ", 1024, (512, 768, 1024, 1280)),
        ("1024", 1024, ()),
    ],
)
def test_extra_resolutions_are_read_from_a_text(text, resolution, sizes):
    assert resolutions_in(text, resolution) == sizes


@pytest.mark.parametrize("text", ["big", "512x768", "-512", "51.2", "1", "100000", "9" * 5000])
def test_extra_resolutions_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match="extra_resolutions is .*: give whole numbers from 64 to 4096 with commas"):
        resolutions_in(text, 1024)


def test_regularization_pictures_are_counted_as_often_as_they_come_for_each_of_the_others():
    def counted(own, repeats, others, others_repeats):
        examples = [Example(Path(f"{n}.png"), "a zork", 64, 64, repeats=repeats) for n in range(own)]
        examples += [
            Example(Path(f"class {n}.png"), "a", 64, 64, repeats=others_repeats, role=REGULARIZATION)
            for n in range(others)
        ]
        return Dataset(Path(), tuple(examples)).regularization_a_round

    assert counted(20, 1, 50, 1) == 20 and counted(20, 3, 0, 1) == 0, "of more than others, as many in turns"
    assert counted(20, 10, 200, 1) == 20, "kohya's folders 10_zork and 1_person: as many of one as of the other"
    assert counted(10, 1, 5, 4) == 10 and counted(10, 1, 5, 1) == 5
