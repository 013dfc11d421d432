import hashlib
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from pictures import ToyEncoder, draw
from PIL import Image

from lora_workbench.training import augmentation, cache, cache_file, masks
from lora_workbench.training.augmentation import Augmentation
from lora_workbench.training.cache import encode, encodings, fingerprint, read
from lora_workbench.training.class_words import with_class_words
from lora_workbench.training.dataset import REGULARIZATION, joined
from lora_workbench.training.folder import scan
from lora_workbench.training.wording import Wording

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
    """Trap 12: no cache is stale after a caption was edited."""
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
    crop_box = augmentation.crop_box
    moved = (0.0, 1.0, 128.0, 128.0)
    monkeypatch.setattr(augmentation, "crop_box", lambda *facts: moved if facts[0] == 128 else crop_box(*facts))
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

    monkeypatch.setattr(cache_file.os, "replace", full)
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
    opened = masks.open_image
    for module in (cache, masks):
        monkeypatch.setattr(module, "open_image", lambda *facts: order.append("open") or opened(*facts))
    monkeypatch.setattr(cache, "write", lambda *_: order.append("write"))
    encoded(folder)
    assert order == ["open"] * 3 + ["open", "write"] * 3 + ["write"] * 3
    order.clear()
    varied(folder, augmentation=VARIED)  # nothing was written, so all of it is done again
    assert order == ["open"] * 3 + ["open", *["write"] * 4] * 3 + ["write"] * 3


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


def varied(folder, encoder=None, resolution=128, examples=lambda example: example, hold_out=None, **settings):
    """What was cached of a dataset with these settings, its examples changed by `examples`, and the encoder."""
    encoder, dataset = encoder or ToyEncoder(), scan(folder, resolution=resolution, hold_out=hold_out)
    dataset = replace(dataset, examples=tuple(map(examples, dataset.examples)), **settings)
    return encode(dataset, encoder, folder.parent / "cache"), encoder


def masked(folder, example):
    """The example with a mask whose left half is white."""
    mask = Image.new("L", (example.width, example.height))
    mask.paste(255, (0, 0, example.width // 2, example.height))
    mask.save(folder.parent / f"{example.path.stem}.png")
    return replace(example, mask=folder.parent / f"{example.path.stem}.png")


VARIED = Augmentation(variants=4, crop_jitter=0.2, flip=True, colour=0.1)
MASKED = Augmentation(variants=2, flip=True)


def test_every_variant_is_encoded_once_and_a_second_run_encodes_nothing(folder):
    cached, encoder = varied(folder, augmentation=VARIED)
    assert len(encoder.pictures) == 12 and [len(c.variants) for c in cached.examples] == [3, 3, 3]
    for item in cached.examples:
        shape = read(item.latents)["latents"].shape
        assert all(read(latents)["latents"].shape == shape for latents, _ in item.variants)
        assert len({item.latents, *(latents for latents, _ in item.variants)}) == 4
    again, encoder = varied(folder, augmentation=VARIED)
    assert encoder.asked == [] and again == cached


def test_variants_use_the_pictures_that_are_encoded_already(folder):
    plain, _ = varied(folder)
    cached, encoder = varied(folder, augmentation=VARIED)
    assert len(encoder.pictures) == 9 and encoder.captions == []
    assert [c.latents for c in cached.examples] == [c.latents for c in plain.examples]
    assert len(varied(folder, augmentation=replace(VARIED, variants=5))[1].asked) == 3
    assert varied(folder, augmentation=replace(VARIED, variants=2))[1].asked == []
    # without colour the variants differ, their crops, and so their masks, do not
    assert len(varied(folder, augmentation=replace(VARIED, colour=0.0))[1].asked) == 9


def test_variants_that_show_the_same_are_encoded_once(folder):
    assert len(varied(folder, augmentation=Augmentation(variants=6, flip=True))[1].pictures) == 6
    assert len(varied(folder, augmentation=Augmentation(variants=6))[1].pictures) == 0


def test_a_mirrored_variant_holds_the_mirrored_picture(folder):
    pixels = Image.new("RGB", (128, 128), "black")
    pixels.paste("white", (0, 0, 64, 128))
    pixels.save(folder / "red.png")
    red = varied(folder, augmentation=MASKED)[0].examples[2]
    plain, mirrored = (read(path)["latents"] for path in (red.latents, red.variants[0][0]))
    assert plain[..., :8].min() == 1 and torch.equal(mirrored, plain.flip(-1))


def test_a_caption_that_comes_to_tell_left_from_right_unmirrors_its_picture_alone(folder):
    varied(folder, augmentation=Augmentation(variants=2, crop_jitter=0.1, flip=True))
    (folder / "red.txt").write_text("a field on the left")
    _, encoder = varied(folder, augmentation=Augmentation(variants=2, crop_jitter=0.1, flip=True))
    assert encoder.asked == [(128, 128), "a field on the left"]


def test_every_size_of_a_picture_is_encoded_and_told_apart(folder):
    draw(folder / "red.png", (512, 512), "red")
    cached, encoder = varied(folder, resolutions=(128, 256))
    assert [c.bucket for c in cached.examples] == [(64, 256), (256, 64), (128, 128), (256, 256)]
    assert (
        cached.examples[2].text == cached.examples[3].text and cached.examples[2].latents != cached.examples[3].latents
    )
    assert varied(folder, resolutions=(256, 128))[1].asked == varied(folder, resolution=256)[1].asked[2:] == []
    smaller, encoder = varied(folder, resolution=512, largest_enlargement=1.0)
    assert [c.bucket for c in smaller.examples] == [(64, 256), (256, 64), (512, 512)] and encoder.asked == [(512, 512)]


def test_held_out_pictures_are_plain_and_at_the_resolution_of_the_dataset(folder):
    wording = Wording(shuffle_tags=True, caption_dropout=1)
    for colour in COLOURS:
        draw(folder / f"{colour}.png", (512, 512), colour)
    cached, _ = varied(folder, hold_out=1, resolutions=(64, 128, 256), augmentation=VARIED, wording=wording)
    (kept,) = cached.held_out
    assert (kept.bucket, kept.variants, kept.texts) == ((128, 128), (), {})
    assert read(kept.text)["pooled"].mean() == ToyEncoder().text(kept.example.caption)["pooled"].mean()
    assert len(cached.examples) == 6


def test_every_text_that_training_may_ask_for_is_encoded_once(folder):
    wording = Wording(shuffle_tags=True, caption_dropout=0.1, keep_first=1)
    (folder / "red.txt").write_text("zork, red, field, night")
    cached, encoder = varied(folder, wording=wording)
    assert len(encoder.captions) == len(set(encoder.captions)) == 6 + 1 + 2  # orders, nothing, other captions
    assert set(cached.examples[2].texts) == {text for text in encoder.captions if "zork" in text} | {""}
    assert varied(folder, wording=wording)[1].asked == []
    assert varied(folder, wording=replace(wording, caption_dropout=0.5))[1].asked == []


def test_a_changed_caption_among_several_encodes_exactly_that_text(folder):
    def several(last):
        return lambda example: replace(example, variants=("the first", last))

    varied(folder, examples=several("the second"))
    cached, encoder = varied(folder, examples=several("another"))
    assert encoder.asked == ["another"]
    assert list(cached.examples[2].texts) == ["a red field", "the first", "another"]


def test_a_mask_is_kept_at_the_size_of_the_latents_and_mirrored_with_them(folder):
    cached, _ = varied(folder, examples=lambda e: masked(folder, e), augmentation=MASKED)
    for item in cached.examples:
        ((latents, mirrored),) = item.variants
        mask = read(item.mask)["mask"]
        assert mask.dtype == torch.float32 and mask.shape == (1, *read(item.latents)["latents"].shape[1:])
        assert mask[..., : mask.shape[-1] // 2].min() == 1 and mask[..., mask.shape[-1] // 2 :].max() == 0
        assert torch.equal(read(mirrored)["mask"], mask.flip(-1)) and latents != item.latents


def test_a_changed_mask_encodes_nothing_and_is_fitted_anew(folder):
    before, _ = varied(folder, examples=lambda e: masked(folder, e))
    draw(folder.parent / "other.png", (128, 128), "white")
    other = folder.parent / "other.png"
    cached, encoder = varied(folder, examples=lambda e: replace(e, mask=other) if e.path.stem == "red" else e)
    assert encoder.asked == [] and read(cached.examples[2].mask)["mask"].min() == 1
    assert cached.examples[2].latents == before.examples[2].latents and cached.examples[0].mask is None
    read(before.examples[2].mask)


def test_a_damaged_mask_is_made_again_without_encoding(folder):
    cached, _ = varied(folder, examples=lambda e: masked(folder, e))
    good = cached.examples[0].mask.read_bytes()
    cached.examples[0].mask.write_bytes(good[:-1])
    _, encoder = varied(folder, examples=lambda e: masked(folder, e))
    assert encoder.asked == [] and cached.examples[0].mask.read_bytes() == good


def test_a_mask_that_cannot_be_read_is_named_before_anything_is_encoded(folder):
    encoder = ToyEncoder()
    (folder.parent / "broken.png").write_text("no picture")
    with pytest.raises(ValueError, match="broken.png cannot be read as a picture"):
        varied(folder, encoder, examples=lambda e: replace(e, mask=folder.parent / "broken.png"))
    assert encoder.asked == []


def test_transparency_that_is_the_mask_is_cached_as_one(folder):
    pixels = Image.new("RGBA", (128, 128), "red")
    pixels.putalpha(Image.new("L", (128, 128), 51))
    pixels.save(folder / "red.png")
    cached, _ = varied(folder, examples=lambda e: replace(e, mask=e.path) if e.path.stem == "red" else e)
    assert read(cached.examples[2].mask)["mask"].unique().tolist() == pytest.approx([0.2])


def test_another_background_encodes_the_pictures_anew(folder):
    pixels = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    pixels.save(folder / "red.png")
    varied(folder)
    cached, encoder = varied(folder, background="black")
    assert len(encoder.asked) == 3 and read(cached.examples[2].latents)["latents"].max() == 0


def painted_over(example):
    return replace(example, fill_masked=example.mask is not None)


def test_masked_pictures_whose_outside_is_painted_over_are_encoded_anew_and_others_are_not(folder):
    pixels = Image.new("RGB", (128, 128), "red")
    pixels.paste("blue", (64, 0, 128, 128))
    pixels.save(folder / "red.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (0, 0, 64, 128))
    mask.save(folder / "red_mask.png")
    seen, _ = varied(folder)
    painted, encoder = varied(folder, examples=painted_over)
    assert encoder.pictures == [(128, 128)] and encoder.captions == []
    red, blue = read(painted.examples[2].latents)["latents"][[0, 2]]
    assert red.min() > 0.99 and blue.max() < 0.01
    assert read(seen.examples[2].latents)["latents"][2].max() == 1.0
    assert painted.examples[2].mask == seen.examples[2].mask, "what counts is as before"
    mask.point(lambda level: 255 - level).save(folder / "red_mask.png")
    other, _ = varied(folder, examples=painted_over)
    assert read(other.examples[2].latents)["latents"][2].min() > 0.99


def test_painting_over_by_a_mask_file_and_by_transparency_are_two_things(folder):
    """The same file can be both, one time as a grey picture and one time by its transparent parts."""
    pixels = Image.new("RGBA", (128, 128), "red")
    pixels.paste((255, 255, 255, 0), (0, 0, 64, 128))
    pixels.save(folder / "red.png")
    shutil.copy(folder / "red.png", folder / "red_mask.png")
    by_file, _ = varied(folder, examples=painted_over)
    (folder / "red_mask.png").unlink()
    by_itself, encoder = varied(folder, examples=painted_over)
    assert by_file.examples[2].latents != by_itself.examples[2].latents and encoder.pictures == [(128, 128)]


def test_regularization_pictures_are_never_given_the_trigger_word(folder):
    wording = Wording(shuffle_tags=True, tag_dropout=0.5, caption_dropout=0.1)
    cached, encoder = varied(
        folder, wording=wording, trigger_word="zork", examples=lambda e: replace(e, role=REGULARIZATION, weight=0.5)
    )
    assert not any("zork" in text for text in encoder.captions)


def test_what_a_dataset_comes_to_is_known_before_it_is_encoded(folder):
    settings = {"resolutions": (128, 256), "augmentation": VARIED, "wording": Wording(caption_dropout=0.1)}
    draw(folder / "red.png", (512, 512), "red")
    dataset = replace(scan(folder, resolution=128, hold_out=1), **settings)
    _, encoder = varied(folder, hold_out=1, **settings)
    assert encodings(dataset, encoder, folder / "new") == (len(encoder.pictures), len(encoder.captions))
    encode(dataset, encoder, folder / "new")
    assert encodings(dataset, encoder, folder / "new") == (0, 0), "what is there needs no room"


def test_a_fingerprint_tells_all_that_decides_what_is_learned(folder):
    base = scan(folder, resolution=128)
    first = base.examples[0]
    assert fingerprint(replace(base, resolutions=(128,), notes=("told",))) == fingerprint(base)
    assert fingerprint(replace(base, examples=tuple(replace(e, class_words="a") for e in base.examples))) == (
        fingerprint(base)
    )
    shuffled = replace(base, wording=Wording(shuffle_tags=True))
    others = [
        replace(base, resolutions=(128, 256)),
        replace(base, resolutions=(256,)),
        replace(base, background="black"),
        replace(base, largest_enlargement=1.0),
        shuffled,
        replace(shuffled, examples=(replace(first, trigger_word="zork"), *base.examples[1:])),
        replace(base, wording=Wording(caption_dropout=0.1)),
        replace(base, augmentation=VARIED),
        *(
            replace(base, examples=(replace(first, **change), *base.examples[1:]))
            for change in (
                {"variants": ("b",)},
                {"weight": 0.0},
                {"role": REGULARIZATION},
                {"mask": first.path},
                {"mask": first.path, "fill_masked": True},
                {"mask": shutil.copy(first.path, folder.parent / "mask.png")},
            )
        ),
    ]
    assert len({fingerprint(dataset) for dataset in [base, *others]}) == 1 + len(others)


def test_pictures_that_stay_as_they_are_are_read_once_and_a_changed_one_again(folder, monkeypatch):
    """A thousand photographs are gigabytes, and every queueing asks for the fingerprint."""
    monkeypatch.setattr(cache, "UNSETTLED", 0.0)
    read, read_hash = [], cache._read_hash
    monkeypatch.setattr(cache, "_read_hash", lambda path: read.append(path.name) or read_hash(path))
    dataset = scan(folder, resolution=128)
    before = fingerprint(dataset)
    assert sorted(read) == sorted(example.path.name for example in dataset.examples + dataset.held_out)
    read.clear()
    assert fingerprint(scan(folder, resolution=128)) == before and read == []
    path = dataset.examples[0].path
    os.utime(path, ns=(1, 1))
    assert fingerprint(dataset) == before and read == [path.name]
    path.write_bytes(dataset.examples[1].path.read_bytes())
    assert fingerprint(dataset) != before and read == [path.name] * 2


def test_a_picture_that_has_just_changed_is_read_whatever_its_time_of_change(folder):
    dataset = scan(folder, resolution=128)
    path, facts, before = dataset.examples[0].path, dataset.examples[0].path.stat(), fingerprint(dataset)
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.write(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert fingerprint(dataset) != before


def test_the_fingerprint_of_a_plain_dataset_stays_what_it_was(folder):
    def facts(name):
        return [hashlib.sha256((folder / name).read_bytes()).hexdigest(), f"zork, a {name[:-4]} field", 2]

    old = json.dumps([128, [facts("blue.png"), facts("lime.png"), facts("red.png")], []])
    dataset = scan(folder, resolution=128, trigger_word="zork", repeats=2)
    assert fingerprint(dataset) == hashlib.sha256(old.encode()).hexdigest()


def test_a_picture_that_changed_size_after_the_dataset_was_loaded_is_named(folder, tmp_path):
    dataset = scan(folder, resolution=128)
    Image.new("RGB", (40, 30)).save(dataset.examples[0].path)
    with pytest.raises(ValueError, match=f"{dataset.examples[0].path.name} was changed after .*: queue again"):
        encode(dataset, ToyEncoder(), tmp_path / "other_cache")


# Class words


@pytest.fixture
def zork(tmp_path):
    """Two pictures of a concept that has a class, and one of the class."""
    draw(tmp_path / "set" / "1_zork star" / "a.png", (128, 128), "red", caption="zork, a red field, wide")
    draw(tmp_path / "set" / "1_zork star" / "b.png", (128, 128), "lime", caption="zork star, a lime field")
    draw(tmp_path / "stars" / "c.png", (128, 128), "blue", caption="star, a blue field")
    concept = scan(tmp_path / "set", trigger_word="zork", resolution=128)
    return joined([scan(tmp_path / "stars", role=REGULARIZATION, resolution=128), concept])


def test_captions_of_concepts_are_encoded_with_class_words_when_that_is_asked(zork, tmp_path):
    encoder = ToyEncoder()
    plain = encode(zork, encoder, tmp_path / "cache")
    assert all(cached.class_texts is None for cached in plain.examples) and len(encoder.captions) == 3
    encoder.asked.clear()
    c, a, b = encode(zork, encoder, tmp_path / "cache", classes=True).examples
    assert encoder.asked == ["star, a red field, wide", "star, a lime field"]
    assert c.class_texts == {} and list(a.class_texts) == ["zork, a red field, wide"]
    caption, path = b.class_texts["zork star, a lime field"]
    assert caption == "star, a lime field" and torch.equal(read(path)["pooled"], encoder.text(caption)["pooled"])


def test_every_text_of_a_concept_that_says_the_trigger_word_has_one_with_class_words(zork, tmp_path):
    zork = replace(zork, wording=Wording(shuffle_tags=True, tag_dropout=0.5, caption_dropout=0.5, most_texts=12))
    encoder = ToyEncoder()
    cached = encode(zork, encoder, tmp_path / "cache", classes=True)
    _, a, _ = cached.examples
    assert set(a.class_texts) == set(a.texts) - {""} and len(a.class_texts) > 2
    assert all(other == text.replace("zork", "star") for text, (other, _) in a.class_texts.items())
    new = zork.folder / "new"
    assert len(encoder.captions) == encodings(zork, encoder, new, classes=True)[1] > encodings(zork, encoder, new)[1]


def test_a_class_nobody_has_said_is_asked_for_before_anything_is_encoded(folder, tmp_path):
    encoder = ToyEncoder()
    with pytest.raises(ValueError, match="what 'zork' is"):
        encode(scan(folder, trigger_word="zork"), encoder, tmp_path / "cache", classes=True)
    assert encoder.asked == []


def test_a_fingerprint_tells_the_class_only_where_it_matters(zork):
    other = with_class_words(zork, "planet")
    assert fingerprint(other) == fingerprint(zork)
    assert len({fingerprint(zork), fingerprint(zork, classes=True), fingerprint(other, classes=True)}) == 3
