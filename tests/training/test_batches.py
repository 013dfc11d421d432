import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import ToyEncoder, draw
from PIL import Image

from lora_workbench.training import batches as batches_module
from lora_workbench.training.augmentation import Augmentation
from lora_workbench.training.batches import Batch, Batches, largest, load
from lora_workbench.training.cache import Cached, encode
from lora_workbench.training.dataset import REGULARIZATION, Example, joined
from lora_workbench.training.folder import scan
from lora_workbench.training.wording import Wording, text_of

SIZES = ((64, 64), (128, 64), (64, 128))


@pytest.fixture
def unread(monkeypatch):
    """Cache files need not exist: each is as many ones as its name says."""
    monkeypatch.setattr(batches_module, "read", lambda path: {"latents": torch.ones(1, 1, 1)})


def imagined(*counts, repeats=lambda number: 1):
    """Cached examples without files: as many of each size as ``counts`` says."""
    return [
        Cached(
            Example(Path(f"{size}-{n}.png"), "", *SIZES[size], repeats(n)), SIZES[size], Path(f"{size}-{n}"), Path("t")
        )
        for size, count in enumerate(counts)
        for n in range(count)
    ]


def order(batches, start, count):
    return [batches[number].names for number in range(start, start + count)]


def test_every_picture_is_seen_exactly_repeats_times_an_epoch_whatever_the_sizes_and_the_batch(unread):
    drawn = random.Random(0)
    for trial in range(60):
        counts = [drawn.randint(0, 7) for _ in SIZES]
        cached = imagined(*counts, repeats=lambda n: drawn.randint(1, 4)) or imagined(1)
        batch_size = drawn.randint(1, 9)
        batches = Batches(cached, batch_size, seed=trial)
        expected = {c.example.path.name: c.example.repeats for c in cached}
        for epoch in range(3):
            seen = order(batches, epoch * batches.steps_per_epoch, batches.steps_per_epoch)
            assert Counter(name for names in seen for name in names) == expected
            assert all(1 <= len(names) <= batch_size for names in seen)


def test_an_epoch_has_as_many_batches_as_each_size_needs(unread):
    # 3 x 2 pictures of one size in batches of 4 are 2, 1 x 2 of another are 1
    batches = Batches(imagined(3, 1, repeats=lambda n: 2), 4, seed=0)
    assert batches.steps_per_epoch == 3
    assert sorted(len(names) for names in order(batches, 0, 3)) == [2, 2, 4]


def test_a_batch_holds_pictures_of_one_size(unread):
    batches = Batches(imagined(5, 5, 5), 3, seed=0)
    for number in range(12):
        batch = batches[number]
        assert {SIZES[int(name[0])] for name in batch.names} == {batch.size}


def test_every_picture_is_seen_repeats_times_at_each_of_its_sizes_whatever_its_variants(unread):
    drawn = random.Random(1)
    for trial in range(30):
        at_some_sizes = [
            replace(cached, variants=((Path(f"{cached.latents} variant"), None),) * drawn.randint(0, 3))
            for cached in imagined(*(drawn.randint(1, 5) for _ in SIZES), repeats=lambda n: drawn.randint(1, 4))
        ]
        cached = [replace(item, example=at_some_sizes[0].example) for item in at_some_sizes[:2]] + at_some_sizes[2:]
        batches = Batches(cached, drawn.randint(1, 4), seed=trial)
        expected = Counter()
        for item in cached:
            expected[item.bucket, item.example.path.name] += item.example.repeats
        for epoch in range(3):
            numbers = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
            seen = [batches[number] for number in numbers]
            assert Counter((batch.size, name) for batch in seen for name in batch.names) == expected


def test_of_more_regularization_pictures_than_others_as_many_come_in_turns(unread):
    """Else 1,000 pictures of a class take 98 steps of 100, and a run with 15 of its own 100,000."""
    own, others = imagined(3, 2), imagined(0, 7, 6)
    others = [
        replace(item, example=replace(item.example, path=Path(f"class {item.example.path}"), role=REGULARIZATION))
        for item in others
    ]
    batches = Batches([*own, *others], 2, seed=0)
    rounds = [order(batches, n * batches.steps_per_epoch, batches.steps_per_epoch) for n in range(6)]
    assert all(5 <= sum(name.startswith("class") for names in some for name in names) <= 6 for some in rounds)
    counts = Counter(name for some in rounds for names in some for name in names)
    assert set(counts) == {item.example.path.name for item in (*own, *others)}, "each has its turn"
    assert order(batches, 0, 30) == order(Batches([*own, *others], 2, seed=0), 0, 30)
    fewer = Batches([*own, *others[:5]], 2, seed=0)
    seen = Counter(name for names in order(fewer, 0, fewer.steps_per_epoch) for name in names)
    assert seen.total() == 10, "not more than others: all of them"


def test_the_variants_of_a_picture_take_turns_over_repetitions_and_epochs(tmp_path):
    picture = draw(tmp_path / "set" / "1.png", (96, 64))
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(picture)
    dataset = replace(scan(tmp_path / "set", resolution=64, repeats=2), augmentation=Augmentation(4, crop_jitter=0.3))
    (cached,) = encode(dataset, ToyEncoder(), tmp_path / "cache").examples
    files = [cached.latents, *(latents for latents, _ in cached.variants)]
    kinds = {tuple(batches_module.read(path)["latents"].flatten().tolist()): n for n, path in enumerate(files)}
    batches = Batches([cached], 1, seed=0)
    assert batches.steps_per_epoch == 2 and len(kinds) == 4
    for start in range(0, 24, 4):
        seen = [kinds[tuple(batches[number].latents.flatten().tolist())] for number in range(start, start + 4)]
        assert sorted(seen) == [0, 1, 2, 3]


def test_caption_dropout_with_caching_is_within_1_percent_of_the_setting_over_10_000_draws(tmp_path):
    for name in "abcd":
        draw(tmp_path / "set" / f"{name}.png", caption=f"{name}, red, field, night")
    wording = Wording(shuffle_tags=True, tag_dropout=0.2, caption_dropout=0.1)
    dataset = replace(scan(tmp_path / "set", resolution=64), wording=wording)
    cached = encode(dataset, ToyEncoder(), tmp_path / "cache").examples
    encoder = ToyEncoder()
    encode(dataset, encoder, tmp_path / "cache")
    batches = Batches(cached, 4, seed=0)
    texts = [text["pooled"].item() for number in range(2500) for text in batches[number].text]
    assert len(texts) == 10_000 and encoder.asked == []
    assert texts.count(0.0) / len(texts) == pytest.approx(0.1, abs=0.01)  # the toy encoder's answer to no text
    assert len(set(texts)) > 20


def test_the_texts_of_a_batch_are_those_drawn_for_its_number(tmp_path):
    for name in "abc":
        draw(tmp_path / "set" / f"{name}.png", caption=f"{name}, red, field, night")
    dataset = replace(scan(tmp_path / "set", resolution=64), wording=Wording(tag_dropout=0.5))
    cached = encode(dataset, ToyEncoder(), tmp_path / "cache").examples
    examples = {item.example.path.name: item.example for item in cached}
    for number in (0, 1, 7, 8):
        batch = Batches(cached, 2, seed=5)[number]
        for place, (name, told) in enumerate(zip(batch.names, batch.text, strict=True)):
            text = text_of(examples[name], dataset.wording, 5, number, place)
            assert torch.equal(told["pooled"], ToyEncoder().text(text)["pooled"])


def test_weights_and_masks_belong_to_the_named_pictures(tmp_path):
    weights = {"a.png": 0.5, "b.png": 1.0, "c.png": 2.0}
    for name in weights:
        draw(tmp_path / "set" / name)
    black = draw(tmp_path / "black.png", colour="black")
    dataset = scan(tmp_path / "set", resolution=64)
    examples = [replace(e, weight=weights[e.path.name]) for e in dataset.examples]
    plain = encode(replace(dataset, examples=tuple(examples)), ToyEncoder(), tmp_path / "cache").examples
    examples[1] = replace(examples[1], mask=black)
    cached = encode(replace(dataset, examples=tuple(examples)), ToyEncoder(), tmp_path / "cache").examples
    batches = Batches(cached, 3, seed=0)
    for batch in (load(cached), *(batches[number] for number in range(4))):
        assert batch.weights.dtype == torch.float32
        assert batch.weights.tolist() == [weights[name] for name in batch.names]
        assert batch.masks.shape == (3, 1, 8, 8) and batch.masks.dtype == torch.float32
        assert [mask.unique().item() for mask in batch.masks] == [float(name != "b.png") for name in batch.names]
    assert load(plain).masks is None and load([cached[0], cached[2]]).masks is None


def test_a_batch_made_by_hand_weighs_all_alike():
    assert Batch(torch.zeros(2, 4, 8, 8), ({}, {}), (64, 64), ("a", "b")).weights.tolist() == [1, 1]


def test_a_batch_depends_on_its_seed_and_number_only(unread):
    cached = imagined(5, 4, 3)
    asked_in_order = order(Batches(cached, 2, seed=7), 0, 40)
    for number in (39, 0, 17, 8):
        assert Batches(cached, 2, seed=7)[number].names == asked_in_order[number]


def test_every_epoch_and_every_seed_has_an_order_of_its_own(unread):
    batches = Batches(imagined(6, 6), 2, seed=7)
    epochs = [order(batches, epoch * 6, 6) for epoch in range(5)]
    other = order(Batches(imagined(6, 6), 2, seed=8), 0, 6)
    assert len({tuple(epoch) for epoch in [*epochs, other]}) == 6


def test_sizes_are_mixed_across_an_epoch(unread):
    batches = Batches(imagined(10, 10), 1, seed=0)
    sizes = [batches[number].size for number in range(20)]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)


def test_the_order_is_the_same_on_every_machine(unread):
    numbers = [int(name[2]) for (name,) in order(Batches(imagined(5), 1, seed=1), 0, 5)]
    assert numbers == [4, 0, 3, 2, 1]


def test_latents_and_texts_belong_to_the_named_pictures_in_every_epoch(tmp_path):
    """Trap 11: a cache that is read by step while the order is shuffled gives pictures the captions of others."""
    shades = {f"{shade}.png": shade for shade in range(0, 250, 50)}
    for name, shade in shades.items():
        draw(tmp_path / "set" / name, (64, 64), (shade,) * 3, caption=chr(65 + shade // 50))
    cached = encode(scan(tmp_path / "set", resolution=64), ToyEncoder(), tmp_path / "cache")
    batches = Batches(cached.examples, 2, seed=0)
    for number in range(4 * batches.steps_per_epoch):
        batch = batches[number]
        assert batch.latents.shape == (len(batch.names), 3, 8, 8) and batch.latents.dtype == torch.float32
        for latents, text, name in zip(batch.latents, batch.text, batch.names, strict=True):
            assert latents.mean().item() == pytest.approx(shades[name] / 255)
            assert text["pooled"].item() == 65 + shades[name] // 50


def test_chosen_pictures_are_loaded_in_their_order(tmp_path):
    for name in "abc":
        draw(tmp_path / "set" / f"{name}.png", caption=name)
    a, _, c = encode(scan(tmp_path / "set", resolution=64), ToyEncoder(), tmp_path / "cache").examples
    batch = load([c, a])
    assert batch.names == ("c.png", "a.png") and [text["pooled"].item() for text in batch.text] == [99, 97]


def test_changing_a_batch_does_not_change_the_next_time_it_is_asked_for(tmp_path):
    draw(tmp_path / "set" / "1.png", caption="a")
    cached = encode(scan(tmp_path / "set", resolution=64), ToyEncoder(), tmp_path / "cache")
    batches = Batches(cached.examples, 1, seed=0)
    batches[0].latents.zero_()
    batches[0].text[0].clear()
    assert batches[0].latents.max() == 1 and "pooled" in batches[0].text[0]


def test_memory_stays_flat_and_files_used_last_are_not_read_again(monkeypatch):
    read = Counter()

    def count(path):
        read[path] += 1
        return {"latents": torch.ones(1, 16, 16)}  # 1 KiB

    monkeypatch.setattr(batches_module, "read", count)
    monkeypatch.setattr(batches_module, "KEPT_BYTES", 8 * 1024)
    batches = Batches(imagined(20), 2, seed=0)
    recent, outcomes = [], set()
    for number in range(100):
        before = read.copy()
        for name in batches[number].names:
            path = Path(name).with_suffix("")
            kept = name in recent[-7:]  # the eighth that fits is the text
            assert read[path] == before[path] + (not kept)
            recent = [other for other in recent if other != name] + [name]
            outcomes.add(kept)
    assert outcomes == {True, False} and read[Path("t")] == 1 and len(read) == 21


def test_a_damaged_cache_file_is_named(tmp_path):
    draw(tmp_path / "set" / "1.png", caption="a")
    cached = encode(scan(tmp_path / "set", resolution=64), ToyEncoder(), tmp_path / "cache")
    cached.examples[0].latents.unlink()
    with pytest.raises(ValueError, match=f"{cached.examples[0].latents.name} is missing or damaged"):
        Batches(cached.examples, 1, seed=0)[0]


def test_bad_requests_are_refused_with_their_value(unread):
    with pytest.raises(ValueError, match="no picture to train on"):
        Batches([], 1, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(imagined(1), 0, seed=0)
    with pytest.raises(IndexError, match="got -1"):
        Batches(imagined(1), 1, seed=0)[-1]


# Captions as drawn, and with class words


@pytest.fixture
def concept(tmp_path):
    """Two pictures of a concept and one of its class, with tags that are shuffled and captions that are left out."""
    for number, tags in enumerate(("red, round, small", "lime, square, large")):
        draw(tmp_path / "set" / "1_zork star" / f"{number}.png", caption=f"zork, {tags}")
    draw(tmp_path / "stars" / "c.png", caption="star, blue")
    stars = scan(tmp_path / "stars", role=REGULARIZATION, resolution=64)
    whole = joined([stars, scan(tmp_path / "set", trigger_word="zork", resolution=64)])
    wording = Wording(shuffle_tags=True, tag_dropout=0.3, caption_dropout=0.3, most_texts=8)
    return lambda **options: encode(replace(whole, wording=wording), ToyEncoder(), tmp_path / "cache", **options)


def letters(text):
    """What ToyEncoder answers."""
    return ToyEncoder().text(text)["cross_attn"]


def test_a_batch_says_its_captions_as_they_were_drawn(concept):
    batches, said = Batches(concept().examples, 3, seed=0), set()
    for number in range(40):
        batch = batches[number]
        assert batch.class_text is None
        for caption, text in zip(batch.captions, batch.text, strict=True):
            assert torch.equal(text["cross_attn"], letters(caption))
        said.update(batch.captions)
    assert "" in said and len(said) > 6


def test_a_batch_says_concepts_also_with_class_words_unless_their_caption_was_left_out(concept):
    """Caption dropout and preservation together: a caption that is left out has no trigger word to replace."""
    batches, counts = Batches(concept(classes=True).examples, 3, seed=0), Counter()
    for number in range(40):
        batch = batches[number]
        for name, caption, other, text in zip(
            batch.names, batch.captions, batch.class_captions, batch.class_text, strict=True
        ):
            if name == "c.png" or caption == "":
                assert other == "" and text is None
            else:
                assert other == caption.replace("zork", "star")
                assert torch.equal(text["cross_attn"], letters(other))
            counts[name == "c.png", caption == ""] += 1
    assert len(counts) == 4 and counts[False, True] > 10


def test_a_batch_of_the_class_is_told_with_class_words(concept):
    batches = Batches(concept(classes=True).examples, 3, seed=0)
    batch = next(batches[n] for n in range(40) if sum(text is not None for text in batches[n].class_text) == 2)
    places = [place for place, text in enumerate(batch.class_text) if text is not None]
    told = batch.at(places).of_class()
    assert told.captions == tuple(batch.class_captions[place] for place in places) and told.class_text is None
    assert told.text == tuple(batch.class_text[place] for place in places)
    assert told.names == tuple(batch.names[place] for place in places)
    assert torch.equal(told.latents, batch.latents[places]) and torch.equal(told.weights, batch.weights[places])


def test_held_out_pictures_say_their_plain_captions(concept):
    dataset = concept()
    assert load(dataset.examples[:1]).captions == (dataset.examples[0].caption,)
    kept = replace(dataset.examples[1], texts={}, caption="zork, red, round, small")
    assert load([kept]).captions == ("zork, red, round, small",)


def test_the_examples_at_some_places_keep_all_that_belongs_to_them(concept):
    batch = replace(
        Batches(concept(classes=True).examples, 3, seed=0)[0],
        weights=torch.tensor([1.0, 2.0, 3.0]),
        masks=torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 8, 8),
    )
    some = batch.at([2, 0])
    assert some.weights.tolist() == [3.0, 1.0] and some.masks[:, 0, 0, 0].tolist() == [2.0, 0.0]
    for name in ("names", "captions", "class_captions", "class_text", "text"):
        assert getattr(some, name) == (getattr(batch, name)[2], getattr(batch, name)[0])
    assert torch.equal(some.latents, batch.latents[[2, 0]]) and some.size == batch.size
    plain = Batch(batch.latents, batch.text, batch.size, batch.names).at([1])
    assert plain.masks is None and plain.class_text is None and plain.captions == ()


def encoded_of(tmp_path, shapes, captions):
    for number, (shape, caption) in enumerate(zip(shapes, captions, strict=True)):
        draw(tmp_path / "pictures" / f"{number}.png", shape)
        (tmp_path / "pictures" / f"{number}.txt").write_text(caption, encoding="utf-8")
    dataset = scan(tmp_path / "pictures", resolution=128, hold_out=0)
    return encode(dataset, ToyEncoder(), tmp_path / "cache").examples


def test_the_largest_batch_has_the_most_pixels_and_the_longest_texts(tmp_path):
    shapes, captions = [(128, 128), (320, 80), (128, 128), (128, 128)], ["a", "b", "a much longer caption", "c"]
    examples = encoded_of(tmp_path, shapes, captions)
    assert largest(examples, 1).names == ("2.png",)
    assert set(largest(examples, 8).names) == {"0.png", "2.png", "3.png"}


def test_the_largest_batch_is_one_that_preservation_asks_about_twice(tmp_path):
    plain, told = encoded_of(tmp_path, [(128, 128)] * 2, ["a much longer caption", "zork"])
    told = replace(told, class_texts={told.caption: ("a star", plain.text)})
    assert largest([replace(plain, class_texts={}), told], 1).names == ("1.png",)
