import os
from unicodedata import normalize

import pytest

from lora_workbench.captioning import caption_file
from lora_workbench.captioning.caption_file import caption_path, read_caption, write_caption


def test_a_caption_reads_back_as_written(tmp_path):
    write_caption(tmp_path / "cat.png", "  eine Katze im Schloß \u2013 müde \n")
    assert read_caption(tmp_path / "cat.png") == "eine Katze im Schloß \u2013 müde"


def test_the_file_is_utf8_without_byte_order_mark_and_nothing_else_is_left(tmp_path):
    write_caption(tmp_path / "cat.v2.png", "müde")
    assert (tmp_path / "cat.v2.txt").read_bytes() == "müde\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["cat.v2.txt"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_captions_in_other_encodings_are_read(tmp_path, encoding):
    (tmp_path / "cat.txt").write_bytes("müde Katze\r\n".encode(encoding))
    assert read_caption(tmp_path / "cat.jpg") == "müde Katze"


def test_a_caption_file_in_capitals_is_the_caption(tmp_path):
    (tmp_path / "cat.TXT").write_text("a cat")
    assert read_caption(tmp_path / "cat.png") == "a cat"
    write_caption(tmp_path / "cat.png", "a dog")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.TXT"]


def test_a_missing_or_blank_file_is_no_caption(tmp_path):
    assert read_caption(tmp_path / "cat.png") == ""
    (tmp_path / "cat.txt").write_text(" \n")
    assert read_caption(tmp_path / "cat.png") == ""


def test_an_empty_caption_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="cat.png is empty"):
        write_caption(tmp_path / "cat.png", " \n")
    assert not caption_path(tmp_path / "cat.png").exists()


def test_a_caption_beside_a_picture_from_a_mac_stays_the_only_one(tmp_path):
    (tmp_path / normalize("NFC", "é.txt")).write_text("old")
    picture = tmp_path / normalize("NFD", "é.png")
    assert read_caption(picture) == "old"
    write_caption(picture, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new\n"]


def test_a_caption_that_somebody_reads_at_this_moment_is_waited_for(tmp_path, monkeypatch):
    """Windows lets nobody replace a file that is open."""
    tries, replace = iter([PermissionError(13, "Access is denied")] * 2), os.replace

    def shared(source, target):
        if refused := next(tries, None):
            raise refused
        replace(source, target)

    monkeypatch.setattr(caption_file, "PAUSE", 0.0)
    monkeypatch.setattr("os.replace", shared)
    write_caption(tmp_path / "cat.png", "new")
    assert read_caption(tmp_path / "cat.png") == "new"


def test_a_write_that_fails_leaves_the_old_caption(tmp_path, monkeypatch):
    write_caption(tmp_path / "cat.png", "old")

    def refuse(source, target):
        raise PermissionError("read-only")

    monkeypatch.setattr(caption_file, "PAUSE", 0.0)
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError):
        write_caption(tmp_path / "cat.png", "new")
    assert read_caption(tmp_path / "cat.png") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["cat.txt"]
