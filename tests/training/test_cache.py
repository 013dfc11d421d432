import os
import shutil

import pytest
import torch
from pictures import ToyEncoder, draw
from PIL import Image

from lora_workbench.training import cache
from lora_workbench.training.cache import encode, fingerprint, read
from lora_workbench.training.dataset import scan

COLOURS = ("red", "lime", "blue")


@pytest.fixture
def folder(tmp_path):
    """Three pictures of three colours, shapes and captions."""
    for colour, size in zip(COLOURS, ((128, 128), (256, 64), (64, 256)), strict=True):
        draw(tmp_path / "set" / f"{colour}.png", size, colour, caption=f"a {colour} field")
    return tmp_path / "set"


def encoded(folder, encoder=None, resolution=128, **options):
    """What was cached and the encoder that was asked."""
    encoder = encoder or ToyEncoder()
    return encode(scan(folder, resolution=resolution, **options), encoder, folder.parent / "cache"), encoder


def test_latents_have_the_colours_and_the_size_of_their_picture(folder):
    cached, _ = encoded(folder)
    blue, lime, red = cached.examples  # by name
    assert [c.bucket for c in cached.examples] == [(64, 256), (256, 64), (128, 128)]
    for item, colour in ((red, [1, 0, 0]), (lime, [0, 1, 0]), (blue, [0, 0, 1])):
        latents = read(item.latents)["latents"]
        assert latents.dtype == torch.float32
        assert latents.shape == (3, item.bucket[1] // 8, item.bucket[0] // 8)
        assert torch.equal(latents.amax((1, 2)), torch.tensor(colour, dtype=torch.float32))


def test_text_of_any_names_and_types_comes_back_as_it_was(folder):
    class Odd(ToyEncoder):
        def text(self, caption):
            half = torch.arange(6.0, requires_grad=True).bfloat16().reshape(2, 3)
            return {"cross_attn": half, "mask": torch.tensor([True, False]), "turned": half.T, "ids": torch.arange(3)}

    text = read(encoded(folder, Odd())[0].examples[0].text)
    assert set(text) == {"cross_attn", "mask", "turned", "ids"}
    assert text["cross_attn"].dtype == torch.bfloat16 and not text["cross_attn"].requires_grad
    assert torch.equal(text["turned"], text["cross_attn"].T) and text["mask"].tolist() == [True, False]


def test_a_second_run_encodes_nothing(folder):
    first, _ = encoded(folder)
    second, encoder = encoded(folder)
    assert encoder.asked == [] and second == first


def test_all_pictures_are_encoded_before_the_first_caption_and_equal_captions_once(folder):
    for colour in COLOURS:
        (folder / f"{colour}.txt").write_text("the same")
    _, encoder = encoded(folder)
    assert len(encoder.pictures) == 3 and encoder.asked[3:] == ["the same"]


def test_held_out_pictures_are_encoded_too(folder):
    cached, encoder = encoded(folder, hold_out=1)
    assert (len(cached.examples), len(cached.held_out)) == (2, 1) and len(encoder.pictures) == 3
    assert read(cached.held_out[0].latents)["latents"].shape[0] == 3


def test_a_changed_caption_encodes_exactly_that_text(folder):
    encoded(folder)
    (folder / "red.txt").write_text("something else")
    cached, encoder = encoded(folder)
    assert encoder.asked == ["something else"]
    assert cached.examples[2].example.caption == "something else"


def test_a_new_trigger_word_encodes_the_texts_and_no_picture(folder):
    encoded(folder)
    _, encoder = encoded(folder, trigger_word="zork")
    assert sorted(encoder.asked) == sorted(f"zork, a {colour} field" for colour in COLOURS)


def test_a_changed_picture_encodes_exactly_that_picture(folder):
    encoded(folder)
    draw(folder / "red.png", (128, 128), "white")
    cached, encoder = encoded(folder)
    assert encoder.asked == [(128, 128)]
    assert read(cached.examples[2].latents)["latents"].min() == 1


def test_a_changed_crop_encodes_exactly_that_picture(folder, monkeypatch):
    encoded(folder)
    crop_box = cache.crop_box
    moved = (0.0, 1.0, 128.0, 128.0)
    monkeypatch.setattr(cache, "crop_box", lambda *facts: moved if facts[0] == 128 else crop_box(*facts))
    assert encoded(folder)[1].asked == [(128, 128)]


def test_a_changed_resolution_encodes_the_pictures_and_no_text(folder):
    encoded(folder)
    _, encoder = encoded(folder, resolution=192)
    assert len(encoder.asked) == len(encoder.pictures) == 3


def test_another_vae_encodes_the_pictures_and_another_text_encoder_the_texts(folder):
    encoded(folder)
    vae, clip = ToyEncoder(latents_key="vae 2"), ToyEncoder(text_key="clip 2")
    encoded(folder, vae)
    encoded(folder, clip)
    assert (len(vae.pictures), vae.captions) == (3, [])
    assert (clip.pictures, len(clip.captions)) == ([], 3)


def test_a_folder_that_moved_or_whose_files_were_renamed_encodes_nothing(folder):
    encoded(folder)
    for suffix in (".png", ".txt"):
        os.rename(folder / f"red{suffix}", folder / f"crimson{suffix}")
    shutil.move(folder, folder.parent / "elsewhere")
    assert encoded(folder.parent / "elsewhere")[1].asked == []


@pytest.mark.parametrize("damage", ["cut off", "one bit", "emptied", "replaced", "deleted"])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_damaged_cache_file_is_made_again(folder, damage, kind):
    cached, _ = encoded(folder)
    path = getattr(cached.examples[2], kind)
    good = path.read_bytes()
    flipped = good[:-3] + bytes([good[-3] ^ 1]) + good[-2:]
    bad = {"cut off": good[:-5], "one bit": flipped, "emptied": b"", "replaced": b"x" * 500, "deleted": None}[damage]
    path.unlink() if bad is None else path.write_bytes(bad)
    with pytest.raises(ValueError, match=f"{path.name} is missing or damaged .*: queue again"):
        read(path)
    _, encoder = encoded(folder)
    assert encoder.asked == ([(128, 128)] if kind == "latents" else ["a red field"])
    assert path.read_bytes() == good


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_not_numbers_are_refused_by_name_and_not_kept(folder, value):
    class Broken(ToyEncoder):
        def latents(self, pixels):
            return super().latents(pixels) / pixels[0, 0, 0] if value != value else torch.full((3, 2, 2), value)

    first = "blue.png"
    with pytest.raises(
        ValueError, match=f"The VAE turned {first} into values that are not numbers: run the VAE in fp32"
    ):
        encoded(folder, Broken())
    assert list((folder.parent / "cache" / "latents").iterdir()) == []


def test_texts_that_are_not_numbers_are_refused_by_name(folder):
    class Broken(ToyEncoder):
        def text(self, caption):
            return {"cross_attn": torch.full((2, 2), float("nan"))}

    with pytest.raises(ValueError, match="The text encoder turned the caption of blue.png into"):
        encoded(folder, Broken())


def test_a_picture_that_breaks_after_the_scan_is_refused_before_anything_is_encoded(folder):
    dataset, encoder = scan(folder, resolution=128), ToyEncoder()
    red = folder / "red.png"
    red.write_bytes(red.read_bytes()[:80])
    with pytest.raises(ValueError, match="red.png cannot be read as a picture"):
        encode(dataset, encoder, folder.parent / "cache")
    red.unlink()
    with pytest.raises(ValueError, match="red.png cannot be read .*: load the dataset again"):
        encode(dataset, encoder, folder.parent / "cache")
    assert encoder.asked == []


def test_a_folder_that_cannot_be_written_is_refused_by_name_before_anything_is_encoded(folder):
    (folder.parent / "cache").write_text("a file is in the way")
    encoder = ToyEncoder()
    with pytest.raises(OSError, match="The cache folder .*cache.* cannot be written .*: free space there or allow"):
        encoded(folder, encoder)
    assert encoder.asked == []


def test_a_disk_that_fills_up_is_reported_and_leaves_no_half_file(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="cannot be written .No space left on device.: free space"):
        encoded(folder)
    assert list((folder.parent / "cache" / "latents").iterdir()) == []


def test_stopping_in_between_keeps_what_was_finished(folder):
    def stop(phase, done, total):
        if (phase, done) == ("encoding pictures", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode(scan(folder, resolution=128), ToyEncoder(), folder.parent / "cache", stop)
    assert len(encoded(folder)[1].pictures) == 1


def test_progress_names_the_phase_and_counts_to_the_end(folder):
    told = []
    encode(scan(folder, resolution=128), ToyEncoder(), folder.parent / "cache", lambda *facts: told.append(facts))
    for phase in ("checking pictures", "encoding pictures", "encoding captions"):
        assert [done for name, done, total in told if name == phase and total == 3] == [0, 1, 2, 3]


def test_one_picture_at_a_time_is_in_memory(folder, monkeypatch):
    order = []
    opened = cache.open_image
    monkeypatch.setattr(cache, "open_image", lambda path: order.append("open") or opened(path))
    monkeypatch.setattr(cache, "_write", lambda *_: order.append("write"))
    encoded(folder)
    assert order == ["open"] * 3 + ["open", "write"] * 3 + ["write"] * 3


def test_what_is_read_inside_inference_mode_can_be_trained_on(folder):
    cached, _ = encoded(folder)
    with torch.inference_mode():
        latents = read(cached.examples[0].latents)["latents"]
    assert not latents.is_inference()


def test_a_fingerprint_tells_what_is_taught_and_not_where_it_lies(folder):
    base = fingerprint(scan(folder, resolution=128))
    shutil.copytree(folder, folder.parent / "copy")
    assert fingerprint(scan(folder.parent / "copy", resolution=128)) == base
    changes = [
        fingerprint(scan(folder, resolution=192)),
        fingerprint(scan(folder, resolution=128, repeats=2)),
        fingerprint(scan(folder, resolution=128, trigger_word="zork")),
        fingerprint(scan(folder, resolution=128, hold_out=1)),
    ]
    (folder / "red.txt").write_text("another caption")
    changes.append(fingerprint(scan(folder, resolution=128)))
    Image.new("RGB", (128, 128), "white").save(folder / "red.png")
    changes.append(fingerprint(scan(folder, resolution=128)))
    assert len({base, *changes}) == 7
