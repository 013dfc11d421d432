"""Keeping a LoRA file under a short name, and deleting others."""

import os
import threading
from pathlib import Path

import folder_paths
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_workbench.nodes import keeping
from lora_workbench.nodes.keeping import cover_of, delete, keep, kept_as
from lora_workbench.training.checkpoint import Checkpoint
from lora_workbench.training.embeddings import BUNDLED

pytestmark = pytest.mark.comfy
OUTSIDE = ("../out.safetensors", "star/../../out.safetensors", "..\\out.safetensors", "{}/out.safetensors")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The loras folder, with a file outside of it that nobody may touch."""
    folder = tmp_path / "loras"
    (folder / "star").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "out.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "embeddings", ([str(tmp_path / "words")], {".safetensors"})
    )
    return folder


def lora(folder, step, **tensors) -> Checkpoint:
    name = f"star/star_{step:06d}.safetensors"
    save_file({"a": torch.full((4,), float(step)), **tensors}, folder / name, {"step": str(step)})
    return Checkpoint(step, str(folder / name), name)


def draw_cover(checkpoint) -> bytes:
    Image.new("RGB", (8, 8), (checkpoint.step, 0, 0)).save(cover_of(Path(checkpoint.path)))
    return cover_of(Path(checkpoint.path)).read_bytes()


def test_a_kept_file_is_a_copy_under_the_runs_name_with_its_cover(folder):
    entry = lora(folder, 2)
    cover = draw_cover(entry)
    kept = keep(entry, "star")
    assert kept == folder / "star.safetensors" and kept.read_bytes() == Path(entry.path).read_bytes()
    assert (folder / "star.preview.png").read_bytes() == cover
    assert sorted(path.name for path in folder.iterdir()) == ["star", "star.preview.png", "star.safetensors"]


def test_without_a_cover_of_its_own_it_gets_the_picture_that_is_given(folder, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cell.png")
    kept = keep(lora(folder, 2), "star", tmp_path / "cell.png")
    assert cover_of(kept).read_bytes() == (tmp_path / "cell.png").read_bytes()
    own = lora(folder, 4)
    cover = draw_cover(own)
    assert cover_of(keep(own, "star", tmp_path / "cell.png")).read_bytes() == cover


def test_keeping_never_overwrites_another_file_or_its_cover(folder):
    (folder / "star.safetensors").write_bytes(b"mine")
    (folder / "star_v2.preview.png").write_bytes(b"my picture")
    entry = lora(folder, 2)
    draw_cover(entry)
    assert keep(entry, "star").name == "star_v3.safetensors"
    assert (folder / "star.safetensors").read_bytes() == b"mine"
    assert (folder / "star_v2.preview.png").read_bytes() == b"my picture"
    assert not (folder / "star.preview.png").exists() and not (folder / "star_v2.safetensors").exists()
    assert keep(lora(folder, 4), "star").name == "star_v4.safetensors"


def test_what_is_kept_already_is_not_copied_again_also_when_it_says_something_else_about_itself_now(folder):
    first, second = lora(folder, 2), lora(folder, 4)
    assert kept_as(first, "star") is None
    assert keep(first, "star").name == "star.safetensors" and keep(second, "star").name == "star_v2.safetensors"
    save_file(load_file(second.path), second.path, {"lora_workbench.strength": "0.8"})
    before = sorted(path.name for path in folder.iterdir())
    assert keep(second, "star").name == "star_v2.safetensors" == kept_as(second, "star").name
    assert sorted(path.name for path in folder.iterdir()) == before


def test_of_two_that_are_kept_at_once_none_is_lost(folder):
    entries = [lora(folder, step) for step in range(1, 7)]
    threads = [threading.Thread(target=keep, args=(entry, "star")) for entry in entries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    contents = {path.read_bytes() for path in folder.glob("*.safetensors")}
    assert contents == {Path(entry.path).read_bytes() for entry in entries}


def test_on_a_disk_without_hard_links_it_is_the_same(folder, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    (folder / "star.safetensors").write_bytes(b"mine")
    entry = lora(folder, 2)
    kept = keep(entry, "star")
    assert kept.name == "star_v2.safetensors" and kept.read_bytes() == Path(entry.path).read_bytes()
    assert (folder / "star.safetensors").read_bytes() == b"mine"
    assert not keeping._copy(Path(entry.path), folder / "star.safetensors")


def test_a_copy_that_fails_leaves_nothing_behind(folder, monkeypatch):
    entry = lora(folder, 2)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(keeping.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="no space"):
        keep(entry, "star")
    assert [path.name for path in folder.iterdir()] == ["star"]


@pytest.mark.parametrize("name", ["../out", "/etc/out", "C:\\out", "..\\..\\out", "a/b"])
def test_a_name_that_leads_elsewhere_stays_in_the_loras_folder(folder, name):
    kept = keep(lora(folder, 2), name)
    assert kept.parent == folder and kept.is_file()


@pytest.mark.parametrize("name", ["", "...", "aux"])
def test_a_run_whose_name_can_be_no_files_is_kept_under_the_files_own(folder, name):
    entry = lora(folder, 2)
    assert keep(entry, name) == kept_as(entry, name) == folder / "star_000002.safetensors"


def test_the_embeddings_of_new_words_are_there_for_the_copy_too(folder, tmp_path):
    entry = lora(folder, 2, **{f"{BUNDLED}zork.clip_l": torch.ones(2, 4)})
    words = tmp_path / "words"
    (words / "star").mkdir(parents=True)
    save_file({"clip_l": torch.ones(2, 4)}, words / "star" / "star_000002.safetensors")
    (words / "star_v2.safetensors").write_bytes(b"mine")
    keep(entry, "star")
    keep(lora(folder, 4, **{f"{BUNDLED}zork.clip_l": torch.ones(2, 4)}), "star")
    assert (words / "star.safetensors").read_bytes() == (words / "star" / "star_000002.safetensors").read_bytes()
    assert (words / "star_v2.safetensors").read_bytes() == b"mine"


def test_a_copy_whose_words_would_be_called_like_those_of_another_gets_a_name_of_its_own(folder, tmp_path):
    first = lora(folder, 2, **{f"{BUNDLED}zork.clip_l": torch.ones(2, 4)})
    second = lora(folder, 4, **{f"{BUNDLED}zork.clip_l": torch.zeros(2, 4)})
    words = tmp_path / "words"
    (words / "star").mkdir(parents=True)
    for step, rows in ((2, torch.ones(2, 4)), (4, torch.zeros(2, 4))):
        save_file({"clip_l": rows}, words / "star" / f"star_{step:06d}.safetensors")
    assert keep(first, "my star").name == "my star.safetensors"
    assert keep(second, "my_star").name == keep(second, "my_star").name == "my_star_v2.safetensors"
    assert not load_file(words / "my_star_v2.safetensors")["clip_l"].any()
    assert load_file(words / "my_star.safetensors")["clip_l"].all()
    (folder / "my star.safetensors").unlink()
    assert keep(first, "my star").name == "my star.safetensors"


def test_deleting_takes_the_files_and_their_covers_and_nothing_else(folder):
    entries = [lora(folder, step) for step in (2, 4, 6)]
    for entry in entries:
        draw_cover(entry)
    gone = entries[:2]
    delete([entry.lora_name for entry in gone], sum(Path(entry.path).stat().st_size for entry in gone))
    assert sorted(path.name for path in (folder / "star").iterdir()) == [
        "star_000006.preview.png", "star_000006.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "stays"), [(1.0, False), (2.0, True)])
def test_deleting_takes_the_embeddings_of_new_words_but_no_embedding_that_says_something_else(
    folder, tmp_path, rows, stays
):
    entry = lora(folder, 2, **{f"{BUNDLED}zork.clip_l": torch.ones(2, 4)})
    word = tmp_path / "words" / "star" / "star_000002.safetensors"
    word.parent.mkdir(parents=True)
    save_file({"clip_l": torch.full((2, 4), rows)}, word)
    delete([entry.lora_name], Path(entry.path).stat().st_size)
    assert not Path(entry.path).exists() and word.exists() == stays


def test_a_broken_file_can_be_deleted(folder):
    entry = lora(folder, 2)
    Path(entry.path).write_bytes(b"broken")
    delete([entry.lora_name], 6)
    assert not Path(entry.path).exists()


@pytest.mark.parametrize("difference", [-1, 1])
def test_files_of_another_size_than_shown_stay(folder, difference):
    entries = [lora(folder, step) for step in (2, 4)]
    total = sum(Path(entry.path).stat().st_size for entry in entries)
    with pytest.raises(ValueError, match=f"have {total} bytes now and not the {total + difference} that were shown"):
        delete([entry.lora_name for entry in entries], total + difference)
    assert all(Path(entry.path).is_file() for entry in entries)


@pytest.mark.parametrize("name", [*OUTSIDE, "gone.safetensors", "star", "", "star/notes.txt", "a\0.safetensors"])
def test_what_is_no_lora_of_the_folders_cannot_be_deleted_nor_anything_with_it(folder, tmp_path, name):
    entry = lora(folder, 2)
    (folder / "star" / "notes.txt").write_text("mine")
    size = Path(entry.path).stat().st_size + (tmp_path / "out.safetensors").stat().st_size
    with pytest.raises(ValueError):
        delete([entry.lora_name, name.format(tmp_path)], size)
    assert Path(entry.path).is_file() and (tmp_path / "out.safetensors").is_file()
    assert (folder / "star" / "notes.txt").is_file()
