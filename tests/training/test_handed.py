import numpy as np
import pytest
import torch
from PIL import Image

from lora_workbench.training import handed
from lora_workbench.training.folder import scan
from lora_workbench.training.masks import open_mask


def pictures(count=2, channels=3):
    """(count, 16, 256, channels) with every brightness in it."""
    levels = torch.arange(256).repeat(16, 1)[None, :, :, None].float() / 255
    return torch.stack([levels[0] * (number + 1) / count for number in range(count)]).repeat(1, 1, 1, channels)


def test_pictures_from_other_nodes_become_a_folder_that_is_read_like_any_other(tmp_path):
    masks = torch.zeros(2, 16, 256)
    masks[0, :, :99] = 1
    folder = handed.write(tmp_path / "datasets", [pictures()], ["a star", "ein müder Stern"], [masks])
    assert folder.parent == tmp_path / "datasets"
    dataset = scan(folder, trigger_word="zork", resolution=64)
    assert [e.caption for e in dataset.examples] == ["zork, a star", "zork, ein müder Stern"]
    assert [e.mask is not None for e in dataset.examples] == [True, False]
    assert np.asarray(open_mask(dataset.examples[0]))[3].tolist() == [255] * 99 + [0] * 157
    assert [note for note in dataset.notes if "mask" in note] == []


def test_pictures_are_written_without_loss(tmp_path):
    (first,) = sorted(handed.write(tmp_path, [pictures(1)]).iterdir())
    assert np.asarray(Image.open(first))[0, :, 0].tolist() == list(range(256))


def test_the_same_pictures_are_written_once_and_edited_captions_stay(tmp_path):
    folder = handed.write(tmp_path, [pictures()], ["a", "b"])
    (folder / "00001.txt").write_text("edited")
    assert handed.write(tmp_path, [pictures()[:1], pictures()[1]], ["a", "b"]) == folder
    assert (folder / "00001.txt").read_text() == "edited"
    others = [
        handed.write(tmp_path, [pictures() * 0.5], ["a", "b"]),
        handed.write(tmp_path, [pictures()], ["a", "c"]),
        handed.write(tmp_path, [pictures()], ["a", "b"], [torch.ones(16, 256)]),
    ]
    assert len({folder, *others}) == 4 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grey_and_transparent_pictures_are_taken_too(tmp_path, channels, mode):
    folder = handed.write(tmp_path, [pictures(1, channels)])
    assert Image.open(folder / "00001.png").mode == mode


def test_one_caption_and_one_mask_serve_all_pictures(tmp_path):
    folder = handed.write(tmp_path, [pictures(3)], ["a star"], [torch.ones(1, 16, 256)])
    assert len(list(folder.glob("*.txt"))) == len(list(folder.glob("*_mask.png"))) == 3


@pytest.mark.parametrize(
    "images, captions, masks, said",
    [
        ([], [], [], "images brings no picture"),
        ([pictures(3)], ["a", "b"], [], "captions brings 2 for 3 pictures: give one for each, or one for all"),
        ([pictures(3)], [], [torch.ones(2, 16, 256)], "masks brings 2 for 3 pictures"),
        ([pictures(1), pictures(1) / 0], [], [], "Picture 2 of images holds values that are not numbers"),
    ],
)
def test_what_does_not_go_together_is_refused_and_leaves_no_file(tmp_path, images, captions, masks, said):
    with pytest.raises(ValueError, match=said):
        handed.write(tmp_path, images, captions, masks)
    assert list(tmp_path.iterdir()) == []


def test_nothing_half_written_is_left_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(handed.os, "utime", full)
    with pytest.raises(OSError, match="cannot be written .No space left on device.: free space there"):
        handed.write(tmp_path, [pictures()])
    assert list(tmp_path.iterdir()) == []


def test_captions_are_words_never_file_names(tmp_path):
    folder = handed.write(tmp_path / "datasets", [pictures(1)], ["../../outside"])
    assert sorted(path.name for path in folder.iterdir()) == ["00001.png", "00001.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["datasets"]
