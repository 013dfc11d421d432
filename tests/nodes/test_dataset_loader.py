"""LoRA Dataset Loader: a folder as a user types it, read again whenever it has changed."""

import os
import time

import pictures
import pytest
import queueing
import torch

from lora_workbench.nodes.dataset_loader import LoraWorkbenchDatasetLoader

pytestmark = pytest.mark.comfy


@pytest.fixture
def folder(tmp_path, comfyui):
    for number in range(3):
        pictures.draw(tmp_path / f"{number}.png", (96, 64), caption=f"picture {number}")
    return tmp_path


def load(folder, **changes):
    inputs = {"trigger_word": "zork", "resolution": 256, "repeats": 1, "hold_out": -1, **changes}
    return queueing.run(LoraWorkbenchDatasetLoader, folder=str(folder), **inputs)


def fingerprint(folder):
    return LoraWorkbenchDatasetLoader.fingerprint_inputs(folder=str(folder), trigger_word="zork", resolution=256)


def test_it_gives_the_dataset_the_sheet_and_the_report(folder):
    result = load(folder, repeats=3)
    assert [example.caption for example in result["dataset"].examples] == [f"zork, picture {n}" for n in range(3)]
    assert {example.repeats for example in result["dataset"].examples} == {3}
    sheet = result["contact_sheet"]
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.shape[3] == 3 and sheet.dtype == torch.float32
    assert 0 <= sheet.min() < sheet.max() <= 1
    assert result["report"].startswith(f"3 pictures in {folder}\nTrained on: 3 pictures, 9 in an epoch")


def test_the_sheet_is_shown_on_the_node(folder):
    node = LoraWorkbenchDatasetLoader.PREPARE_CLASS_CLONE(None)
    shown = node.EXECUTE_NORMALIZED(
        folder=str(folder), trigger_word="", resolution=256, repeats=1, hold_out=0
    ).ui.as_dict()["images"]
    assert [image["type"] for image in shown] == ["temp"]


def test_hold_out_is_automatic_or_a_count(folder):
    assert len(load(folder)["dataset"].held_out) == 0
    assert len(load(folder, hold_out=2)["dataset"].held_out) == 2
    for number in range(3, 10):
        pictures.draw(folder / f"{number}.png")
    assert len(load(folder)["dataset"].held_out) == 2
    with pytest.raises(ValueError, match="hold_out must lie between 0 and 9"):
        load(folder, hold_out=10)


def test_folders_are_found_as_they_are_typed(folder, host_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    relative = pictures.draw(host_folder / "input" / "my cats" / "1.png", caption="a cat").parent
    for typed, meant in (
        (f'"{folder}"', folder),
        (f" {folder}{os.sep} ", folder),
        (f"~/{folder.name}", folder),
        ("my cats", relative),
        ("\u201cmy cats\u201d", relative),
    ):
        assert load(typed)["dataset"].folder == meant
        assert fingerprint(typed) == fingerprint(meant)


@pytest.mark.parametrize(
    "typed, error, said",
    [
        ("{}/gone", FileNotFoundError, "does not exist: check the path for typing errors"),
        ("{}/0.txt", ValueError, "is a file: give the folder it lies in"),
        ("{}/empty", ValueError, "has no pictures: put files such as .png, .jpg or .webp into it"),
    ],
)
def test_a_wrong_folder_is_told_in_one_sentence(typed, error, said, folder):
    (folder / "empty").mkdir()
    with pytest.raises(error, match=said):
        load(typed.format(folder))


def test_the_folder_is_read_again_after_every_change(folder):
    seen = [fingerprint(folder)]
    (folder / "0.txt").write_text("another caption")
    seen.append(fingerprint(folder))
    pictures.draw(folder / "3.png")
    seen.append(fingerprint(folder))
    (folder / "3.png").unlink()
    (folder / "1.txt").unlink()
    seen.append(fingerprint(folder))
    pictures.draw(folder / "10_more" / "4.png")
    seen.append(fingerprint(folder))
    os.utime(folder / "10_more" / "4.png", ns=(1, 1))
    seen.append(fingerprint(folder))
    assert len(set(seen)) == len(seen)
    assert fingerprint(folder) == seen[-1]
    assert fingerprint(folder / "gone") == fingerprint(folder / "gone")


def test_a_big_folder_stays_quick(tmp_path, comfyui):
    first = pictures.draw(tmp_path / "0.png", (64, 64))
    for number in range(1, 1500):
        os.link(first, tmp_path / f"{number}.png")
    started = time.process_time()
    fingerprint(tmp_path)
    assert time.process_time() - started < 1
    result = load(tmp_path)
    assert time.process_time() - started < 15
    assert len(result["dataset"].examples) + len(result["dataset"].held_out) == 1500
    assert result["contact_sheet"].shape[1] < 8000
