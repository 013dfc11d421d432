"""Whose a caption is, what it was before, and back again."""

import json
import os

import pytest

from lora_workbench.captioning import caption_log, sidecar
from lora_workbench.captioning.caption_log import AUTOMATIC, LOG_NAME, MISSING, REVIEWED, YOURS
from lora_workbench.captioning.sidecar import BACKUPS_NAME, CaptionStore, backups, undo


@pytest.fixture
def cat(tmp_path):
    return tmp_path / "cat.png"


def write(image, caption, state=AUTOMATIC, by="tagger"):
    with CaptionStore() as store:
        store.write(image, caption, state=state, by=by)


def state(image):
    return CaptionStore().state(image)


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_caption_is_automatic_until_somebody_edits_it(cat):
    assert state(cat) == MISSING
    write(cat, "a cat")
    assert state(cat) == AUTOMATIC and CaptionStore().written_by(cat) == "tagger"
    cat.with_suffix(".txt").write_text("a cat, asleep")
    assert state(cat) == YOURS and CaptionStore().written_by(cat) == ""
    cat.with_suffix(".txt").write_text(" \n")
    assert state(cat) == MISSING


def test_a_caption_stays_automatic_when_only_its_encoding_changes(cat):
    write(cat, "müde\nKatze")
    cat.with_suffix(".txt").write_bytes("müde\r\nKatze\r\n\r\n".encode("utf-16"))
    assert state(cat) == AUTOMATIC


def test_a_caption_that_was_there_before_is_yours(cat):
    cat.with_suffix(".txt").write_text("mine")
    assert state(cat) == YOURS


def test_an_automatic_caption_becomes_reviewed_and_then_yours_when_edited(cat):
    write(cat, "a cat")
    with CaptionStore() as store:
        store.mark_reviewed(cat)
        store.mark_reviewed(cat.with_name("other.png"))
    assert state(cat) == REVIEWED and state(cat.with_name("other.png")) == MISSING
    cat.with_suffix(".txt").write_text("a dog")
    assert state(cat) == YOURS


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\x00", b"[1]", b'{"cat.txt": 3}', b'{"cat.txt": {"hash": 1, "state": "automatic", "by": ""}}']
    + [b'{"cat.txt": {"hash": "x", "state": "whatever", "by": ""}}', b"[" * 100_000],
)
def test_a_corrupt_log_loses_no_caption(cat, content):
    write(cat, "a cat")
    (cat.parent / LOG_NAME).write_bytes(content)
    assert state(cat) == YOURS
    write(cat.with_name("dog.png"), "a dog")
    assert state(cat.with_name("dog.png")) == AUTOMATIC
    assert visible(cat.parent) == ["cat.txt", "dog.txt"] and cat.with_suffix(".txt").read_text() == "a cat\n"


def test_an_empty_caption_is_refused_and_nothing_is_changed(cat):
    write(cat, "a cat")
    with pytest.raises(ValueError, match="cat.png is empty"):
        write(cat, " \n")
    assert state(cat) == AUTOMATIC and len(backups([cat.parent])) == 1


def test_the_file_of_before_is_kept_in_a_dated_backup_byte_for_byte(cat):
    before = "müde\r\n".encode("utf-16")
    cat.with_suffix(".txt").write_bytes(before)
    with CaptionStore() as store:
        store.write(cat, "a cat")
        store.write(cat, "a dog")
    (kept,) = (cat.parent / BACKUPS_NAME).glob("*/cat.txt")
    assert kept.read_bytes() == before
    assert kept.parent.name == store.stamp and store.stamp.endswith("Z")


def test_undo_brings_back_what_was_there_and_whose_it_was(tmp_path, cat):
    dog, mouse = tmp_path / "dog.png", tmp_path / "sub" / "mouse.png"
    mouse.parent.mkdir()
    write(cat, "automatic")
    dog.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfmine")
    with CaptionStore() as store:
        for image in (cat, dog, mouse, cat):
            store.write(image, f"changed {image.stem}", state=AUTOMATIC, by="other")
    restored, kept = undo([tmp_path, mouse.parent])
    assert sorted(path.name for path in restored) == ["cat.txt", "dog.txt", "mouse.txt"] and kept == []
    assert (state(cat), CaptionStore().written_by(cat)) == (AUTOMATIC, "tagger")
    assert dog.with_suffix(".txt").read_bytes() == b"\xef\xbb\xbfmine" and state(dog) == YOURS
    assert state(mouse) == MISSING and visible(mouse.parent) == []


def test_undo_goes_back_one_change_after_the_other_and_deletes_no_backup(cat):
    for caption in ("one", "two", "three"):
        write(cat, caption)
    for expected in ("two", "one"):
        undo([cat.parent])
        assert cat.with_suffix(".txt").read_text() == f"{expected}\n"
    undo([cat.parent])
    assert state(cat) == MISSING
    assert undo([cat.parent]) == ([], [])
    assert len(list((cat.parent / BACKUPS_NAME).glob("*/cat.txt"))) == 2


def test_undo_leaves_what_was_edited_since(cat):
    dog = cat.with_name("dog.png")
    with CaptionStore() as store:
        store.write(cat, "a cat")
        store.write(dog, "a dog")
    cat.with_suffix(".txt").write_text("my own words")
    dog.with_suffix(".txt").unlink()
    assert undo([cat.parent]) == ([], [cat.with_suffix(".txt"), dog.with_suffix(".txt")])
    assert cat.with_suffix(".txt").read_text() == "my own words" and visible(cat.parent) == ["cat.txt"]


def test_undo_reaches_no_file_outside_the_folder(tmp_path, cat):
    write(cat, "a cat")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("a cat")
    (changes,) = (tmp_path / BACKUPS_NAME).glob("*/*.jsonl")
    line = json.loads(changes.read_text()) | {"name": f"../{outside.name}"}
    changes.write_text(f"{json.dumps(line)}\n{{cut short")
    assert undo([tmp_path]) == ([], [])
    assert outside.read_text() == "a cat"


def test_a_write_that_fails_leaves_the_caption_and_whose_it_is(cat, monkeypatch):
    write(cat, "old")
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith("cat.txt") and BACKUPS_NAME not in str(target):
            raise PermissionError("read-only")
        replace(source, target)

    monkeypatch.setattr("lora_workbench.captioning.caption_file.PAUSE", 0.0)
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError):
        write(cat, "new")
    assert cat.with_suffix(".txt").read_text() == "old\n" and state(cat) == AUTOMATIC
    assert not list(cat.parent.glob("*.tmp"))


def test_a_run_that_is_killed_leaves_its_captions_as_yours(cat):
    CaptionStore().write(cat, "a cat", state=AUTOMATIC)
    assert state(cat) == YOURS


def test_the_log_is_saved_while_a_long_run_goes_on(cat, monkeypatch):
    monkeypatch.setattr(sidecar, "SECONDS_BETWEEN_SAVES", 0.0)
    CaptionStore().write(cat, "a cat", state=AUTOMATIC)
    assert state(cat) == AUTOMATIC


def test_two_stores_at_work_in_a_folder_lose_nothing(cat):
    dog = cat.with_name("dog.png")
    with CaptionStore() as one, CaptionStore() as other:
        one.write(cat, "a cat", state=AUTOMATIC)
        other.state(cat)
        other.write(dog, "a dog", state=AUTOMATIC)
    assert (state(cat), state(dog)) == (AUTOMATIC, AUTOMATIC)


def test_nothing_is_written_when_nothing_changes(cat):
    cat.with_suffix(".txt").write_text("mine")
    with CaptionStore() as store:
        store.state(cat)
    assert os.listdir(cat.parent) == ["cat.txt"]


def test_the_log_can_be_read_by_people(cat):
    write(cat.with_name("Kätzchen.png"), "a cat")
    assert '"Kätzchen.txt"' in (cat.parent / LOG_NAME).read_text(encoding="utf-8")
    assert set(caption_log.read_log(cat.parent)) == {"Kätzchen.txt"}
